"""Sign triggers: a task keeps the sign of each coordinate, all tasks share the magnitudes (ours).

    n = mean |d| over a group (a row)          r = n, or as it was trained when the task was added (`with_rescalers`)
    A_j += |d_j| / n    c += 1                 u_j = A_j / c
    reconstruction: r * u_j with the task's sign; +0 where r = 0; in some rows by a second bit instead (sizes.py)

A is uint32 fixed point, so the order in which tasks come, and any sharding, give the same bits. Normalised magnitudes
have mean 1 in each group, so u has too: no later task changes the L1 norm of a reconstruction, with r = n the delta's.
A group that is zero everywhere is skipped: r = 0, c is not raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import Span, blank_gaps, check_finite, group_count, group_of, spans, whole
from condu_ray.fusion.kernels import Levels, add_span, norm_span, restore_signed_span
from condu_ray.fusion.layout import Layout, as_f32
from condu_ray.fusion.planes import Plane
from condu_ray.fusion.sizes import Sizes, sizes_of, tensor_of
from condu_ray.fusion.state import checked, position_of
from condu_ray.fusion.threads import each

if TYPE_CHECKING:
    from condu_ray.config import Granularity

FRACTION = 1 << 16  # of the fixed point of A
LARGEST_SUMMAND = 255 * FRACTION
MOST_TASKS = 256  # what A holds without overflow
GRANULARITIES = ("l1", "tensor", "row")


@dataclass(frozen=True, eq=False)
class SignedTask:
    """One task's trigger. uid: number of the session that added it, never used again in a lineage.

    rescalers: f32[G], each one of those that `_rounded` gives. signs: one bit a coordinate, 1 where the delta is above
    zero. sizes: which groups need no shared magnitude, and what stands for it.
    """

    name: str
    uid: int
    rescalers: NDArray[np.float32]
    signs: Plane
    sizes: Sizes


@dataclass(frozen=True, eq=False)
class Part:
    """What a session gives for some spans that follow each other.

    magnitudes: uint32[n]. signs: uint8[n / 8]. means: f64[G], mean |delta|; with `row`, 0 for rows of other spans.
    """

    spans: tuple[Span, ...]
    magnitudes: NDArray[np.uint32]
    signs: Plane
    means: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SignState:
    """All tasks over one vector of magnitudes. Every change makes a new state; write into no array.

    magnitudes: uint32[total], A in units of 1 / 65536. counts: int64[G], tasks that added to a group. next_uid: of the
    next session, so how many were added, forgotten ones too. forgotten: uids dropped, ascending.
    """

    layout: Layout
    granularity: Granularity
    magnitudes: NDArray[np.uint32]
    counts: NDArray[np.int64]
    tasks: tuple[SignedTask, ...]
    next_uid: int
    forgotten: tuple[int, ...] = ()

    @classmethod
    def empty(cls, layout: Layout, granularity: Granularity) -> SignState:
        """The state before the first task. Raises FusionError for a granularity that signs do not have."""
        if granularity not in GRANULARITIES:
            raise FusionError(f"sign triggers know no granularity {granularity!r}", f"use {', '.join(GRANULARITIES)}")
        groups = group_count(layout, granularity)
        return cls(layout, granularity, np.zeros(layout.total, np.uint32), np.zeros(groups, np.int64), (), 0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def position(self, task: str) -> int:
        """Index of a task in the order learned. Raises FusionError for an unknown name."""
        return position_of(task, self.names)


def unify(
    state: SignState,
    task: str,
    delta: Any,
    out: NDArray[np.uint32] | None = None,
    threads: int | None = None,
) -> SignState:
    """The state after `task`; the given state stays as it is, unless `out` is its own magnitudes.

    delta: f32[total] in layout order (NumPy or torch, any floating dtype); what stands on padding is ignored. out:
    uint32[total] for the new magnitudes; it may be `state.magnitudes`, which then are used up. threads: [all cores];
    they change no bit. Raises FusionError for a name that is taken, a wrong length, NaN or Inf (naming the tensor;
    `out` then holds rubbish), and the 257th task.
    """
    check(state, task)
    every = tuple(spans(state.layout, state.granularity))
    return joined(state, task, [fuse(state, task, delta, every, out, threads)])


def check(state: SignState, task: str) -> None:
    """Raises FusionError for a name that cannot be added, and for the 257th task."""
    if not task or task in state.names:
        raise FusionError(f"task {task!r} is in the fused state already" if task else "a task needs a name (found '')")
    if state.next_uid >= MOST_TASKS:
        raise FusionError(f"the fused state has taken in {MOST_TASKS} tasks, which is its limit", "start another store")


def fuse(
    state: SignState,
    task: str,
    delta: Any,
    some: tuple[Span, ...],
    out: NDArray[np.uint32] | None = None,
    threads: int | None = None,
) -> Part:
    """The session's pass over some spans that follow each other: all of them, or the share of one process.

    Of the state only what belongs to the spans is read, of the delta too with granularity `row` (else the means need
    all of it). out: uint32[n]. Raises FusionError for a delta of a wrong length and for one that is not finite.
    """
    layout, granularity, first = state.layout, state.granularity, some[0].start
    vector, size = as_f32(delta), some[-1].stop - first
    if vector.shape != (layout.total,):
        raise FusionError(f"the delta of task {task!r} has shape {vector.shape}, the layout needs ({layout.total},)")
    means, scales = np.zeros((2, group_count(layout, granularity)))
    magnitudes = np.empty(size, np.uint32) if out is None else checked(out, size, np.uint32)
    signs = np.zeros(size // 8, np.uint8)

    def norm(span: Span) -> NDArray[np.float64]:
        sums = norm_span(layout, span, vector[span.start : span.stop])
        check_finite(span, sums)
        return sums

    def scale(own: slice) -> None:
        np.divide(FRACTION, means[own], out=scales[own], where=means[own] > 0)

    def add(span: Span) -> None:
        if granularity == "row":  # a row is in one span
            rows = span.groups()
            own = slice(int(rows[0]), int(rows[-1]) + 1)
            means[own] = _means([span], [norm(span)], own)
            scale(own)
        here, there = slice(span.start, span.stop), slice(span.start - first, span.stop - first)
        if out is not state.magnitudes:
            magnitudes[there] = state.magnitudes[here]
        plane = signs[there.start // 8 : there.stop // 8]
        add_span(layout, span, vector[here], scales, LARGEST_SUMMAND, magnitudes[there], plane)

    if granularity != "row":
        every, own = spans(layout, granularity), slice(0, len(means))
        means[:] = _means(every, each(norm, every, threads), own)
        scale(own)
    each(add, some, threads)
    return Part(some, magnitudes, signs, means)


def joined(state: SignState, task: str, parts: Sequence[Part]) -> SignState:
    """The state after `task` from the parts of its pass, in the order of their spans and covering all of them.

    However the spans were dealt out, the result is the same to the last bit.
    """
    if state.granularity == "row":
        means = np.zeros(len(state.counts))
        for part in parts:
            own = np.concatenate([span.groups() for span in part.spans])
            means[own] = part.means[own]
    else:
        means = parts[0].means
    signs = whole([part.signs for part in parts])
    none = Sizes.none(state.layout, state.granularity)
    trigger = SignedTask(task, state.next_uid, _rounded(means.astype(np.float32)), signs, none)
    return replace(
        state,
        magnitudes=whole([part.magnitudes for part in parts]),
        counts=state.counts + (means > 0),
        tasks=(*state.tasks, trigger),
        next_uid=state.next_uid + 1,
    )


def with_sizes(state: SignState, task: str, delta: Any) -> SignState:
    """The state in which some rows of the task have a second bit (sizes.py), paid for by its rows that are all zeros.

    delta: what the task was fused with. The reconstruction of every other task stays equal, bit for bit. Raises
    FusionError for an unknown task and a delta of a wrong length.
    """
    held, vector = state.tasks[state.position(task)], as_f32(delta)
    if vector.shape != (state.layout.total,):
        raise FusionError(f"the delta of task {task!r} has shape {vector.shape}, not ({state.layout.total},)")
    sizes = sizes_of(state.layout, state.granularity, held.rescalers, vector, None)
    return _replaced(state, replace(held, sizes=sizes))


def with_rescalers(state: SignState, task: str, rescalers: Any) -> SignState:
    """The state with other rescalers for one task; the reconstruction of every other stays equal, bit for bit.

    rescalers: f32[G] (NumPy or torch, any floating dtype), kept to 11 bits. Raises FusionError for an unknown task,
    another shape, NaN and Inf.
    """
    held, values = state.tasks[state.position(task)], as_f32(rescalers)
    if values.shape != state.counts.shape:
        raise FusionError(f"task {task!r}: rescalers of shape {values.shape}, its state has {state.counts.shape}")
    if not np.isfinite(values).all():
        raise FusionError(f"task {task!r}: its rescalers hold NaN or infinity", "take those it was fused with")
    return _replaced(state, replace(held, rescalers=_rounded(values)))


def _replaced(state: SignState, task: SignedTask) -> SignState:
    return replace(state, tasks=tuple(task if other.uid == task.uid else other for other in state.tasks))


def _rounded(rescalers: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[G] as a store holds them: in half precision, times the power of two at which the largest just fits."""
    return unhalved(*halves(rescalers))


