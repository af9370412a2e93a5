"""Which task's domain a picture is of, and whether it is of none: a linear discriminant on θ⁰'s domain features.

One Gaussian a class, one covariance within classes that all tasks share (linear discriminant analysis); "of none" by
the relative Mahalanobis distance (Ren et al. 2021, arXiv 2106.09022). What a task keeps are its own moments, so tasks
may come in any order, be forgotten, and none needs another's pictures. Routing experts by it is ours.

The same discriminant tells a task's classes apart beside the task's expert (`evidence`, ours): it looks at earlier
layers than the expert's answer does, and at no text.

Legend: B pictures, T tasks, C classes of a task, K classes of all tasks, W width of the domain features, N held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import DataError

SHRINKAGE = 0.1  # of covariances towards their diagonals
FLOOR = 1e-5  # variance of channels that never moved, in medians of the others

PRIOR = 0.05  # share of pictures that are expected to be of no task, where nothing else is known
KNOWN_QUANTILE = 0.01  # of the tasks' own pictures: where those that are known end
FARTHEST = 2.0  # deviations below that quantile: how far away a strange picture counts as, at most
TEMPERATURES = np.geomspace(2.0, 2000.0, 31)  # that `calibrate` chooses from, in units of squared distance
EVIDENCE = 0.5  # power of the discriminant's probabilities: the expert looks at the same picture
STEPS, RIDGE = 50, 1e-3  # of the logistic regression
CHUNK = 8192  # pictures whose features are held in double precision at once

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Domain:
    """What routing keeps of a task's domain.

    counts i64[C]: pictures behind each mean. means f32[C, W]: 0 for a class without pictures. deviations f32[W] and
    correlations f16[W (W - 1) / 2] (upper triangle, row by row): of the pictures around the means of their classes.
    held_out f16[N, W]: domain features of training pictures that are in none of these, for calibration.
    held_out_labels i64[N]: their classes; -1 where an older release did not keep them.
    """

    counts: NDArray[np.int64]
    means: NDArray[np.float32]
    deviations: NDArray[np.float32]
    correlations: NDArray[np.float16]
    held_out: NDArray[np.float16]
    held_out_labels: NDArray[np.int64]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, for the store."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Domain:
        """The inverse of `arrays`."""
        unknown = {"held_out_labels": np.full(len(arrays["held_out"]), -1, np.int64)}
        return cls(**{name: {**unknown, **arrays}[name] for name in cls.__dataclass_fields__})

    def scatter(self) -> Doubles:
        """f64[W, W]: sum of (z - mean of its class)(z - mean of its class)ᵀ over the task's pictures."""
        width = len(self.deviations)
        scatter = np.zeros((width, width))
        scatter[np.triu_indices(width, 1)] = self.correlations
        scatter += scatter.T + np.eye(width)
        deviations = self.deviations.astype(np.float64)
        return np.asarray(scatter * deviations[:, None] * deviations * self.counts.sum())


def make_domain(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: int,
    held_out: NDArray[np.float32],
    held_out_labels: NDArray[np.int64],
) -> Domain:
    """From the domain features f32[B, W] of a task's pictures and their classes i64[B]; held out: f32[N, W], i64[N].

    Raises DataError for features that are not finite.
    """
    if not np.isfinite(features).all():
        raise DataError("the base model's features of some pictures are not finite", "use another model or precision")
    width = features.shape[1]
    counts = np.bincount(labels, minlength=classes).astype(np.int64)
    sums, covariance = np.zeros((classes, width)), np.zeros((width, width))
    np.add.at(sums, labels, features)
    means = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        around = features[rows].astype(np.float64) - means[labels[rows]]
        covariance += around.T @ around / len(features)
    deviations = np.sqrt(np.diag(covariance))
    inverse = np.divide(1, deviations, out=np.zeros(width), where=deviations > 0)
    correlations = (covariance * inverse[:, None] * inverse)[np.triu_indices(width, 1)]
    return Domain(
        counts,
        means,
        deviations.astype(np.float32),
        correlations.astype(np.float16),
        _half(held_out.reshape(-1, width)),
        np.asarray(held_out_labels, np.int64),
    )


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    largest = float(np.finfo(np.float16).max)
    return np.clip(values, -largest, largest).astype(np.float16)


