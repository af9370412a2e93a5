"""From a state to the parameters of each task's expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.protocol import Method, TaskState, Vector
from condu_ray.models.clip import Clip, Expert, Overrides

Buffers = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Experts:
    """Callable: task name -> what stands in for θ⁰'s own parameters and buffers, or is added; None where θ⁰ answers.

    buffers: task -> buffers that its training changed, kept exactly beside the fused parameters.
    """

    clip: Clip
    method: Method
    layout: Layout
    config: SessionConfig
    state: TaskState
    buffers: Mapping[str, Buffers] = field(default_factory=dict)

    def __call__(self, task: str) -> Expert | None:
        delta = self.state.delta(task)
        if delta is None:
            return None
        return expert_of(self.clip, self.method, self.layout, self.config, delta, self.buffers.get(task, {}))

    def merged(self, task: str) -> Overrides | None:
        """As a call, but always what stands in for θ⁰'s own, as a file of weights has it."""
        delta = self.state.delta(task)
        if delta is None:
            return None
        return merged(self.clip, self.method, self.layout, self.config, delta, self.buffers.get(task, {}))


def expert_of(
    clip: Clip, method: Method, layout: Layout, config: SessionConfig, delta: Vector, buffers: Buffers
) -> Expert:
    """The expert of any delta, say of one that was just trained; beside θ⁰ where it can be and has no buffers."""
    if not buffers and (adapter := method.adapter(clip, layout, config, delta)):
        return adapter
    return merged(clip, method, layout, config, delta, buffers)


def merged(
    clip: Clip, method: Method, layout: Layout, config: SessionConfig, delta: Vector, buffers: Buffers
) -> Overrides:
    """The expert of any delta as parameters and buffers of its own."""
    parameters = method.expert(clip, layout, config, delta)
    return {**parameters, **{name: torch.tensor(values, device=clip.device) for name, values in buffers.items()}}
