"""A linear discriminant from class Gaussians, which can answer beside the class vectors of a head (ours).

    w_c = S⁻¹ μ_c        b_c = −½ μ_cᵀ S⁻¹ μ_c        w_c · f + b_c is log N(f; μ_c, S) up to what all classes share

Gaussians are of raw features, and a head sees unit ones, possibly through an adapter; so μ and the shared covariance S
are those of features that are drawn from the Gaussians and then seen as the head sees them.

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
    covariance = found.scatter.sum(axis=0) / (len(known) * (2 * DRAWS - 1))
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(np.diag(covariance))
    weights: Doubles = np.linalg.solve(shrunk, found.means.T).T
    bias = -0.5 * (weights * found.means).sum(axis=1)
    every = np.tile(weights.mean(axis=0), (len(gaussians.counts), 1)), np.full(len(gaussians.counts), bias.mean())
    every[0][known], every[1][known] = weights, bias
    return every[0].astype(np.float32), every[1].astype(np.float32)
