"""Pulls a newly trained adapter back towards the one before, less where much changed.

    W_old = Q R        D = Qᵀ (W_new − W_old)        W = W_old + Q (M ∘ D)

svd: Q = U of W_old = U diag(σ) Vᵀ, as in RAPF's public code (arXiv 2407.14143), with `element` weights. qr: that a QR
decomposition fuses the parameters is published (CalFuse, arXiv 2503.18672); which matrix is decomposed and how weights
arise is our reconstruction: RAPF's rule in that basis. identity, `direction` and `constant` are ours.

Legend: D width of a feature; row j of D is what changed along direction q_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError

Basis = Literal["qr", "svd", "identity", "none"]
Weights = Literal["element", "direction", "constant"]
Doubles = NDArray[np.float64]

UNCHANGED = 1e-12
TRUSTED = 1e-6  # of the largest |R_jj|: directions below it hang on the last bits of W_old
APART = 1e-6  # of the largest singular value, the least spread that makes U a basis of W_old


@dataclass(frozen=True, eq=False)
class FusedAdapter:
    """weight f64[D, D]. mean_weight: mean of M, the share of the change that was taken over; whole: share of M at 1."""

    weight: Doubles
    mean_weight: float
    whole: float


def fuse(old: NDArray[Any], new: NDArray[Any], bias: float, basis: Basis, weights: Weights) -> FusedAdapter:
    """Adapters [D, D] fused in float64; `bias` b in [0, 1] is the least share of a change that is taken over.

    element: M_ij = min(1, |D_ij| / max |D| + b). direction: the same for lengths of rows. constant: b. Basis none: the
    new adapter as it is. Raises FusionError for shapes that differ, for values that are not finite, and for `svd` of an
    adapter whose singular values are all equal, which leaves U open.
    """
    before, after = np.asarray(old, np.float64), np.asarray(new, np.float64)
    if before.shape != after.shape or before.ndim != 2 or before.shape[0] != before.shape[1]:
        raise FusionError(f"adapters of shapes {before.shape} and {after.shape} do not fuse", "give two of one square")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise FusionError("an adapter holds NaN or infinity", "train with a smaller --adapter.lr")
    change = after - before
    if basis == "none":
        return FusedAdapter(after, 1.0, 1.0)
    if np.abs(change).max() <= UNCHANGED:
        return FusedAdapter(before, 1.0, 1.0)
    if weights == "constant":
        return FusedAdapter(before + bias * change, bias, float(bias == 1))
    if basis == "qr":
        return _by_qr(before, change, bias, weights)
    turn = np.eye(len(before)) if basis == "identity" else _left_singular(before)
    return _in_basis(before, change, turn, bias, weights)


def _by_qr(before: Doubles, change: Doubles, bias: float, weights: Weights) -> FusedAdapter:
    q, r = positive_qr(before)
    size = np.abs(np.diag(r))
    kept = size > TRUSTED * size.max()
    if kept.all():
        return _in_basis(before, change, q, bias, weights)
    return _beside_a_rest(before, change, q[:, kept], bias)


def _in_basis(before: Doubles, change: Doubles, turn: Doubles, bias: float, weights: Weights) -> FusedAdapter:
    turned = turn.T @ change
    size = np.abs(turned) if weights == "element" else np.linalg.norm(turned, axis=1, keepdims=True)
    share = np.minimum(1.0, size / size.max() + bias)
    return FusedAdapter(before + turn @ (share * turned), float(share.mean()), float((share == 1).mean()))


def _beside_a_rest(before: Doubles, change: Doubles, trusted: Doubles, bias: float) -> FusedAdapter:
    """Where W_old lacks rank, its last directions are arbitrary: they count as one, and the rest goes by direction."""
    turned = trusted.T @ change
    rest = change - trusted @ turned
    size = np.array([*np.linalg.norm(turned, axis=1), np.linalg.norm(rest)])
    share = np.minimum(1.0, size / size.max() + bias)
    fused = before + trusted @ (share[:-1, None] * turned) + share[-1] * rest
    return FusedAdapter(fused, float(share.mean()), float((share == 1).mean()))


def positive_qr(matrix: Doubles) -> tuple[Doubles, Doubles]:
    """Q R with a diagonal of R that is not negative, so that the same matrix has the same Q."""
    q, r = np.linalg.qr(matrix)
    signs = np.where(np.diag(r) < 0, -1.0, 1.0)
    return q * signs, r * signs[:, None]


def _left_singular(matrix: Doubles) -> Doubles:
    u, sizes, _ = np.linalg.svd(matrix)
    if sizes[0] - sizes[-1] <= APART * sizes[0]:
        raise FusionError(
            "the singular values of the adapter before are all equal, so that they name no directions",
            "use --adapter.basis qr, or --adapter.init default",
        )
    return np.asarray(u)
