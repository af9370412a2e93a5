"""Fine-tunes one task and returns its delta. A plain function: the same bits for the same settings, seed and CPU.

Recipe of ConDU's released scripts: AdamW, linear warm-up, cosine to 0, cross entropy over the task's classes with label
smoothing, first prompt template, logit scale frozen. What a step sees depends on (seed, step) only, so a run that was
killed goes on from a checkpoint to the same result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.errors import TrainingError
from condu_ray.fusion.layout import Layout
from condu_ray.methods.batches import batches, seed_of
from condu_ray.methods.checkpoint import Checkpoint, Resume, checkpoint_of, restore
from condu_ray.methods.objective import BETAS, TaskLoss, Teacher, backward, check_finite, precision, set_modes
from condu_ray.methods.protocol import Memory, Method, Vector
from condu_ray.methods.step import Log, Losses, Step
from condu_ray.models.clip import Clip

__all__ = [
    "Checkpoint",
    "Place",
    "Resume",
    "Trained",
    "adapter_epochs",
    "all_steps_for",
    "buffers_in",
    "learning_rate_for",
    "memory_in",
    "prompt_steps_for",
    "schedule",
    "steps_for",
    "train_task",
]

# Below this many parameters the published rate (1e-5, for ViT-B/16) hardly moves a model; see docs/decisions.md.
SMALL_MODEL_PARAMETERS = 50_000_000
EPOCHS, LEAST_STEPS, MOST_STEPS = 10, 100, 1000
ADAPTER_EPOCHS, LEAST_ADAPTER_STEPS = 15, 750
MEMORY, BUFFER = "memory", "buffer"


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train the same task, and how gradients are shared.

    agree: whether all of them gave the same numbers; each must ask, in the same order.
    """

    rank: int = 0
    size: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    barrier: Callable[[], None] = lambda: None
    agree: Callable[..., bool] = lambda *numbers: True


@dataclass(frozen=True)
class Trained:
    """delta f32[layout.total]; buffers that training changed, as they are; (step, loss) about a hundred times.

    memory: what the state is to keep beside the delta.
    """

    delta: Vector
    buffers: dict[str, NDArray[Any]]
    losses: Losses
    memory: Memory = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything by name, for the store."""
        kept = {f"{MEMORY}/{task}/{name}": each for task, own in self.memory.items() for name, each in own.items()}
        buffers = {f"{BUFFER}/{name}": each for name, each in self.buffers.items()}
        return {"delta": self.delta, "losses": np.array(self.losses, np.float64).reshape(-1, 2), **kept, **buffers}


def memory_in(arrays: Mapping[str, NDArray[Any]]) -> Memory:
    """The memory in what `Trained.arrays` gave."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for path, values in arrays.items():
        kind, _, rest = path.partition("/")
        if kind == MEMORY:
            task, _, name = rest.partition("/")
            found.setdefault(task, {})[name] = values
    return found