@dataclass(frozen=True)
class Calibration:
    """temperature: of the softmax over tasks, in units of squared distance. middle, slope: P(of none of the tasks) =
    1 / (1 + exp(slope (r - middle))) for a picture's relative distance r. within: temperature of the softmax over a
    task's classes; None where no class of a held-out picture is known."""

    temperature: float
    middle: float
    slope: float
    within: float | None = None


@dataclass(frozen=True, eq=False)
class Distances:
    """tasks f64[B, T]: smallest squared Mahalanobis distance to a class of each task. relative f64[B]: squared distance
    to all that was learned as one Gaussian, less the smallest. classes: of each task f64[B, C], infinite to a class
    without pictures."""

    tasks: Doubles
    relative: Doubles
    classes: list[Doubles]


class Discriminant:
    """Distances of pictures to what is known of several tasks."""

    def __init__(self, domains: Sequence[Domain], scatter: Doubles | None = None) -> None:
        """scatter: the sum of all `Domain.scatter`, where the caller has it."""
        edges = np.cumsum([0, *(len(each.counts) for each in domains)])
        self.columns = tuple(slice(int(a), int(b)) for a, b in pairwise(edges))
        """For each task, where its classes are among the classes of all tasks."""
        counts = np.concatenate([each.counts for each in domains])
        self._seen = seen = counts > 0
        means = np.concatenate([each.means for each in domains]).astype(np.float64)[seen]
        counts = counts[seen].astype(np.float64)
        total = counts.sum()
        within = sum(each.scatter() for each in domains) if scatter is None else scatter
        center = counts @ means / total
        between = (means - center).T @ ((means - center) * counts[:, None])
        self._white = _whitening(within / max(1.0, total - len(counts)))
        self._means = means @ self._white
        self._white_all = _whitening((within + between) / total)
        self._center = center @ self._white_all

    def distances(self, features: NDArray[Any]) -> Distances:
        """Distances of pictures with domain features [B, W]."""
        values = np.asarray(features, dtype=np.float64)
        near = values @ self._white
        squared = np.full((len(values), len(self._seen)), np.inf)
        squared[:, self._seen] = (near**2).sum(1)[:, None] - 2 * near @ self._means.T + (self._means**2).sum(1)
        tasks = np.stack([squared[:, columns].min(axis=1) for columns in self.columns], axis=1)
        far = ((values @ self._white_all - self._center) ** 2).sum(1)
        return Distances(tasks, far - tasks.min(axis=1), [squared[:, columns] for columns in self.columns])


def _scatters_without_each(domains: Sequence[Domain]) -> Iterator[Doubles]:
    """For every task the scatter of all others, f64[W, W]; by sums alone, since a difference could leave a channel that
    only one task moves with a variance below zero."""
    after = [np.zeros((len(domains[0].deviations),) * 2)]
    for each in reversed(domains[1:]):
        after.append(after[-1] + each.scatter())
    before = np.zeros_like(after[0])
    for each in domains:
        yield before + after.pop()
        before += each.scatter()


def _whitening(covariance: Doubles) -> Doubles:
    """f64[W, W], L with LLᵀ the inverse of the shrunk covariance."""
    diagonal = np.diag(covariance)
    moving = diagonal[diagonal > 0]
    floor = FLOOR * float(np.median(moving)) if len(moving) else 1.0
    shrunk = (1 - SHRINKAGE) * covariance + np.diag(np.where(diagonal > 0, SHRINKAGE * diagonal, floor))
    return np.asarray(np.linalg.inv(np.linalg.cholesky(shrunk)).T)


def probabilities(distances: Doubles, calibration: Calibration) -> Doubles:
    """Distances f64[B, T] -> probability of each task, given that the picture is of one of them, f64[B, T]."""
    scores = -distances / calibration.temperature
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def evidence(classes: Doubles, calibration: Calibration) -> Doubles:
    """What the discriminant says of a task's classes beside its expert: EVIDENCE times the logarithm of their softmax
    probabilities, f64[B, C]. classes: distances f64[B, C].

    A class without pictures counts as the mean of the others. Zeros where the temperature is not known.
    """
    if calibration.within is None:
        return np.zeros(classes.shape)
    known = np.isfinite(classes)
    logs = _log_shares(classes, calibration.within)
    mean = np.where(known, logs, 0).sum(axis=1, keepdims=True) / known.sum(axis=1, keepdims=True)
    return np.asarray(EVIDENCE * np.where(known, logs, mean))


