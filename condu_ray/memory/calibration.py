"""How remembered Gaussians follow an encoder that moved, told from the current pictures seen by both encoders.

Every mode is an affine map z -> A z + a of features, applied to a mean as A μ + a and to a covariance as A Σ Aᵀ.
The outline (statistics calibrated across successive encoders by optimal transport) is that of DMC-OT, arXiv 2511.10974,
whose method section could not be read; that its transport is the closed form between Gaussians is our reconstruction.

    none    the statistics stay
    mean    the mean drift of the current pictures is added
    sdc     the same, weighted by how near a picture is to the class (Yu et al., arXiv 2004.00440)
    ot      the Monge map between two Gaussians (textbook): exact where the drift is symmetric and positive definite. It
            compares two distributions and not a picture with itself, so it cannot see a rotation
    linear  ridge regression of the new features on the old, pulled to the identity: exact for every affine drift (ours;
            SLDC, arXiv 2511.09926, has a regularised operator for the same purpose)

Legend: N pictures, D width of a feature. Float64 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from condu_ray.errors import TrainingError
from condu_ray.memory.gaussians import Gaussians, shrunk
from condu_ray.memory.moments import FLOOR, Features, Kind, Matrix, covariance, distance, root, roots, symmetric

Mode = Literal["none", "mean", "sdc", "ot", "linear"]
MODES: tuple[Mode, ...] = get_args(Mode)

HELD_OUT = 0.1


class Calibration(Protocol):
    """How what the encoder before gave becomes what the encoder after should give."""

    def features(self, values: Features) -> Matrix:
        """[..., D] -> f64[..., D]."""

    def gaussians(self, before: Gaussians) -> Gaussians:
        """Every mean moves as a picture would."""


@dataclass(frozen=True, eq=False)
class Affine:
    """z -> A z + a. matrix: A f64[D, D]; shift: a f64[D]."""

    matrix: Matrix
    shift: Matrix

    def features(self, values: Features) -> Matrix:
        moved: Matrix = values @ self.matrix.T + self.shift
        return moved

    def gaussians(self, before: Gaussians) -> Gaussians:
        return before.moved(self.matrix, self.shift)

    def partly(self, strength: float) -> Affine:
        """The share `strength` of the way: (1 - ρ) z + ρ (A z + a). For `ot` this is displacement interpolation."""
        return Affine((1 - strength) * np.eye(len(self.shift)) + strength * self.matrix, strength * self.shift)


@dataclass(frozen=True, eq=False)
class Semantic:
    """Semantic drift compensation: what the pictures near a mean drifted by, weighted by exp(-‖z - μ‖² / 2σ²).

    before, drift: f64[N, D]. width: σ². strength: the share of the drift that is added.
    """

    before: Matrix
    drift: Matrix
    width: float
    strength: float = 1.0

    def features(self, values: Features) -> Matrix:
        rows = np.asarray(values, np.float64)
        apart = (rows**2).sum(-1)[..., None] - 2 * rows @ self.before.T + (self.before**2).sum(1)
        near = -apart / (2 * self.width)
        weights = np.exp(near - near.max(axis=-1, keepdims=True))  # of the nearest 1, so that they never all vanish
        moved: Matrix = rows + self.strength * (weights / weights.sum(axis=-1, keepdims=True)) @ self.drift
        return moved

    def gaussians(self, before: Gaussians) -> Gaussians:
        return replace(before, means=self.features(before.means))


def fit(
    mode: Mode,
    before: Features,
    after: Features,
    labels: NDArray[np.int64],
    *,
    shrinkage: float = 0.01,
    strength: float = 1.0,
    kind: Kind = "within",
    diagonal: bool = False,
) -> Calibration:
    """The calibration that pictures tell which both encoders saw: before, after [N, D], rows paired; labels i64[N].

    shrinkage: `ot`: of both covariances (`convex`); `linear`: the ridge, in units of the mean variance. strength: how
    much of the way statistics move. kind: which covariances `ot` compares; those within classes say nothing of how the
    current classes lie to each other, which old classes do not share; of one picture a class there are only pooled
    ones. diagonal: `ot` of variances alone, for memories that keep no more. Raises TrainingError where what `ot` looks
    at cannot be inverted (`roots`, `scaling`).
    """
    one, two = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if mode == "none":
        return Affine(np.eye(one.shape[1]), np.zeros(one.shape[1]))
    if mode == "sdc":
        return Semantic(one, two - one, max(np.trace(covariance(one, labels)) / 2, 1e-300), strength)
    if mode == "mean":
        matrix = np.eye(one.shape[1])
    elif mode == "linear":
        matrix = regression(one, two, shrinkage)
    else:
        spread = len(np.unique(labels)) < len(labels)  # one picture a class says nothing of what is within it
        of = labels if kind == "within" and spread else None
        pair = [shrunk(covariance(each, of), "convex", shrinkage) for each in (one, two)]
        matrix = scaling(*pair) if diagonal else transport(*pair)
    return Affine(matrix, two.mean(axis=0) - matrix @ one.mean(axis=0)).partly(strength)


def transport(before: Matrix, after: Matrix) -> Matrix:
    """The symmetric A with A S₁ A = S₂: S₁^-½ (S₁^½ S₂ S₁^½)^½ S₁^-½, the optimal map between centred Gaussians."""
    half, inverse = roots(before)
    return symmetric(inverse @ root(half @ after @ half) @ inverse)


def scaling(before: Matrix, after: Matrix) -> Matrix:
    """The same where only the variances are looked at. Raises TrainingError where one of those before is 0."""
    one, two = np.diag(before), np.diag(after)
    if not (one > 0).all():
        raise TrainingError(
            "some variances of features are 0, so they cannot be scaled",
            "shrink them more (--dmc.shrinkage), or learn more pictures a task",
        )
    return np.diag(np.sqrt(two / one))


def regression(before: Features, after: Features, ridge: float, only_symmetric: bool = False) -> Matrix:
    """The A that makes ‖Z₂ - A Z₁‖² + λ ‖A - I‖² least, of centred pictures; λ is `ridge` times their mean variance.

    only_symmetric: least among the symmetric A, where A (C₁₁ + λI) + (C₁₁ + λI) A is twice the symmetric part of
    C₂₁ + λI. Where no picture says anything, A is the identity.
    """
    one = np.asarray(before, np.float64) - np.mean(before, axis=0, dtype=np.float64)
    two = np.asarray(after, np.float64) - np.mean(after, axis=0, dtype=np.float64)
    own, cross = one.T @ one, two.T @ one
    pull = ridge * np.trace(own) / len(own) * np.eye(len(own))
    change: Matrix
    if only_symmetric:
        # Of the change A - I, entry by entry in the eigenbasis of C₁₁ + λI.
        values, vectors = linalg.eigh(own + pull)
        sums = values[:, None] + values
        told = vectors.T @ (2 * symmetric(cross - own)) @ vectors
        change = np.divide(told, sums, out=np.zeros_like(told), where=sums > FLOOR * values[-1])
        return np.eye(len(own)) + symmetric(vectors @ change @ vectors.T)
    # (A - I)(C₁₁ + λI) = C₂₁ - C₁₁
    change = linalg.lstsq(own + pull, (cross - own).T)[0].T
    return np.eye(len(own)) + change


@dataclass(frozen=True)
class Drift:
    """What the features of the current pictures did between two encoders, told on a tenth that was held out.

    residuals: mode -> ‖Z₂ - (A Z₁ + a)‖² / ‖Z₂ - Z₁‖², 1: no better than `none`. shift, symmetric, rotation: shares of
    ‖Z₂ - Z₁‖² that a translation explains, the best symmetric map further, and the best linear map further; the rest is
    not linear, or noise. relative: ‖Z₂ - Z₁‖ / ‖Z₁ - mean‖.
    """

    residuals: Mapping[Mode, float]
    shift: float
    symmetric: float
    rotation: float
    relative: float

    @property
    def rest(self) -> float:
        return 1 - self.shift - self.symmetric - self.rotation


def measure(
    before: Features,
    after: Features,
    labels: NDArray[np.int64],
    seed: int,
    *,
    shrinkage: float = 0.01,
    kind: Kind = "within",
) -> Drift:
    """Fits every mode on nine tenths of the pictures and looks at the last. Arguments as those of `fit`. Raises
    TrainingError for features that are not finite.

    A mode that cannot be fitted counts as no better than `none`. Read the residual of `ot` against that of `linear`: a
    large gap says that the drift has a part that `ot` cannot see.
    """
    one, two = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise TrainingError("the features of some pictures are not finite", "train with a smaller --train.lr")
    held = np.zeros(len(one), bool)
    held[np.random.default_rng([seed, len(one)]).permutation(len(one))[: max(1, round(HELD_OUT * len(one)))]] = True
    rest = ~held if held.sum() < len(held) else held
    moved = float(((two - one)[held] ** 2).sum())
    left: dict[Mode, float] = {}
    for mode in MODES:
        try:
            found = fit(mode, one[rest], two[rest], labels[rest], shrinkage=shrinkage, kind=kind)
            left[mode] = _residual(found, one, two, held)
        except TrainingError:
            left[mode] = moved
    matrix = regression(one[rest], two[rest], shrinkage, only_symmetric=True)
    best = Affine(matrix, two[rest].mean(axis=0) - matrix @ one[rest].mean(axis=0))
    spread = float(((one - one.mean(axis=0))[held] ** 2).sum())
    if moved == 0:
        return Drift(dict.fromkeys(MODES, 1.0), 0.0, 0.0, 0.0, 0.0)
    even = _residual(best, one, two, held)
    return Drift(
        {mode: value / moved for mode, value in left.items()},
        shift=1 - left["mean"] / moved,
        symmetric=(left["mean"] - even) / moved,
        rotation=(even - left["linear"]) / moved,
        relative=float(np.sqrt(moved / spread)) if spread else 0.0,
    )


def best_mode(drift: Drift) -> Mode:
    """The mode with the smallest residual; of equals the simplest."""
    return min(MODES, key=lambda mode: drift.residuals[mode])


def _residual(calibration: Calibration, before: Matrix, after: Matrix, held: NDArray[np.bool_]) -> float:
    return float(((after[held] - calibration.features(before[held])) ** 2).sum())


def distances(calibration: Calibration, before: Features, after: Features) -> tuple[float, float]:
    """W₂ of the current pictures' Gaussians under both encoders: (as they are, once those before are calibrated)."""
    one, two = np.asarray(before, np.float64), np.asarray(after, np.float64)
    moved = calibration.features(one)
    target = two.mean(axis=0), covariance(two)
    return (
        distance(one.mean(axis=0), covariance(one), *target),
        distance(moved.mean(axis=0), covariance(moved), *target),
    )
