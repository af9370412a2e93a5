"""From the fused state back to one task's delta, and how much of the trained one is left in it (fidelity)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import Span, blank_gaps, blocks, group_of, spans
from condu_ray.fusion.kernels import restore_span
from condu_ray.fusion.layout import Layout, as_f32
from condu_ray.fusion.state import FusionState, checked
from condu_ray.fusion.threads import each


@dataclass(frozen=True)
class Fidelity:
    """How near a reconstruction is to the delta as trained.

    relative_l2: norm of the difference over norm of the delta (0 is exact, 1 is as far as the base model). cosine: of
    the angle between them. bits_alive: share of the delta's non-zero coordinates that still have their mask bit.
    A delta of zeros has nothing to lose: 0, 1, 1.
    """

    relative_l2: float
    cosine: float
    bits_alive: float


def reconstruct(
    state: FusionState, task: str, out: NDArray[np.float32] | None = None, threads: int | None = None
) -> NDArray[np.float32]:
    """The task's delta as the fused state holds it, f32[total]: rescaler * u where the mask bit is set, else +0.

    out: f32[total] to write into. Raises FusionError for an unknown task or another shape or dtype of `out`.
    """
    vector = checked(np.empty(state.layout.total, np.float32) if out is None else out, state.layout.total)
    _restore(state, task, vector, False, threads)
    return blank_gaps(state.layout, vector)


def add_to(state: FusionState, task: str, start: NDArray[np.float32]) -> None:
    """Adds the task's delta to f32[total] in place, in one pass: θ⁰ becomes the task's expert.

    Raises FusionError for an unknown task or another shape or dtype of `start`.
    """
    _restore(state, task, checked(start, state.layout.total), True, None)


def _restore(state: FusionState, task: str, out: NDArray[np.float32], adding: bool, threads: int | None) -> None:
    rescalers = state.tasks[state.position(task)].rescalers

    def one(span: Span) -> None:
        here = slice(span.start, span.stop)
        mask = state.mask_plane(task, slice(span.start // 8, span.stop // 8))
        restore_span(state.layout, span, state.u[here], mask, rescalers, out[here], adding)

    each(one, spans(state.layout, state.granularity), threads)


def fidelity(state: FusionState, task: str, delta: Any) -> Fidelity:
    """Compares the task's reconstruction with its delta as trained. delta: f32[total]. Sums are taken in float64."""
    vector = as_f32(delta)
    if vector.shape != (state.layout.total,):
        raise FusionError(f"the delta of task {task!r} has shape {vector.shape}, not ({state.layout.total},)")
    restored, mask = reconstruct(state, task), state.mask(task)
    sums = np.zeros(6)
    for block in blocks(state.layout, state.granularity):
        here = slice(block.start, block.stop)
        sums += _sums(vector[here], restored[here], mask[here])
    return _fidelity(sums)


def probe_coordinates(layout: Layout, count: int = 65_536, seed: int = 0) -> NDArray[np.int64]:
    """Coordinates at which a delta is kept so that its fidelity can be estimated later: int64[count], ascending.

    One uniform draw from each of `count` equal strata of the parameters; all of them where there are no more. Never
    padding. The same for every task, NumPy release and machine (raw words of PCG64).
    """
    sizes = np.array([entry.size for entry in layout.entries], np.int64)
    ends = np.cumsum(sizes)
    parameters = int(ends[-1])
    if count >= parameters:
        chosen = np.arange(parameters, dtype=np.int64)
    else:
        edges = np.arange(count + 1, dtype=np.int64) * parameters // count
        words = np.random.PCG64(seed).random_raw(count)
        chosen = edges[:-1] + (words % np.diff(edges).astype(np.uint64)).astype(np.int64)
    tensor = np.searchsorted(ends, chosen, side="right")
    return layout.offsets[tensor] + chosen - (ends - sizes)[tensor]


def fidelity_at(state: FusionState, task: str, coordinates: NDArray[np.int64], values: Any) -> Fidelity:
    """Estimate of `fidelity` from the delta's values at some coordinates. values: f32[n], delta[coordinates]."""
    position, kept = state.position(task), as_f32(values)
    if kept.shape != coordinates.shape or kept.ndim != 1:
        raise FusionError(f"task {task!r}: {list(kept.shape)} values for {list(coordinates.shape)} coordinates")
    mask = (state.mask_plane(task, coordinates // 8) >> (coordinates % 8).astype(np.uint8)) & np.uint8(1) != 0
    scale = state.tasks[position].rescalers[group_of(state.layout, state.granularity, coordinates)]
    restored = np.where(mask, state.u[coordinates] * scale, np.float32(0))
    return compare(kept, restored, mask)


def compare(delta: NDArray[np.float32], restored: NDArray[np.float32], mask: NDArray[np.bool_]) -> Fidelity:
    """Fidelity of values that were restored, one by one. delta, restored: f32[n]; mask: bool[n], bits that are set."""
    return _fidelity(_sums(delta, restored, mask))


def _sums(delta: NDArray[np.float32], restored: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[squared difference, product, squared delta, squared reconstruction, bits, non-zero coordinates], summed."""
    wide, theirs = delta.astype(np.float64), restored.astype(np.float64)
    there = delta != 0
    return np.array(
        [
            np.square(wide - theirs).sum(),
            (wide * theirs).sum(),
            np.square(wide).sum(),
            np.square(theirs).sum(),
            np.count_nonzero(mask & there),
            np.count_nonzero(there),
        ]
    )


def _fidelity(sums: NDArray[np.float64]) -> Fidelity:
    difference, product, own, theirs, bits, there = (float(value) for value in sums)
    if own == 0:
        return Fidelity(0.0, 1.0, 1.0)
    cosine = product / math.sqrt(own * theirs) if theirs > 0 else 0.0
    return Fidelity(math.sqrt(difference / own), cosine, bits / there)