def _log_shares(classes: Doubles, temperature: float) -> Doubles:
    """Logarithm of the softmax of -distance / temperature, f64[B, C]; -inf for an infinite distance."""
    scores = -classes / temperature
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def strangeness(relative: Doubles, calibration: Calibration, prior: float = PRIOR) -> Doubles:
    """Relative distances f64[B] -> probability that the picture is of no task, f64[B].

    prior: that probability before the picture is looked at.
    """
    odds = calibration.slope * (relative - calibration.middle) + _logit(PRIOR) - _logit(prior)
    return np.asarray(0.5 * (1 - np.tanh(0.5 * odds)))


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def calibrate(domains: Sequence[Domain]) -> Calibration | None:
    """From every task's held-out pictures: known ones to all tasks, and strange ones to the tasks without their own.

    temperature, within: the likeliest of a fixed list. middle, slope: logistic regression, a PRIOR share of pictures
    being strange; of a single task, for which nothing is strange, the middle is the 1 % quantile of its own. A strange
    picture that is far away says where its own task is, not where the others end, so it counts as less far (FARTHEST).
    None where nothing was held out.
    """
    whole = Discriminant(domains)
    likelihoods = np.zeros(len(TEMPERATURES))
    within: Doubles | None = None
    known, strange = [], []
    for task, (domain, scatter) in enumerate(zip(domains, _scatters_without_each(domains), strict=True)):
        if not len(domain.held_out):
            continue
        found = whole.distances(domain.held_out)
        known.append(found.relative)
        for place, temperature in enumerate(TEMPERATURES):
            share = probabilities(found.tasks, Calibration(temperature, 0.0, 1.0))[:, task]
            likelihoods[place] += np.log(np.maximum(share, 1e-12)).mean()
        told = domain.held_out_labels >= 0
        if told.any():
            right = _of_own_class(found.classes[task][told], domain.held_out_labels[told])
            within = right if within is None else within + right
        others = [each for other, each in enumerate(domains) if other != task]
        if others:
            strange.append(Discriminant(others, scatter).distances(domain.held_out).relative)
    if not known:
        return None
    inside = np.concatenate(known)
    scale = float(inside.std()) or 1.0
    temperature = float(TEMPERATURES[int(np.argmax(likelihoods))])
    inner = None if within is None else float(TEMPERATURES[int(np.argmax(within))])
    end = float(np.quantile(inside, KNOWN_QUANTILE))
    if not strange:
        return Calibration(temperature, end, 4 / scale, inner)
    middle, slope = _logistic(inside, np.maximum(np.concatenate(strange), end - FARTHEST * scale), scale)
    return Calibration(temperature, middle + _logit(PRIOR) / slope, slope, inner)


def _of_own_class(classes: Doubles, labels: NDArray[np.int64]) -> Doubles:
    """Mean log probability of the right class at each of TEMPERATURES, from distances f64[N, C] and labels i64[N]."""
    found = []
    for temperature in TEMPERATURES:
        logs = _log_shares(classes, temperature)
        found.append(np.maximum(logs[np.arange(len(labels)), labels], np.log(1e-12)).mean())
    return np.array(found)


def _logistic(known: Doubles, strange: Doubles, scale: float) -> tuple[float, float]:
    """(middle, slope) of the balanced logistic regression of known against strange, by Newton's method."""
    values = np.concatenate([known, strange])
    shift = float(values.mean())
    x = np.stack([(values - shift) / scale, np.ones(len(values))], axis=1)
    y = np.repeat([1.0, 0.0], [len(known), len(strange)])
    weight = np.repeat([0.5 / len(known), 0.5 / len(strange)], [len(known), len(strange)])
    beta = np.zeros(2)
    for _ in range(STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * (x @ beta)))
        gradient = x.T @ (weight * (y - p)) - RIDGE * beta
        curvature = (x * (weight * p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(2)
        beta += np.linalg.solve(curvature, gradient)
    slope = max(float(beta[0]), 1e-3)
    return shift - scale * float(beta[1]) / slope, slope / scale
