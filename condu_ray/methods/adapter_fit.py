"""Fits a linear adapter on cached features: real ones of the task, drawn ones of every class before it.

Optimiser, number of draws and the hinge are RAPF's (public code, arXiv 2407.14143); how draws are spread over steps,
the cap on pairs, distillation and every calibration of β are our reconstruction. What a step sees depends on (seed,
session, epoch, step) alone, so the same command gives the same bits.

Legend: N pictures, C classes, D width of a feature. Classes count in the order learned, those of the task last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from condu_ray.config import SessionConfig
from condu_ray.errors import TrainingError
from condu_ray.fusion.adapter import fuse
from condu_ray.memory.gaussians import Gaussians, Sampler
from condu_ray.methods.adapter_losses import distillation, hinge, similar_pairs
from condu_ray.methods.batches import seed_of
from condu_ray.methods.protocol import Features
from condu_ray.methods.step import Log, Losses, Step
from condu_ray.methods.training import adapter_epochs
from condu_ray.models.head import mixed

DECAYS, DECAY = (4 / 15, 10 / 15), 0.1  # after these shares of the epochs the rate falls to a tenth (RAPF)
HINGE_DRAWS = 20  # features of a class for each of its pairs
LEAST_CLASSES = 2  # old classes that a step draws features of, at least
LEAST_SHARE = 1e-3  # a learned β starts at least so far from 0 and from 1, where its logit is infinite
SHARE_RATE = 10  # the learning rate of β, in units of the adapter's
HELD_OUT = 10  # where β is searched for, one picture in so many is held out
GRID = np.linspace(0, 1, 21)  # the β that are tried
NO_PAIRS = np.empty((0, 2), np.int64)


@dataclass(frozen=True, eq=False)
class Adapter:
    """W f32[D, D] (out, in) and β, the share of the adapted feature."""

    weight: NDArray[np.float32]
    share: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """adapter: as trained, not fused. gaussians: of the task's classes. losses: (step, loss) about a hundred times."""

    adapter: Adapter
    gaussians: Gaussians
    losses: Losses


def fit(
    task: str,
    features: Features,
    old: Sequence[Mapping[str, NDArray[Any]]],
    start: Adapter | None,
    scale: float,
    config: SessionConfig,
    on_step: Callable[[Step], None] = lambda step: None,
    device: str = "cpu",
) -> Fitted:
    """The adapter after the task.

    old: statistics and `texts` of each task before, in the order learned. start: the fused adapter before, None in the
    first session. scale: of logits. Raises TrainingError for a loss that is no number.
    """
    past = _Past(old, config)
    held = _held_out(features.labels, config, past.session)
    rest = np.setdiff1d(np.arange(len(features.labels)), held)
    fitting = _Fitting(task, features, rest, past, start, scale, config, device)
    losses = fitting.run(on_step)
    adapter = fitting.adapter()
    if len(held):
        adapter = Adapter(adapter.weight, _searched(adapter, start, features, held, past, config))
    return Fitted(
        adapter, Gaussians.fit(features.raw, features.labels, len(features.texts), config.memory.covariance), losses
    )


