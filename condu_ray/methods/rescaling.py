"""Trains the rescalers of a task that was just fused: signs and shared magnitudes stay, one factor a group learns.

    weight = θ⁰ + r · (u with the task's signs)        r = r⁰ · exp(s), s = 0 at the start, AdamW on s alone

Our reconstruction of a step of BitDelta (arXiv 2402.10193), which distils one scale a matrix from the fine-tuned model;
here the task's own loss teaches a scale a group. Pictures and augmentation go on where the task's training stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from condu_ray.config import SessionConfig, rescaler_steps
from condu_ray.data import TaskData
from condu_ray.fusion.groups import groups_of_tensors
from condu_ray.methods.batches import batches, seed_of
from condu_ray.methods.experts import Buffers
from condu_ray.methods.objective import BETAS, TaskLoss, backward, check_finite, precision, set_modes
from condu_ray.methods.protocol import Method
from condu_ray.methods.states import FusedState
from condu_ray.methods.step import Log, Step
from condu_ray.methods.training import schedule, steps_for
from condu_ray.models.clip import Clip

RATE = 0.02
"""Peak rate of s, so about the relative change of a rescaler in a step; measured, see docs/decisions.md."""


def steps_of(task: TaskData, config: SessionConfig) -> int:
    """How many steps train the rescalers of a task; 0 where none do."""
    return rescaler_steps(config, steps_for(len(task.train), config))


def train_rescalers(
    clip: Clip,
    method: Method,
    state: FusedState,
    task: TaskData,
    config: SessionConfig,
    buffers: Buffers,
    on_step: Callable[[Step], None] = lambda step: None,
) -> NDArray[np.float32]:
    """The rescalers of `task` after `steps_of(task, config)` steps of its own loss, f32[G]; 0 stays 0.

    state: with the task in it, by sign triggers. buffers: those that its training changed; they stay. The same seed and
    number of threads give the same bits. Raises TrainingError for a loss or gradient that is not finite.
    """
    steps, seen = steps_of(task, config), steps_for(len(task.train), config)
    rescaled = _Rescaled(clip, method, state, task, config, buffers)
    optimiser = torch.optim.AdamW([rescaled.change], lr=RATE, betas=BETAS, weight_decay=0.0)
    autocast = precision(clip, config)
    log = Log(task.name, steps, on_step)
    rest = range(seen, seen + steps)
    for step, (pixels, labels) in enumerate(batches(task, clip, config, rest)):
        torch.manual_seed(seed_of(config.seed, "dropout", rest[step], 0))
        for group in optimiser.param_groups:
            group["lr"] = RATE * schedule(step, steps, 0.0)
        optimiser.zero_grad(set_to_none=True)
        loss = backward(rescaled, pixels, labels, config, autocast)
        mend = "use --train.precision fp32, or --fusion.tune-rescalers 0 in another --store"
        check_finite(task.name, f"step {step + 1} of {steps} of its rescalers", loss, [rescaled.change], mend)
        optimiser.step()
        log.done(step + 1, loss, config.train.batch_size)
    return rescaled.rescalers().detach().cpu().numpy()


class _Rescaled:
    """The task's loss by its expert, as a function of s. Callable: (pixels, labels) -> loss."""

    def __init__(
        self,
        clip: Clip,
        method: Method,
        state: FusedState,
        task: TaskData,
        config: SessionConfig,
        buffers: Buffers,
    ) -> None:
        layout, granularity = state.fused.layout, state.fused.granularity
        model, parameters = method.prepare(clip, layout, config, None)
        model.requires_grad_(False)
        own = dict(model.named_buffers())
        for name, values in buffers.items():
            own[name].copy_(torch.tensor(values))
        set_modes(model, "frozen")
        self._loss = TaskLoss(clip, model, task, config)
        first = state.fused.tasks[state.fused.position(task.name)].rescalers
        self._first = torch.tensor(first, device=clip.device)
        self.change = nn.Parameter(torch.zeros_like(self._first))
        names = {id(parameter): name for name, parameter in self._loss.named_parameters()}
        directions = layout.views(state.rescaled(task.name, np.ones_like(first)).delta(task.name))
        self._moved = [
            # Laid out in memory like the parameter, which may be channels_last.
            (names[id(start)], start, torch.empty_like(start).copy_(torch.tensor(directions[name])), groups)
            for (name, start), groups in zip(parameters.items(), groups_of_tensors(layout, granularity), strict=True)
        ]

    def __call__(self, pixels: Tensor, labels: Tensor) -> Tensor:
        rescalers = self.rescalers()
        weights = {
            name: torch.addcmul(start, direction, _beside(rescalers[groups], direction))
            for name, start, direction, groups in self._moved
        }
        loss: Tensor = functional_call(self._loss, weights, (pixels, labels))
        return loss

    def rescalers(self) -> Tensor:
        return self._first * self.change.exp()


def _beside(rescalers: Tensor, tensor: Tensor) -> Tensor:
    """One rescaler, or one a row, shaped to multiply the tensor with."""
    return rescalers.view(-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() else rescalers[0]
