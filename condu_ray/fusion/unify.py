"""Adding a task to the fused state (ConDU, unifying step; one pass, our reconstruction).

    s_j  = sum of the old tasks' values + d_j              elect the sign: + if s_j > 0, else -
    u'_j = the largest magnitude among values of that sign
    mask bit = the task's value has that sign;  rescaler = norm of the task's own delta / norm of its masked u'

The norm of a delta is taken when it is learned and stored; it never drifts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import Block, Span, check_finite, combine, group_count, spans, whole
from condu_ray.fusion.kernels import Written, fuse_span
from condu_ray.fusion.layout import Layout, as_f32
from condu_ray.fusion.planes import Plane
from condu_ray.fusion.state import FusionState, Task, checked, needed_flips
from condu_ray.fusion.threads import each

if TYPE_CHECKING:
    from condu_ray.config import Granularity


class EmptyTrigger(UserWarning):
    """A task has no mask bit: its expert is the base model."""


@dataclass(frozen=True, eq=False)
class Part:
    """What a session gives for some spans that follow each other.

    u: f32[n]. birth, flips: uint8[n / 8]. sums: f64[T + 2, sums of all spans]: for each task, the new one last, the sum
    of |u| over its set bits; then the sum of |delta|.
    """

    spans: tuple[Span, ...]
    u: NDArray[np.float32]
    birth: Plane
    flips: Plane
    sums: NDArray[np.float64]

    def sums_of_blocks(self) -> Iterator[tuple[Block, NDArray[np.float64]]]:
        """(block, f64[T + 2, rows]), in the order of the blocks."""
        at = 0
        for span in self.spans:
            for block in span.blocks:
                yield block, self.sums[:, at : at + block.rows]
                at += block.rows


def unify(
    state: FusionState,
    task: str,
    delta: Any,
    out: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> FusionState:
    """The state after `task`; the given state stays as it is, unless `out` is its own u.

    delta: f32[total] in layout order (NumPy or torch, any floating dtype); what stands on padding is ignored. out:
    f32[total] for the new u; it may be `state.u`, which then is used up. threads: [all cores]; they change no bit.
    Raises FusionError for a name that is taken, a wrong length, NaN or Inf (naming the tensor; `out` then holds
    rubbish). Warns EmptyTrigger, naming the task, when a task has no bit; its rescalers are 1. Extra memory: the new u
    unless `out` is given, two bit planes, and 100 MB at most.
    """
    check(state, task)
    every = tuple(spans(state.layout, state.granularity))
    return joined(state, task, [fuse(state, task, delta, every, out, threads)])


def check(state: FusionState, task: str) -> None:
    """Raises FusionError for a name that cannot be added."""
    if not task or task in state.names:
        raise FusionError(f"task {task!r} is in the fused state already" if task else "a task needs a name (found '')")


def fuse(
    state: FusionState,
    task: str,
    delta: Any,
    some: tuple[Span, ...],
    out: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> Part:
    """The session's one pass over some spans that follow each other: all of them, or the share of one process.

    Of the state and the delta only what belongs to the spans is read, so both may be memory-mapped. out: f32[n].
    Raises FusionError for a delta of a wrong length, and for one that is not finite in these spans.
    """
    layout, first, end = state.layout, some[0].start, some[-1].stop
    vector = as_f32(delta)
    if vector.shape != (layout.total,):
        raise FusionError(f"the delta of task {task!r} has shape {vector.shape}, the layout needs ({layout.total},)")
    tasks, size = len(state.tasks), end - first
    groups = group_count(layout, state.granularity)
    rescalers = np.array([old.rescalers for old in state.tasks], np.float32).reshape(tasks, groups)
    birth, flips = np.zeros(size // 8, np.uint8), np.zeros(size // 8, np.uint8)
    planes = state.planes
    ends = np.cumsum([span.sums for span in some])
    sums = np.empty((tasks + 2, int(ends[-1])))
    u = np.empty(size, np.float32) if out is None else checked(out, size)

    def one(index: int) -> None:
        span = some[index]
        here, there = slice(span.start, span.stop), slice(span.start - first, span.stop - first)
        plane = slice(there.start // 8, there.stop // 8)
        own = sums[:, int(ends[index]) - span.sums : int(ends[index])]
        written = Written(u[there], birth[plane], flips[plane], own)
        fuse_span(layout, span, state.u[here], vector[here], planes, rescalers, written)
        check_finite(span, own[-1])

    each(one, range(len(some)), threads)
    return Part(some, u, birth, flips, sums)


def joined(state: FusionState, task: str, parts: Sequence[Part]) -> FusionState:
    """The state after `task` from the parts of its one pass, in the order of their spans and covering all of them.

    However the spans were dealt out, the result is the same to the last bit. Warns EmptyTrigger.
    """
    layout = state.layout
    sums = combined(layout, state.granularity, parts)
    norms = [*(old.norms for old in state.tasks), sums[-1]]
    new = each(lambda pair: rescale(*pair), zip(norms, sums[:-1], strict=True))
    kept = [replace(old, rescalers=new[position]) for position, old in enumerate(state.tasks)]
    uid = state.next_uid
    added = Task(task, uid, norms[-1], new[-1], whole([part.birth for part in parts]), uid)
    after = (*kept, added)
    planes = {**state.flips, uid: whole([part.flips for part in parts])}
    planes = {each: planes[each] for each in needed_flips(after, uid + 1)}
    u = whole([part.u for part in parts])
    result = FusionState(layout, state.granularity, u, after, planes, uid + 1)
    _warn_of_empty(state, result, sums[:-1])
    return result


def combined(layout: Layout, granularity: Granularity, parts: Sequence[Part]) -> NDArray[np.float64]:
    """f64[T + 2, G]: the sums of all parts, added in the order of the blocks."""
    if granularity == "row":
        every = parts[0].sums if len(parts) == 1 else np.concatenate([part.sums for part in parts], axis=1)
        if every.shape[1] == group_count(layout, granularity):  # no row is longer than a block: nothing to add
            return every
    return combine(layout, granularity, (pair for part in parts for pair in part.sums_of_blocks()))


def rescale(norms: NDArray[np.float64], masses: NDArray[np.float64]) -> NDArray[np.float32]:
    """f32[..., G] = norms of the original deltas over masses (norms of their masked u), both f64; 1 where that is 0."""
    rescalers = np.ones(norms.shape, np.float32)
    with np.errstate(over="ignore"):
        np.divide(norms, masses, out=rescalers, where=masses > 0, casting="same_kind")
    return np.minimum(rescalers, np.finfo(np.float32).max, out=rescalers)


def _warn_of_empty(before: FusionState, after: FusionState, masses: NDArray[np.float64]) -> None:
    """Warns for the new task, and for every old one that lost its last bit now. masses: f64[T, G], of u by task."""
    new = after.tasks[-1]
    for task in (after.tasks[position] for position in np.flatnonzero(~masses.any(axis=1))):
        if after.mask_plane(task.name).any():  # values too small to count
            continue
        if task is not new:
            if not before.mask_plane(task.name).any():
                continue
            why = f"task {new.name!r} outvoted its last mask bit"
        else:
            why = "the tasks before it outvoted it everywhere" if new.norms.any() else "its delta is zero everywhere"
        text = f"task {task.name!r} has an empty trigger: {why}; its expert is the base model"
        warnings.warn(text, EmptyTrigger, stacklevel=4)
