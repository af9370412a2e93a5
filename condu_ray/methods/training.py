"""Fine-tunes one task and returns its delta. A plain function: the same bits for the same settings, seed and CPU.

Recipe of ConDU's released scripts: AdamW, linear warm-up, cosine to 0, cross entropy over the task's classes with label
smoothing, first prompt template, logit scale frozen. What a step sees depends on (seed, step) only, so a run that was
killed goes on from a checkpoint to the same result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from condu_ray.config import SMALL_MODEL_PARAMETERS, SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.loading import PictureSet
from condu_ray.data.templates import prompts
from condu_ray.errors import TrainingError
from condu_ray.fusion.layout import Layout
from condu_ray.methods.protocol import Method, Vector
from condu_ray.models.clip import Clip, class_embeddings

BETAS = (0.9, 0.999)
EPOCHS, LEAST_STEPS, MOST_STEPS = 10, 100, 1000

Checkpoint = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train the same task, and how gradients are shared."""

    rank: int = 0
    size: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    barrier: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Resume:
    """Loads and saves the checkpoint of a running task (None: none yet)."""

    load: Callable[[], Checkpoint | None] = lambda: None
    save: Callable[[Checkpoint], None] = lambda checkpoint: None


@dataclass(frozen=True)
class Step:
    """What is reported while a task trains."""

    task: str
    step: int
    steps: int
    loss: float
    pictures_per_second: float


@dataclass(frozen=True)
class Trained:
    """delta f32[layout.total]; buffers that training changed, as they are; (step, loss) about a hundred times."""

    delta: Vector
    buffers: dict[str, NDArray[Any]]
    losses: list[tuple[int, float]]


def steps_for(pictures: int, config: SessionConfig) -> int:
    """Optimiser steps: as set, or ten epochs within 100 and 1,000."""
    if config.train.steps is not None:
        return config.train.steps
    return min(MOST_STEPS, max(LEAST_STEPS, math.ceil(EPOCHS * pictures / config.train.batch_size)))


def learning_rate_for(parameters: int, config: SessionConfig) -> float:
    """Peak rate: as set, or the published one for large models and a measured one for small (docs/decisions.md)."""
    if config.train.lr is not None:
        return config.train.lr
    small = parameters < SMALL_MODEL_PARAMETERS
    if config.method == "condu-lora":
        return 2e-3 if small else 1e-3
    return 5e-4 if small else 1e-5


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at `step` (from 0): linear over the first `warmup` share, cosine to 0 after."""
    rising = math.ceil(warmup * steps)
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
) -> Trained:
    """Trains `task` from θ⁰ (or θ⁰ + start) and returns what changed, relative to θ⁰.

    Every process of a data-parallel group calls this alike and gets the same result; only rank 0 saves checkpoints.
    Raises TrainingError for a loss that is not finite, naming the step.
    """
    place, resume = place or Place(), resume or Resume()
    steps = steps_for(len(task.train), config)
    model, parameters = method.prepare(clip, layout, config, start)
    _set_modes(model, config)
    before = {name: tensor.detach().clone() for name, tensor in model.named_buffers()}
    loss_of = _TaskLoss(model, _text_of(clip, task, config), config)
    optimiser = torch.optim.AdamW(
        list(parameters.values()), lr=1.0, betas=BETAS, weight_decay=config.train.weight_decay, foreach=clip.device.type == "cuda"
    )
    first, losses = _restore(resume.load(), parameters, optimiser, model)
    module = place.wrap(loss_of)
    peak = learning_rate_for(clip.parameter_count(), config)
    batches = _batches(task, clip, config, place, range(first, steps))
    autocast = _precision(clip, config)
    saved = time.monotonic()
    for step, (pixels, labels) in zip(range(first, steps), batches, strict=True):
        begun = time.monotonic()
        torch.manual_seed(_seed_of(config.seed, "dropout", step, place.rank))
        for group in optimiser.param_groups:
            group["lr"] = peak * schedule(step, steps, config.train.warmup)
        optimiser.zero_grad(set_to_none=True)
        loss = _backward(module, pixels, labels, config.train.accumulate, autocast)
        if not math.isfinite(loss):
            raise TrainingError(
                f"task {task.name}: the loss is {loss} at step {step + 1} of {steps}",
                f"train with a smaller --train.lr (it was {peak:g}) or --train.precision fp32",
            )
        optimiser.step()
        if step % max(1, steps // 100) == 0 or step == steps - 1:
            losses.append((step + 1, loss))
        on_step(Step(task.name, step + 1, steps, loss, config.train.batch_size / max(1e-9, time.monotonic() - begun)))
        if place.rank == 0 and step < steps - 1 and time.monotonic() - saved >= config.train.checkpoint_seconds:
            resume.save(_checkpoint(step + 1, losses, parameters, optimiser, model))
            saved = time.monotonic()
    return Trained(_delta(clip, method, layout, config, parameters), _changed(model, before), losses)


class _TaskLoss(nn.Module):
    """Cross entropy of a batch against the task's classes; one module, so that DDP sees every parameter."""

    def __init__(self, model: nn.Module, text: Tensor, config: SessionConfig) -> None:
        super().__init__()
        self.model = model
        self.smoothing = config.train.label_smoothing
        self.text_learns = config.train.towers == "both"
        self.register_buffer("text", text, persistent=False)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        model = cast(Any, self.model)
        image_BD = model.encode_image(pixels, normalize=True)
        text_CD = model.encode_text(self.text, normalize=True) if self.text_learns else self.text
        logits_BC = model.logit_scale.detach().exp() * image_BD @ text_CD.T
        return nn.functional.cross_entropy(logits_BC.float(), labels, label_smoothing=self.smoothing)


