"""Which experts answer for a picture (ConDU, inference without a task name; adaptive K is our reconstruction).

Legend: B pictures, T tasks, D width of the common space. s_1 >= s_2 >= ... are one picture's similarities, sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from condu_ray.config import VoteConfig
from condu_ray.voting.prototypes import Prototypes

LOST_SHARE = 100  # one held-out picture in a hundred may lose its own task
KNOWN_QUANTILE = 0.05
UNSEEN_QUANTILE = 0.01


@dataclass(frozen=True)
class Thresholds:
    """Where the similarities decide, in units of cosine.

    gap: a drop from one task to the next that ends the list of experts. known: from here on a picture is surely of a
    learned task. unseen: below, it is surely of none.
    """

    gap: float
    known: float
    unseen: float


# No pair of cosines differs by more than 2, none lies outside [-1, 1]: always K experts and the base model.
# Finite, so that a manifest can hold them.
UNCALIBRATED = Thresholds(gap=3.0, known=2.0, unseen=-2.0)


@dataclass(frozen=True)
class Chosen:
    """Who answers: task indices, the most similar first, and whether θ⁰ takes part."""

    experts: tuple[int, ...]
    base: bool


def similarities(features: NDArray[np.float32], prototypes: Sequence[Prototypes]) -> NDArray[np.float32]:
    """Highest cosine over the classes of each task: unit features f32[B, D] by θ⁰ -> f32[B, T]."""
    result = np.empty((len(features), len(prototypes)), dtype=np.float32)
    for index, task in enumerate(prototypes):
        result[:, index] = (features @ task.unit.T).max(axis=1)
    return result


def calibrate(prototypes: Sequence[Prototypes], k: int) -> Thresholds:
    """Thresholds from every task's held-out features, for at most `k` experts.

    gap: the smallest value at which at most 1 % of the held-out pictures lose their own task from the chosen set (where
    `k` alone loses more: at which no others are lost). known, unseen: the 5 % and 1 % quantiles of the similarity to
    the own task. UNCALIBRATED where nothing was held out.
    """
    needed: list[float] = []
    own: list[float] = []
    for index, task in enumerate(prototypes):
        for row in similarities(task.held_out, prototypes).astype(np.float64):
            needed.append(_needed_gap(row, index, k))
            own.append(float(row[index]))
    if not needed:
        return UNCALIBRATED
    worst = sorted(needed)[: len(needed) - len(needed) // LOST_SHARE][-1]
    if np.isinf(worst):
        worst = max((value for value in needed if np.isfinite(value)), default=-1.0)
    # An expert is taken while the drop is below the gap, so the gap lies one step above the drop that must pass.
    gap = float(np.nextafter(worst, np.inf)) if worst >= 0 else 0.0
    return Thresholds(gap, float(np.quantile(own, KNOWN_QUANTILE)), float(np.quantile(own, UNSEEN_QUANTILE)))


def _needed_gap(similarity: NDArray[np.float64], own: int, k: int) -> float:
    """The drop that the gap must exceed for task `own` to be chosen: -1 if it always is, inf if it never is."""
    order = np.argsort(-similarity, kind="stable")
    rank = int(np.flatnonzero(order == own)[0])
    if rank == 0:
        return -1.0
    if rank >= k:
        return float("inf")
    values = similarity[order[: rank + 1]]
    return float((values[:-1] - values[1:]).max())


def choose(similarity: NDArray[np.float32], vote: VoteConfig, thresholds: Thresholds) -> list[Chosen]:
    """Who answers for each picture of f32[B, T]; equal similarities keep the order of the tasks.

    Not adaptive: the `k` most similar tasks and θ⁰. Adaptive: experts while s_i - s_{i+1} < gap, at most `k`; θ⁰ is
    left out where s_1 >= known and s_1 - s_2 >= gap; where s_1 < unseen, `k` experts and θ⁰.
    """
    order = np.argsort(-similarity, axis=1, kind="stable")
    ordered = np.take_along_axis(similarity, order, axis=1).astype(np.float64)
    return [_choose(*pair, vote, thresholds) for pair in zip(order, ordered, strict=True)]


def _choose(order: NDArray[np.int64], values: NDArray[np.float64], vote: VoteConfig, thresholds: Thresholds) -> Chosen:
    most = min(vote.k, len(values))
    if not most or not vote.adaptive or values[0] < thresholds.unseen:
        return Chosen(tuple(int(task) for task in order[:most]), base=True)
    wide = np.append(values[:-1] - values[1:], np.inf) >= thresholds.gap  # after the last task there is nothing near
    count = min(most, int(np.argmax(wide)) + 1)
    decided = bool(wide[0]) and values[0] >= thresholds.known
    return Chosen(tuple(int(task) for task in order[:count]), base=not decided)
