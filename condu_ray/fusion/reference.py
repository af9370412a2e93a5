"""ConDU as the paper writes it: every delta dense, every sum in float64. For tests and for reading beside the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from condu_ray.fusion.layout import Layout

if TYPE_CHECKING:
    from condu_ray.config import Granularity

Mode = Literal["original", "carried"]
"""Numerator of a rescaler: the norm of the delta as trained, or (as in the released code) that of the task's
reconstruction before this session. Equal in exact arithmetic; `carried` drifts in floating point."""


@dataclass(frozen=True, eq=False)
class Dense:
    """u: f32[total]. masks: bool[T, total]. norms: f64[T, G]. rescalers: f32[T, G]."""

    u: NDArray[np.float32]
    masks: NDArray[np.bool_]
    norms: NDArray[np.float64]
    rescalers: NDArray[np.float32]


def sessions(
    layout: Layout, granularity: Granularity, deltas: list[NDArray[np.float32]], mode: Mode = "original"
) -> list[Dense]:
    """The state after each session, learning the deltas one after the other. deltas: f32[total] each, padding zero."""
    groups = norm(layout, granularity, np.zeros(layout.total)).size
    none = np.zeros((0, layout.total), np.bool_)
    state = Dense(np.zeros(layout.total, np.float32), none, np.zeros((0, groups)), np.zeros((0, groups), np.float32))
    found = []
    for delta in deltas:
        state = add(state, layout, granularity, delta, mode)
        found.append(state)
    return found


def add(
    state: Dense, layout: Layout, granularity: Granularity, delta: NDArray[np.float32], mode: Mode = "original"
) -> Dense:
    """One session: elect a sign at every coordinate, keep the largest magnitude of that sign, set masks, rescale."""
    old = reconstructions(state, layout, granularity)  # exact products
    sign = np.where(old.sum(axis=0) + delta > 0, 1.0, -1.0)
    values = np.vstack([old.astype(np.float32), delta[None]])
    agree = values * sign > 0
    u = (sign * np.where(agree, np.abs(values), 0).max(axis=0) + 0.0).astype(np.float32)

    own = norm(layout, granularity, delta.astype(np.float64))
    before = state.norms if mode == "original" else [norm(layout, granularity, value) for value in old]
    norms = np.vstack([*before, own])
    masses = np.array([norm(layout, granularity, np.where(mask, u, 0).astype(np.float64)) for mask in agree])
    rescalers = np.where(masses > 0, norms / np.where(masses > 0, masses, 1), 1).astype(np.float32)
    return Dense(u, agree, norms, rescalers)


def reconstructions(state: Dense, layout: Layout, granularity: Granularity) -> NDArray[np.float64]:
    """rescaler * mask * u for every task, f64[T, total]."""
    spread = np.ones((len(state.masks), layout.total))
    for index, entry in enumerate(layout.entries):
        here = slice(entry.offset, entry.stop)
        if granularity == "row":
            own = state.rescalers[:, layout.rows[index] : layout.rows[index + 1]]
            spread[:, here] = np.repeat(own, entry.row_length, axis=1)
        else:
            spread[:, here] = state.rescalers[:, [index if granularity == "tensor" else 0]]
    return np.where(state.masks, spread * state.u, 0.0)


def norm(layout: Layout, granularity: Granularity, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """f64[G]: the quantity that a rescaler keeps (see `groups`)."""
    tensors = [np.abs(vector[entry.offset : entry.stop]).reshape(entry.rows, -1) for entry in layout.entries]
    if granularity == "row":
        return np.concatenate([tensor.sum(axis=1) for tensor in tensors])
    if granularity == "tensor":
        return np.array([tensor.sum() for tensor in tensors])
    if granularity == "tensor_mean":
        return np.array([sum(tensor.mean() for tensor in tensors)])
    return np.array([sum(tensor.sum() for tensor in tensors)])
