"""One Gaussian a class over the raw features of an encoder: fitted, joined, shrunk, moved, drawn from.

Mean, sample covariance plus a ridge of 1e-4, and the shrinkage `rapf` as read in RAPF's public code (arXiv 2407.14143);
`convex` shrinkage, diagonal covariances and the seeds of draws are our reconstruction. Everything is float64 inside.

Legend: N pictures, C classes, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import DataError

Covariance = Literal["full", "diagonal"]
Shrinkage = Literal["rapf", "convex", "none"]
RIDGE = 1e-4

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gaussians:
    """Statistics of C classes; immutable.

    counts i64[C]. means f64[C, D]. scatter: centred second moments (sums of squares about the mean), f64[C, D, D], or
    f64[C, D] where only the diagonal is kept.
    """

    counts: NDArray[np.int64]
    means: Doubles
    scatter: Doubles

    @staticmethod
    def fit(
        features: NDArray[Any], labels: NDArray[np.int64], classes: int, covariance: Covariance = "full"
    ) -> Gaussians:
        """Statistics of raw features [N, D] with labels i64[N] in 0 .. classes − 1; without pictures a count is 0."""
        values = np.asarray(features, np.float64)
        counts = np.bincount(labels, minlength=classes).astype(np.int64)
        width = values.shape[1]
        means = np.zeros((classes, width))
        scatter = np.zeros((classes, width) if covariance == "diagonal" else (classes, width, width))
        for label in np.flatnonzero(counts):
            own = values[labels == label]
            means[label] = own.mean(axis=0)
            centred = own - means[label]
            scatter[label] = (centred**2).sum(axis=0) if covariance == "diagonal" else centred.T @ centred
        return Gaussians(counts, means, scatter)

    @staticmethod
    def joined(parts: Sequence[Gaussians]) -> Gaussians:
        """The classes of all parts, one after another."""
        arrays = zip(*((each.counts, each.means, each.scatter) for each in parts), strict=True)
        return Gaussians(*(np.concatenate(each) for each in arrays))

    @property
    def diagonal(self) -> bool:
        return self.scatter.ndim == 2

    def covariance(self, label: int, shrinkage: Shrinkage = "none", gamma: float = 0.1) -> Doubles:
        """Σ of a class f64[D, D], or its diagonal f64[D]: sample covariance + 1e-4 I, shrunk; finite for one picture.

        rapf: Σ + m_d I + m_o (11ᵀ − I), m_d the mean of the diagonal, m_o that of the non-zero rest; doubles the trace.
        convex: (1 − γ) Σ + γ (tr Σ / D) I; keeps it.
        """
        width = self.means.shape[1]
        sample = self.scatter[label] / max(1, int(self.counts[label]) - 1)
        if self.diagonal:
            sample = sample + RIDGE
            if shrinkage == "rapf":
                return np.asarray(sample + sample.mean())
            return np.asarray((1 - gamma) * sample + gamma * sample.mean() if shrinkage == "convex" else sample)
        return shrunk(sample + RIDGE * np.eye(width), shrinkage, gamma)

    def moved(self, matrix: Doubles, offset: Doubles) -> Gaussians:
        """The statistics of the features z ↦ Az + a, A f64[D, D]: means Aμ + a, covariances AΣAᵀ (or its diagonal)."""
        means = self.means @ matrix.T + offset
        if self.diagonal:
            return replace(self, means=means, scatter=self.scatter @ (matrix**2).T)
        turned = matrix @ self.scatter @ matrix.T
        return replace(self, means=means, scatter=(turned + turned.transpose(0, 2, 1)) / 2)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, for the store: statistics in float32."""
        return {
            "counts": self.counts,
            "means": self.means.astype(np.float32),
            "scatter": self.scatter.astype(np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Gaussians:
        """The inverse of `arrays`, up to their rounding."""
        return cls(arrays["counts"], arrays["means"].astype(np.float64), arrays["scatter"].astype(np.float64))


def shrunk(covariance: Doubles, shrinkage: Shrinkage, gamma: float) -> Doubles:
    """A covariance f64[D, D] shrunk as `Gaussians.covariance` says."""
    width = len(covariance)
    if shrinkage == "convex":
        return np.asarray((1 - gamma) * covariance + gamma * np.trace(covariance) / width * np.eye(width))
    if shrinkage == "none":
        return covariance
    rest = covariance[~np.eye(width, dtype=bool)]
    rest = rest[rest != 0]
    beside = float(rest.mean()) if len(rest) else 0.0
    return np.asarray(covariance + (np.trace(covariance) / width - beside) * np.eye(width) + beside)


class Sampler:
    """Draws features of classes; the same key and class give the same draws, whoever asks and in whatever order."""

    def __init__(self, gaussians: Gaussians, shrinkage: Shrinkage, gamma: float) -> None:
        self._gaussians, self._shrinkage, self._gamma = gaussians, shrinkage, gamma
        self._roots: dict[int, Doubles] = {}

    def draw(self, label: int, count: int, key: Sequence[int]) -> NDArray[np.float32]:
        """f32[count, D]: μ + Lε with LLᵀ = Σ. key: say (seed, session, epoch, step).

        Raises DataError for a class without statistics.
        """
        if not self._gaussians.counts[label]:
            raise DataError(f"class {label} has no pictures, so there is nothing to draw from", "give it some pictures")
        random = np.random.default_rng([*key, label])
        noise = random.standard_normal((count, self._gaussians.means.shape[1]))
        root = self._root(label)
        spread: Doubles = noise * root if root.ndim == 1 else noise @ root.T
        return np.asarray(self._gaussians.means[label] + spread, np.float32)

    def _root(self, label: int) -> Doubles:
        if label not in self._roots:
            covariance = self._gaussians.covariance(label, self._shrinkage, self._gamma)
            root = np.sqrt(covariance) if covariance.ndim == 1 else np.linalg.cholesky(covariance)
            self._roots[label] = np.asarray(root, np.float64)
        return self._roots[label]