def halves(rescalers: NDArray[np.float32]) -> tuple[NDArray[np.float16], int]:
    """(rescalers times 2 ^ shift in half precision, shift), for the store."""
    mantissa, exponent = np.frexp(np.abs(rescalers).max(initial=0))
    shift = 15 - int(exponent) - int(mantissa >= 1 - 2.0**-12)  # that far it rounds up to the next power of two
    return np.ldexp(rescalers.astype(np.float64), shift).astype(np.float16), shift


def unhalved(values: NDArray[np.float16], shift: int) -> NDArray[np.float32]:
    """The inverse of `halves`."""
    found: NDArray[np.float32] = np.ldexp(values.astype(np.float64), -shift).astype(np.float32)
    return found


def reconstruct(
    state: SignState, task: str, out: NDArray[np.float32] | None = None, threads: int | None = None
) -> NDArray[np.float32]:
    """The task's delta as the fused state holds it, f32[total]: rescaler * u with the task's sign, or rescaler * level
    in groups with a second bit; +0 on padding.

    out: f32[total] to write into. Raises FusionError for an unknown task or another shape or dtype of `out`.
    """
    vector = checked(np.empty(state.layout.total, np.float32) if out is None else out, state.layout.total)
    _restore(state, task, vector, False, threads)
    return blank_gaps(state.layout, vector)


