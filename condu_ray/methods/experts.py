"""From a state to the parameters of each task's expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.protocol import NO_MEMORY, Memory, Method, TaskState, Vector
from condu_ray.models.clip import Clip, Expert, Headed, Overrides, halved
from condu_ray.models.head import Head

Buffers = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Experts:
    """Makes the experts of a state. Callable: task name -> its expert; None where θ⁰ itself answers.

    buffers: task -> buffers that its training changed, kept exactly beside the fused parameters. half: matrices and
    kernels in bfloat16. Where one model answers for all tasks, it is made once.
    """

    clip: Clip
    method: Method
    layout: Layout
    config: SessionConfig
    state: TaskState
    buffers: Mapping[str, Buffers] = field(default_factory=dict)
    half: bool = False

    def __call__(self, task: str) -> Expert | None:
        delta = self.state.delta(task)
        if delta is None:
            return None
        own = self.buffers.get(task, {})
        return self._made(delta, own) if own or not self.config.system.single else self._single

    @cached_property
    def _single(self) -> Expert | None:
        delta = self.state.delta(self.state.tasks[-1])
        return None if delta is None else self._made(delta, {})

    def _made(self, delta: Vector, own: Buffers) -> Expert:
        expert = expert_of(self.clip, self.method, self.layout, self.config, delta, own, self.state.memory)
        return halved(expert) if self.half else expert

    def merged(self, task: str) -> Overrides | None:
        """The expert as parameters and buffers of its own, also where a call gives adapters; None where θ⁰ answers."""
        delta = self.state.delta(task)
        if delta is None:
            return None
        return merged(self.clip, self.method, self.layout, self.config, delta, self.buffers.get(task, {}))

    def head(self, task: str) -> Head | None:
        """What follows the towers of this task's expert."""
        delta = self.state.delta(task)
        if delta is None:
            return None
        return self.method.head(self.clip, self.layout, self.config, delta, self.state.memory)


def expert_of(
    clip: Clip,
    method: Method,
    layout: Layout,
    config: SessionConfig,
    delta: Vector,
    buffers: Buffers,
    memory: Memory = NO_MEMORY,
) -> Expert:
    """The expert of any delta, say of one that was just trained; beside θ⁰ where it can be and has no buffers."""
    adapter = None if buffers else method.adapter(clip, layout, config, delta)
    tower = adapter or merged(clip, method, layout, config, delta, buffers)
    head = method.head(clip, layout, config, delta, memory)
    return Headed(tower or None, head) if head else tower


def merged(
    clip: Clip, method: Method, layout: Layout, config: SessionConfig, delta: Vector, buffers: Buffers
) -> Overrides:
    """The expert of any delta as parameters and buffers of its own."""
    parameters = method.expert(clip, layout, config, delta)
    return {**parameters, **{name: torch.tensor(values, device=clip.device) for name, values in buffers.items()}}
