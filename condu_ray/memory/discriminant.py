"""A linear discriminant from class Gaussians, which can answer beside the class vectors of a head (ours).

    w_c = S⁻¹ μ_c        b_c = −½ μ_cᵀ S⁻¹ μ_c        w_c · f + b_c is log N(f; μ_c, S) up to what all classes share

Gaussians are of raw features, and a head sees unit ones, possibly through an adapter; so μ and the shared covariance S
are those of features that are drawn from the Gaussians and then seen as the head sees them.

Pictures that were fewer than a feature is wide leave S without full rank, and S⁻¹ would drown every other logit. So S
is of the classes with two pictures or more, N of them in C' classes, and while N − C' < D it is

    S ← s S + (1 − s) v I        s = (N − C') / D        v = tr S / D; where s = 0 the mean variance of the μ_c

Legend: C classes, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from condu_ray.memory.gaussians import Doubles, Gaussians, Sampler

DRAWS = 64  # a class, and as many mirrored at its mean, so that means are not left to chance
SHRINKAGE = 0.1  # of the shared covariance towards its diagonal
SEED = 0


def discriminant(
    gaussians: Gaussians, sampler: Sampler, seen: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(weights f32[C, D], bias f32[C]), to be added to the logits of the classes; always the same bits.

    sampler: of `gaussians`. seen: raw features f32[N, D] -> features as the head gives them. A class without pictures
    gets the mean of the others.
    """
    known = np.flatnonzero(gaussians.counts)
    features = []
    for label in known:
        drawn = sampler.draw(int(label), DRAWS, (SEED,))
        mirrored = 2 * gaussians.means[label].astype(np.float32) - drawn
        features.append(seen(np.concatenate([drawn, mirrored])))
    found = Gaussians.fit(np.concatenate(features), np.repeat(np.arange(len(known)), 2 * DRAWS), len(known))
    covariance = _shared(found, gaussians.counts[known])
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance))
    weights = np.asarray(np.linalg.solve(shrunk, found.means.T).T, np.float64)
    bias = -0.5 * (weights * found.means).sum(axis=1)
    every = np.tile(weights.mean(axis=0), (len(gaussians.counts), 1)), np.full(len(gaussians.counts), bias.mean())
    every[0][known], every[1][known] = weights, bias
    return every[0].astype(np.float32), every[1].astype(np.float32)


def _shared(found: Gaussians, pictures: NDArray[np.int64]) -> Doubles:
    """S f64[D, D] before it is shrunk towards its diagonal. pictures i64[C]: how many each class was measured on."""
    several, width = pictures > 1, found.means.shape[1]
    share = int((pictures[several] - 1).sum()) / width
    if share == 0:
        variance = found.means.var(axis=0, ddof=1).mean() if len(pictures) > 1 else 1.0
        return np.asarray(variance * np.eye(width))
    covariance: Doubles = found.scatter[several].sum(axis=0) / (several.sum() * (2 * DRAWS - 1))
    if share >= 1:
        return covariance
    return np.asarray(share * covariance + (1 - share) * np.trace(covariance) / width * np.eye(width))
