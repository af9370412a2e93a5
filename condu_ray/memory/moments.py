"""Means, covariances, roots of covariances, and how far two Gaussians are apart; symmetric and in float64 throughout.

Legend: N rows (pictures), D width of a feature.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from condu_ray.errors import TrainingError

Matrix = NDArray[np.float64]
Features = NDArray[np.floating]
"""[N, D], a row a picture."""

Kind = Literal["within", "pooled"]
"""Around each class's own mean, or around the mean of all."""

FLOOR = 1e-10
"""Least eigenvalue of a covariance that counts, in units of the largest."""


def covariance(features: Features, labels: NDArray[np.int64] | None = None) -> Matrix:
    """Sample covariance f64[D, D] of features [N, D]; with labels i64[N], around the mean of each row's class."""
    rows = np.asarray(features, np.float64)
    if labels is None:
        centred, lost = rows - rows.mean(axis=0), 1
    else:
        _, classes = np.unique(labels, return_inverse=True)
        lost = int(classes.max()) + 1
        means = np.zeros((lost, rows.shape[1]))
        np.add.at(means, classes, rows)
        centred = rows - (means / np.bincount(classes)[:, None])[classes]
    return symmetric(centred.T @ centred / max(1, len(rows) - lost))


def symmetric(matrix: Matrix) -> Matrix:
    """The symmetric part."""
    half: Matrix = (matrix + matrix.T) / 2
    return half


def roots(covariance: Matrix) -> tuple[Matrix, Matrix]:
    """(S^½, S^-½), both symmetric, from LAPACK's symmetric eigendecomposition.

    Raises TrainingError for a covariance that is not finite, or whose smallest eigenvalue is below FLOOR of the
    largest: its inverse would say more about rounding than about features.
    """
    values, vectors = _eigen(covariance)
    if not values[0] > FLOOR * values[-1]:
        raise TrainingError(
            f"the covariance of features has eigenvalues from {values[0]:.1e} to {values[-1]:.1e}, so its root has no "
            "inverse",
            "shrink it more (--dmc.shrinkage), or learn more pictures a task",
        )
    root = np.sqrt(values)
    return symmetric((vectors * root) @ vectors.T), symmetric((vectors / root) @ vectors.T)


def root(covariance: Matrix) -> Matrix:
    """S^½ of a positive semi-definite S, symmetric; what rounding made negative counts as 0."""
    values, vectors = _eigen(covariance)
    return symmetric((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def _eigen(covariance: Matrix) -> tuple[Matrix, Matrix]:
    if not np.isfinite(covariance).all():
        raise TrainingError("the covariance of features is not finite", "train with a smaller --train.lr")
    values, vectors = linalg.eigh(symmetric(covariance))
    return values, vectors


def distance(mean_a: Matrix, covariance_a: Matrix, mean_b: Matrix, covariance_b: Matrix) -> float:
    """2-Wasserstein distance of two Gaussians (Bures): W₂² = ‖m_a - m_b‖² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)."""
    half = root(covariance_a)
    cross = np.trace(root(half @ covariance_b @ half))
    squared = np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(np.sqrt(max(0.0, float(squared))))