def _text_of(clip: Clip, task: TaskData, config: SessionConfig) -> Tensor:
    """Tokens of the first prompt of each class, or fixed class vectors where only the image tower learns."""
    texts = [prompts(name, task.templates) for name in task.classes]
    if config.train.towers == "both":
        return clip.tokenizer([each[0] for each in texts]).to(clip.device)
    return class_embeddings(clip, texts)


def _set_modes(model: nn.Module, config: SessionConfig) -> None:
    model.train()
    if config.train.batch_norm == "frozen":
        # A running variance that is fused like a parameter could turn negative; frozen ones stay θ⁰'s.
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _precision(clip: Clip, config: SessionConfig) -> Callable[[], Any]:
    device = clip.device.type
    wanted = config.train.precision
    half = wanted == "bf16" or (wanted == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    return lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=half)


def _backward(module: nn.Module, pixels: Tensor, labels: Tensor, parts: int, autocast: Callable[[], Any]) -> float:
    total = 0.0
    for some_pixels, some_labels in zip(pixels.chunk(parts), labels.chunk(parts), strict=True):
        with autocast():
            loss = module(some_pixels, some_labels) * (len(some_labels) / len(labels))
        loss.backward()
        total += float(loss.detach())
    return total


def _batches(
    task: TaskData, clip: Clip, config: SessionConfig, place: Place, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every global batch: pictures in an order, and with augmentation, given by the seed alone."""
    pictures = PictureSet(task.train, clip.train_transform)
    loader = DataLoader(
        cast(Any, pictures),
        batch_sampler=_Order(len(task.train), config, place, steps),
        num_workers=config.train.loader_processes,
        persistent_workers=False,
    )
    for pixels, labels in loader:
        if clip.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        yield pixels.to(clip.device), labels.to(clip.device)


class _Order:
    """Batches of (index, seed) pairs: epoch after epoch, each a permutation, cut into global batches and then by rank."""

    def __init__(self, count: int, config: SessionConfig, place: Place, steps: range) -> None:
        self.count, self.config, self.place, self.steps = count, config, place, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, seed = self.config.train.batch_size, self.config.seed
        shuffled: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        for step in self.steps:
            batch = []
            for position in range(step * size, (step + 1) * size)[self.place.rank :: self.place.size]:
                epoch, place = divmod(position, self.count)
                if epoch != shuffled[0]:
                    shuffled = epoch, np.random.default_rng([seed, epoch]).permutation(self.count)
                batch.append((int(shuffled[1][place]), _seed_of(seed, "augment", position)))
            yield batch


def _seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def _delta(clip: Clip, method: Method, layout: Layout, config: SessionConfig, parameters: Mapping[str, nn.Parameter]) -> Vector:
    _, start = method.prepare(clip, layout, config, None)
    return layout.flatten({name: (parameters[name].detach() - start[name].detach()).cpu() for name in parameters})


def _changed(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {
        name: tensor.detach().cpu().numpy()
        for name, tensor in model.named_buffers()
        if not torch.equal(tensor, before[name])
    }


def _checkpoint(
    step: int,
    losses: list[tuple[int, float]],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    model: nn.Module,
) -> Checkpoint:
    arrays: Checkpoint = {"step": np.array([step]), "losses": np.array(losses, np.float64).reshape(-1, 2)}
    for name, parameter in parameters.items():
        arrays[f"parameter/{name}"] = parameter.detach().cpu().numpy()
        if moments := optimiser.state.get(parameter):  # none where a model does not use a parameter
            arrays[f"first/{name}"] = moments["exp_avg"].cpu().numpy()
            arrays[f"second/{name}"] = moments["exp_avg_sq"].cpu().numpy()
    arrays.update({f"buffer/{name}": tensor.cpu().numpy() for name, tensor in model.named_buffers()})
    return arrays


def _restore(
    checkpoint: Checkpoint | None, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, model: nn.Module
) -> tuple[int, list[tuple[int, float]]]:
    if checkpoint is None:
        return 0, []
    step = int(checkpoint["step"][0])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(checkpoint[f"parameter/{name}"]))
            if f"first/{name}" not in checkpoint:
                continue
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter).copy_(torch.tensor(checkpoint[f"first/{name}"])),
                "exp_avg_sq": torch.empty_like(parameter).copy_(torch.tensor(checkpoint[f"second/{name}"])),
            }
        for name, tensor in model.named_buffers():
            tensor.copy_(torch.tensor(checkpoint[f"buffer/{name}"]))
    return step, [(int(at), float(loss)) for at, loss in checkpoint["losses"]]
