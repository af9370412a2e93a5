"""Adding a task to the fused state (ConDU, unifying step; one pass, our reconstruction).

    s_j  = sum of the old tasks' values + d_j              elect the sign: + if s_j > 0, else -
    u'_j = the largest magnitude among values of that sign
    mask bit = the task's value has that sign;  rescaler = norm of the task's own delta / norm of its masked u'

The norm of a delta is taken when it is learned and stored; it never drifts.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import Block, blocks, combine, group_count
from condu_ray.fusion.kernels import fuse_block
from condu_ray.fusion.layout import as_f32, not_finite
from condu_ray.fusion.state import LARGEST_NORM, FusionState, Task, needed_flips, write_bits


class EmptyTrigger(UserWarning):
    """A task has no mask bit: its expert is the base model."""


def unify(state: FusionState, task: str, delta: Any) -> FusionState:
    """The state after `task`; the given state stays as it is.

    delta: f32[total] in layout order (NumPy or torch, any floating dtype); what stands on padding is ignored. Raises
    FusionError for a name that is taken, a wrong length, NaN or Inf (naming the tensor). Warns EmptyTrigger, naming the
    task, when a task has no bit; its rescalers are 1. Extra memory: the new u and packed masks, and two bit planes.
    """
    layout, granularity = state.layout, state.granularity
    if not task or task in state.names:
        raise FusionError(f"task {task!r} is in the fused state already" if task else "a task needs a name (found '')")
    vector = as_f32(delta)
    if vector.shape != (layout.total,):
        raise FusionError(f"the delta of task {task!r} has shape {vector.shape}, the layout needs ({layout.total},)")

    groups, tasks = group_count(layout, granularity), len(state.tasks)
    rescalers = np.array([old.rescalers for old in state.tasks], np.float32).reshape(tasks, groups)
    u, packed = np.zeros(layout.total, np.float32), np.zeros((tasks // 8 + 1, layout.total), np.uint8)
    birth, flips = np.zeros(layout.total // 8, np.uint8), np.zeros(layout.total // 8, np.uint8)
    parts: list[tuple[Block, NDArray[np.float64]]] = []
    for block in blocks(layout, granularity):
        here = slice(block.start, block.stop)
        fused = fuse_block(
            block,
            state.u[here],
            vector[here],
            state.packed[:, here],
            rescalers[:, block.rescalers : block.rescalers + block.rows],
            u[here],
            packed[:, here],
        )
        if not fused.sums[-1].max() <= LARGEST_NORM:
            raise not_finite(block.entry)
        write_bits(birth, block.start, fused.born)
        write_bits(flips, block.start, fused.flipped)
        parts.append((block, fused.sums))

    sums = combine(layout, granularity, parts)
    norms = np.vstack([*(old.norms for old in state.tasks), sums[-1]])
    new = rescale(norms, sums[:-1])
    kept = [replace(old, rescalers=new[position]) for position, old in enumerate(state.tasks)]
    after = (*kept, Task(task, state.next_uid, norms[-1], new[-1], birth))
    next_uid = state.next_uid + 1
    planes = {**state.flips, state.next_uid: flips}
    planes = {uid: planes[uid] for uid in needed_flips(after, next_uid)}
    result = FusionState(layout, granularity, u, after, planes, packed, next_uid)
    _warn_of_empty(state, result)
    return result


def rescale(norms: NDArray[np.float64], masses: NDArray[np.float64]) -> NDArray[np.float32]:
    """f32[T, G] = norms of the original deltas over masses (norms of their masked u), f64[T, G]; 1 where that is 0."""
    rescalers = np.ones(norms.shape)
    np.divide(norms, masses, out=rescalers, where=masses > 0)
    return np.minimum(rescalers, np.finfo(np.float32).max).astype(np.float32)


def _warn_of_empty(before: FusionState, after: FusionState) -> None:
    """Warns for the new task, and for every old one that lost its last bit now."""
    new, first = after.tasks[-1], len(before.tasks)
    held_before, held_after = np.bitwise_or.reduce(before.packed, axis=1), np.bitwise_or.reduce(after.packed, axis=1)
    for position, task in enumerate(after.tasks):
        bit = 1 << position % 8
        if int(held_after[position // 8]) & bit:
            continue
        if position < first:
            if not int(held_before[position // 8]) & bit:
                continue
            why = f"task {new.name!r} outvoted its last mask bit"
        else:
            why = "the tasks before it outvoted it everywhere" if new.norms.any() else "its delta is zero everywhere"
        text = f"task {task.name!r} has an empty trigger: {why}; its expert is the base model"
        warnings.warn(text, EmptyTrigger, stacklevel=3)