def add_to(state: SignState, task: str, start: NDArray[np.float32]) -> None:
    """Adds the task's delta to f32[total] in place, in one pass: θ⁰ becomes the task's expert.

    Raises FusionError for an unknown task or another shape or dtype of `start`.
    """
    _restore(state, task, checked(start, state.layout.total), True, None)


def _restore(state: SignState, task: str, out: NDArray[np.float32], adding: bool, threads: int | None) -> None:
    held = state.tasks[state.position(task)]
    factors, values = _factors(state, held), _levels(state, held)

    def one(span: Span) -> None:
        here, bits = slice(span.start, span.stop), slice(span.start // 8, span.stop // 8)
        levels = Levels(held.sizes.groups, held.sizes.large[bits], values)
        shared, signs = state.magnitudes[here], held.signs[bits]
        restore_signed_span(state.layout, span, shared, factors, signs, levels, out[here], adding)

    each(one, spans(state.layout, state.granularity), threads)


def values_at(state: SignState, task: str, coordinates: NDArray[np.int64]) -> NDArray[np.float32]:
    """The task's reconstruction at some coordinates, f32[n], without making the rest."""
    held = state.tasks[state.position(task)]
    group = group_of(state.layout, state.granularity, coordinates)
    value = (state.magnitudes[coordinates] * _factors(state, held)[group]).astype(np.float32)
    second = held.sizes.groups[group]
    if second.any():
        small, large = _levels(state, held)[group].T
        value = np.where(second, np.where(_bits_at(held.sizes.large, coordinates), large, small), value)
    above = _bits_at(held.signs, coordinates)
    found: NDArray[np.float32] = np.where(above, value, -value) + np.float32(0)  # no -0.0
    return found


def forget(state: SignState, task: str) -> SignState:
    """The state without `task`; the reconstruction of every other task stays equal, bit for bit.

    What the task added to the shared magnitudes stays: they are means over all tasks ever learned, and the state does
    not keep what it would take to subtract one. Raises FusionError for an unknown name.
    """
    gone = state.tasks[state.position(task)]
    rest = tuple(other for other in state.tasks if other is not gone)
    return replace(state, tasks=rest, forgotten=tuple(sorted((*state.forgotten, gone.uid))))


def _means(some: Sequence[Span], sums: Sequence[NDArray[np.float64]], own: slice) -> NDArray[np.float64]:
    """f64: mean |d| of the groups `own`. sums: of |d|, of each span; they are added in the order of the blocks."""
    group = np.concatenate([span.groups() for span in some]) - own.start
    lengths = np.concatenate([np.full(block.rows, block.row_length) for span in some for block in span.blocks])
    groups = own.stop - own.start
    sizes = np.bincount(group, lengths, groups)
    means: NDArray[np.float64] = np.bincount(group, np.concatenate(sums), groups) / sizes
    # A subnormal mean could not be divided by: such a group is as good as zero.
    return np.where(means.astype(np.float32) >= np.finfo(np.float32).tiny, means, 0.0)


def _factors(state: SignState, task: SignedTask) -> NDArray[np.float64]:
    """f64[G], rounded to float32: what an A is multiplied by."""
    counts = np.maximum(state.counts, 1) * float(FRACTION)
    return (task.rescalers.astype(np.float64) / counts).astype(np.float32).astype(np.float64)


def _levels(state: SignState, task: SignedTask) -> NDArray[np.float32]:
    """f32[G, 2]: what a small and a large value of a group with a second bit are."""
    tensors = tensor_of(state.layout, state.granularity)
    wide = task.rescalers.astype(np.float64)[:, None] * task.sizes.levels[tensors]
    return wide.astype(np.float32)


def _bits_at(plane: Plane, coordinates: NDArray[np.int64]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (plane[coordinates // 8] >> (coordinates % 8).astype(np.uint8)) & np.uint8(1) != 0
    return found