def buffers_in(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The buffers in what `Trained.arrays` gave."""
    return {path.removeprefix(f"{BUFFER}/"): each for path, each in arrays.items() if path.startswith(f"{BUFFER}/")}


def steps_for(pictures: int, config: SessionConfig) -> int:
    """Optimiser steps: as set, or ten epochs within 100 and 1,000; of an adapter its epochs."""
    if config.system.on_features:
        return adapter_epochs(pictures, config) * math.ceil(pictures / config.adapter.batch_size)
    if config.train.steps is not None:
        return config.train.steps
    return min(MOST_STEPS, max(LEAST_STEPS, math.ceil(EPOCHS * pictures / config.train.batch_size)))


def adapter_epochs(pictures: int, config: SessionConfig) -> int:
    """Passes over a task's features: as set, or RAPF's 15 (public code), and more until they make the 750 steps that 15
    are there in a session of CIFAR-100: of few pictures an adapter would be left half trained (ours)."""
    own = config.adapter
    return own.epochs or max(ADAPTER_EPOCHS, math.ceil(LEAST_ADAPTER_STEPS / math.ceil(pictures / own.batch_size)))


def prompt_steps_for(pictures: int, config: SessionConfig) -> int:
    """Optimiser steps of the prompts, which DMC learns after the image tower: as set, or as many as that took."""
    if "dmc" not in config.system.reads:
        return 0
    return config.dmc.prompt_steps or steps_for(pictures, config)


def all_steps_for(pictures: int, config: SessionConfig) -> int:
    """Optimiser steps of a task, over all that its method learns one after another."""
    return steps_for(pictures, config) + prompt_steps_for(pictures, config)


def learning_rate_for(parameters: int, config: SessionConfig) -> float:
    """Peak rate: as set, or the published one for large models and a measured one for small (docs/decisions.md)."""
    if config.system.on_features:
        return config.adapter.lr
    if config.train.lr is not None:
        return config.train.lr
    large, small = config.system.rates
    return small if parameters < SMALL_MODEL_PARAMETERS else large


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at `step` (from 0): linear over the first `warmup` share, cosine to 0 after."""
    rising = math.ceil(warmup * steps - 1e-9)  # 0.07 of 100 steps is 7, whatever the last bit says
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train_task(
    clip: Clip,
    method: Method,
    layout: Layout,
    task: TaskData,
    config: SessionConfig,
    start: Vector | None = None,
    place: Place | None = None,
    resume: Resume | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    watch: Callable[[int, nn.Module], None] = lambda step, model: None,
    teacher: Teacher | None = None,
) -> Trained:
    """Trains `task` from θ⁰ (or θ⁰ + start) and returns what changed, relative to θ⁰.

    Every process of a data-parallel group calls this alike and gets the same delta; only rank 0 saves checkpoints.
    watch: called after each step with the number of steps done and the model as it is then, in evaluation mode only if
    it asks for it: it may look and switch modes, and must not change what is trained. teacher: adds to every loss.
    Raises TrainingError, in every process at the same step, for a loss or gradient that is not finite.
    """
    place, resume = place or Place(), resume or Resume()
    if config.train.batch_size < place.size:
        raise TrainingError(
            f"a batch of {config.train.batch_size} pictures cannot be shared by {place.size} workers",
            f"use --workers {config.train.batch_size} or a larger --train.batch-size",
        )
    steps = steps_for(len(task.train), config)
    model, parameters = method.prepare(clip, layout, config, start)
    set_modes(model, config.train.batch_norm)
    before = {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    loss_of = TaskLoss(clip, model, task, config, teacher)
    peak = learning_rate_for(clip.parameter_count(), config)
    optimiser = torch.optim.AdamW(
        list(parameters.values()),
        lr=peak,
        betas=BETAS,
        weight_decay=config.train.weight_decay,
        fused=clip.device.type == "cpu",  # a quarter of the time of one tensor after another (docs/decisions.md)
        foreach=clip.device.type == "cuda",
    )
    saved_state = resume.load()
    first, losses = restore(saved_state, parameters, optimiser, model) if saved_state else (0, [])
    del saved_state  # parameters and both moments: they would stay in memory as long as the training goes on
    module = place.wrap(loss_of)
    autocast = precision(clip, config)
    log, saved = Log(task.name, steps, on_step, losses), time.monotonic()
    rest = range(first, steps)
    for step, (pixels, labels) in zip(rest, batches(task, clip, config, rest, place.rank, place.size), strict=True):
        torch.manual_seed(seed_of(config.seed, "dropout", step, place.rank))
        for group in optimiser.param_groups:
            group["lr"] = peak * schedule(step, steps, config.train.warmup)
        optimiser.zero_grad(set_to_none=True)
        loss = backward(module, pixels, labels, config, autocast, place.size)
        mend = f"train with a smaller --train.lr (it was {peak:g}) or --train.precision fp32"
        check_finite(task.name, f"step {step + 1} of {steps}", loss, parameters.values(), mend)
        optimiser.step()
        log.done(step + 1, loss, config.train.batch_size)
        watch(step + 1, model)
        due = time.monotonic() - saved >= config.train.checkpoint_seconds
        if place.rank == 0 and step < steps - 1 and due:
            resume.save(checkpoint_of(step + 1, log.losses, parameters, optimiser, model))
            saved = time.monotonic()
    # Gradients and moments go before the start is made again to compare with: together they would be the peak.
    optimiser.state.clear()
    optimiser.zero_grad(set_to_none=True)
    return Trained(_delta(clip, method, layout, config, parameters), _changed(model, before), log.losses)


def _delta(
    clip: Clip, method: Method, layout: Layout, config: SessionConfig, parameters: Mapping[str, nn.Parameter]
) -> Vector:
    _, start = method.prepare(clip, layout, config, None)
    return layout.flatten({name: (parameters[name].detach() - start[name].detach()).cpu() for name in parameters})


def _changed(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {
        name: tensor.detach().cpu().numpy()
        for name, tensor in model.named_buffers()
        if not torch.equal(tensor, before[name])
    }
