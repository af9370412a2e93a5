"""One answer from several (ConDU, inference; `weighted` is our reconstruction of the paper's "weighted").

Legend: M voters of a picture (experts, then θ⁰ if it takes part), C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.config import VoteConfig

Scores = NDArray[np.float64]


def weights(similarities: NDArray[Any], base: bool, vote: VoteConfig) -> tuple[Scores, float]:
    """(weights of the chosen experts f64[M], weight of θ⁰), which sum to 1.

    mean_logits: all equal, as in the released code. weighted: softmax(similarity / temperature) · (1 - β) for the
    experts, β for θ⁰, by default 1 / (experts + 1). θ⁰ alone has weight 1; left out (`base` false) it has 0.
    """
    count = len(similarities)
    if not count:
        return np.zeros(0), 1.0
    equal_share = 1 / (count + 1)
    if vote.combine == "mean_logits":
        base_weight = equal_share if base else 0.0
        return np.full(count, (1 - base_weight) / count), base_weight
    base_weight = (equal_share if vote.base_weight is None else vote.base_weight) if base else 0.0
    return (1 - base_weight) * probabilities(np.asarray(similarities, dtype=np.float64) / vote.temperature), base_weight


def combine(logits: NDArray[Any], weights: Scores, vote: VoteConfig) -> Scores:
    """Logits [M, C] at the model's own scale and weights f64[M] that sum to 1 -> scores f64[C].

    The scores are the weighted mean of the logits, or (`average: probabilities`, `weighted` only) the logarithm of the
    weighted mean of the probabilities, which bounds what one over-confident expert can do. Their softmax is the answer.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if vote.combine == "mean_logits" or vote.average == "logits":
        return np.asarray(weights @ logits)
    mixed = weights @ np.stack([probabilities(row) for row in logits])
    with np.errstate(divide="ignore"):  # a probability below the smallest float is 0, its logarithm -inf
        return np.asarray(np.log(mixed))


def side_by_side(logits: Sequence[NDArray[Any]], weights: Scores) -> Scores:
    """Each expert scores labels of its own: probability of a label = weight of its task · probability within the task.

    logits: one array an expert, over its own labels. Returns the logarithms, one after another. Our reconstruction.
    """
    ends = np.cumsum([len(row) for row in logits])
    columns = [np.arange(end - len(row), end) for row, end in zip(logits, ends, strict=True)]
    return by_columns(logits, columns, weights, int(ends[-1]))


def by_columns(
    logits: Sequence[NDArray[Any]], columns: Sequence[NDArray[np.int64]], weights: Scores, count: int
) -> Scores:
    """Each voter scores some of the labels: probability of a label = sum over those that score it of the voter's weight
    · probability among what it scores.

    logits, columns: an array a voter, of the labels that it scores, and which of all `count` these are. Returns the
    logarithms f64[count], -inf for a label that nobody scores. Our reconstruction.
    """
    scores = np.full(count, -np.inf)
    with np.errstate(divide="ignore"):
        for row, own, weight in zip(logits, columns, weights, strict=True):
            scores[own] = np.logaddexp(scores[own], np.log(weight) + np.log(probabilities(row)))
    return scores


def probabilities(scores: NDArray[Any]) -> Scores:
    """Softmax f64[C]."""
    shifted = np.exp(np.asarray(scores, dtype=np.float64) - np.max(scores))
    return np.asarray(shifted / shifted.sum())