class _Past:
    """The classes of all tasks before: texts f32[C, D], and features drawn of them. session: counts from 1."""

    def __init__(self, old: Sequence[Mapping[str, NDArray[Any]]], config: SessionConfig) -> None:
        self.classes = sum(len(each["counts"]) for each in old)
        self.session = len(old) + 1
        self._old, self._config = old, config

    def texts_with(self, new: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit texts f32[C, D] of all classes; `new`, those of the task, come last."""
        return np.concatenate([*(each["texts"] for each in self._old), new])

    def draw(self, label: int, count: int, *key: int) -> NDArray[np.float32]:
        """f32[count, D] by seed, session, `key` and class."""
        return self._sampler.draw(label, count, (self._config.seed, self.session, *key))

    @cached_property
    def _sampler(self) -> Sampler:
        gaussians = Gaussians.joined([Gaussians.from_arrays(each) for each in self._old])
        return Sampler(gaussians, self._config.choices.shrinkage, self._config.memory.gamma)


class _Fitting:
    """One fit: the parameters W and β, and what each step needs. rest: i64, the features that are trained on.

    Other arguments: as of `fit`.
    """

    def __init__(
        self,
        task: str,
        features: Features,
        rest: NDArray[np.int64],
        past: _Past,
        start: Adapter | None,
        scale: float,
        config: SessionConfig,
        device: str,
    ) -> None:
        self._task, self._past, self._scale, self._config = task, past, scale, config
        self._rule, self._own = config.choices, config.adapter
        self._raw = torch.tensor(features.raw[rest], device=device)
        self._labels = torch.tensor(features.labels[rest] + past.classes, device=device)
        texts = past.texts_with(features.texts)
        self._texts = torch.tensor(texts, device=device)
        old = texts[: past.classes]
        self._pairs = similar_pairs(old, features.texts, self._own.hinge_distance) if past.classes else NO_PAIRS
        first = start.weight if start else _first(features.raw.shape[1], config)
        self._weight = nn.Parameter(torch.tensor(first, device=device))
        self._teacher = self._weight.detach().clone(), 1.0
        if start and self._rule.calibration not in ("none", "search"):
            self._teacher = self._teacher[0], start.share
        share = _share(config, past.session, start)
        inside = min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)
        self._logit = nn.Parameter(torch.tensor(math.log(inside / (1 - inside)), device=device))
        self._fixed = None if self._rule.calibration == "learnable" else share

    def run(self, on_step: Callable[[Step], None]) -> Losses:
        own = self._own
        groups = [{"params": [self._weight], "lr": own.lr}, {"params": [self._logit], "lr": SHARE_RATE * own.lr}]
        optimiser = torch.optim.Adam(groups)
        epochs = adapter_epochs(len(self._labels), self._config)
        decays = [max(1, round(epochs * each)) for each in DECAYS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, decays, DECAY)
        steps = math.ceil(len(self._labels) / own.batch_size)
        log = Log(self._task, epochs * steps, on_step)
        for epoch in range(epochs):
            for step, batch in enumerate(self._batches(epoch)):
                replays = self._past.classes and self._config.memory.per_epoch
                loss = self._loss(batch, self._replayed(epoch, step, steps) if replays else None)
                if len(self._pairs) and own.hinge:
                    loss = loss + own.hinge * self._hinge(epoch, step)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                value, place = float(loss.detach()), epoch * steps + step
                if not math.isfinite(value):
                    mend = f"train with a smaller --adapter.lr (it was {own.lr:g})"
                    raise TrainingError(f"task {self._task}: the loss is {value} at step {place + 1}", mend)
                log.done(place + 1, value, len(batch))
            schedule.step()
        return log.losses

    def adapter(self) -> Adapter:
        with torch.no_grad():
            return Adapter(self._weight.detach().cpu().numpy(), float(self._share()))

    def _share(self) -> Tensor | float:
        return torch.sigmoid(self._logit) if self._fixed is None else self._fixed

    def _batches(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        order = self._random(epoch).permutation(len(self._labels))
        for first in range(0, len(order), self._own.batch_size):
            yield order[first : first + self._own.batch_size]

    def _replayed(self, epoch: int, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Drawn features and their classes: every old class at least once an epoch, in turns."""
        classes = self._past.classes
        turns = self._random(epoch, 1).permutation(classes)
        width = min(classes, max(LEAST_CLASSES, math.ceil(classes / steps)))
        each = max(1, round(self._config.memory.per_epoch / (steps * width)))
        chosen = [int(turns[place % classes]) for place in range(step * width, (step + 1) * width)]
        drawn = np.concatenate([self._past.draw(label, each, epoch, step) for label in chosen])
        return self._tensor(drawn), self._tensor(np.repeat(chosen, each))

    def _loss(self, batch: NDArray[np.int64], drawn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Cross entropy over all classes seen, distillation, and what holds a β that is learned."""
        raw, labels = self._raw[batch], self._labels[batch]
        if drawn is not None:
            raw, labels = torch.cat([raw, drawn[0]]), torch.cat([labels, drawn[1]])
        logits = self._logits(raw, self._weight, self._share())
        loss = functional.cross_entropy(logits, labels)
        if drawn is not None and self._rule.distillation:
            old = self._past.classes
            teacher = self._logits(drawn[0], *self._teacher)[:, :old]
            gap = distillation(teacher, logits[len(batch) :, :old], self._own.temperature)
            loss = loss + self._rule.distillation * gap
        if self._fixed is None:
            loss = loss + self._own.share_pull * (torch.sigmoid(self._logit) - self._own.share) ** 2
        return loss

    def _hinge(self, epoch: int, step: int) -> Tensor:
        pairs = self._pairs
        if len(pairs) > self._own.hinge_pairs:
            some = self._random(epoch, step, 2).choice(len(pairs), self._own.hinge_pairs, replace=False)
            pairs = pairs[np.sort(some)]
        # Pairs stand in the order of their old class, so one draw serves all pairs of a class.
        classes, times = np.unique(pairs[:, 0], return_counts=True)
        counts = zip(classes.tolist(), (HINGE_DRAWS * times).tolist(), strict=True)
        drawn = np.concatenate([self._past.draw(label, count, epoch, step, 2) for label, count in counts])
        features = mixed(self._tensor(drawn), self._weight, self._share(), self._own.mix)
        old, new = (np.repeat(column, HINGE_DRAWS) for column in (pairs[:, 0], pairs[:, 1] + self._past.classes))
        return hinge(features, self._texts[old], self._texts[new], self._own.hinge_margin)

    def _logits(self, raw: Tensor, weight: Tensor, share: Tensor | float) -> Tensor:
        return self._scale * mixed(raw, weight, share, self._own.mix) @ self._texts.T

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._config.seed, self._past.session, *key])

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.tensor(values, device=self._weight.device)


def _first(width: int, config: SessionConfig) -> NDArray[np.float32]:
    """The adapter before the first session: the identity, or the framework's uniform start of a linear layer."""
    if config.adapter.init == "identity":
        return np.eye(width, dtype=np.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(config.seed, "adapter"))
        return nn.Linear(width, width, bias=False).weight.detach().numpy()


def _share(config: SessionConfig, session: int, start: Adapter | None) -> float:
    """β while the adapter is fitted (one that is learned: at the start of it)."""
    own, calibration = config.adapter, config.choices.calibration
    if calibration == "fixed":
        return own.share
    if calibration == "schedule":
        done = min(1.0, (session - 1) / (own.share_sessions - 1))
        return own.share_start + done * (own.share_end - own.share_start)
    if calibration == "learnable":
        return start.share if start else own.share
    return 1.0


def _held_out(labels: NDArray[np.int64], config: SessionConfig, session: int) -> NDArray[np.int64]:
    """A tenth of each class, at least one picture of two, where β is searched for; else nothing."""
    if config.choices.calibration != "search":
        return np.empty(0, np.int64)
    random = np.random.default_rng([config.seed, session, 3])
    chosen = []
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        chosen.append(own[: max(len(own) // HELD_OUT, min(1, len(own) - 1))])
    return np.sort(np.concatenate(chosen))


def _searched(
    trained: Adapter,
    start: Adapter | None,
    features: Features,
    held: NDArray[np.int64],
    past: _Past,
    config: SessionConfig,
) -> float:
    """The β of the grid with the highest balanced accuracy of the fused adapter; the smallest of equal ones."""
    own, basis = config.adapter, config.choices.basis
    weight = trained.weight
    if start is not None:
        weight = fuse(start.weight, weight, own.mix_bias, basis, own.weights).weight.astype(np.float32)
    each = max(1, math.ceil(len(held) / len(features.texts)))
    drawn = [past.draw(label, each, 3) for label in range(past.classes)]
    raw = torch.tensor(np.concatenate([*drawn, features.raw[held]]))
    labels = np.concatenate([np.repeat(np.arange(past.classes), each), features.labels[held] + past.classes])
    texts, matrix = torch.tensor(past.texts_with(features.texts)), torch.tensor(weight)
    said = [(mixed(raw, matrix, float(share), own.mix) @ texts.T).argmax(dim=1).numpy() for share in GRID]
    scores = [_balanced(each, labels) for each in said]
    return float(GRID[int(np.argmax(np.round(scores, 12)))])


def _balanced(said: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Mean over the classes of the share of their features that are said rightly."""
    right, count = np.bincount(truth, said == truth), np.bincount(truth)
    return float((right[count > 0] / count[count > 0]).mean())
