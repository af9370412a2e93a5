"""Sign triggers: a task keeps the sign of each coordinate, all tasks share the magnitudes (our reconstruction).

    n = mean |d| over a group (a row)          r = n, or as it was trained when the task was added (`with_rescalers`)
    A_j += |d_j| / n    c += 1                 u_j = A_j / c
    reconstruction: r * u_j with the task's sign; +0 where r = 0

A is uint32 fixed point, so the order in which tasks come, and any sharding, give the same bits. Normalised magnitudes
have mean 1 in each group, so u has too: no later task changes the L1 norm of a reconstruction, with r = n the delta's.
A group that is zero everywhere is skipped: r = 0, c is not raised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import Block, blocks, combine, group_count, group_of
from condu_ray.fusion.layout import Layout, as_f32, not_finite
from condu_ray.fusion.state import LARGEST_NORM, Objects, Plane, blank, position_of, read_array, read_meta, write_bits

if TYPE_CHECKING:
    from condu_ray.config import Granularity

FRACTION = 1 << 16  # of the fixed point of A
LARGEST_SUMMAND = 255 * FRACTION
MOST_TASKS = 256  # what A holds without overflow
GRANULARITIES = ("l1", "tensor", "row")


@dataclass(frozen=True, eq=False)
class SignedTask:
    """One task's trigger. uid: number of the session that added it, never used again in a lineage.

    rescalers: f32[G]. signs: one bit a coordinate, 1 where the delta is above zero.
    """

    name: str
    uid: int
    rescalers: NDArray[np.float32]
    signs: Plane


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


def unify(state: SignState, task: str, delta: Any) -> SignState:
    """The state after `task`; the given state stays as it is.

    delta: f32[total] in layout order (NumPy or torch, any floating dtype); what stands on padding is ignored. Raises
    FusionError for a name that is taken, a wrong length, NaN or Inf (naming the tensor), and the 257th task.
    """
    layout, granularity = state.layout, state.granularity
    if not task or task in state.names:
        raise FusionError(f"task {task!r} is in the fused state already" if task else "a task needs a name (found '')")
    if state.next_uid >= MOST_TASKS:
        raise FusionError(f"the fused state has taken in {MOST_TASKS} tasks, which is its limit", "start another store")
    vector = as_f32(delta)
    if vector.shape != (layout.total,):
        raise FusionError(f"the delta of task {task!r} has shape {vector.shape}, the layout needs ({layout.total},)")

    means = _means(layout, granularity, vector)
    magnitudes, signs = state.magnitudes.copy(), np.zeros(layout.total // 8, np.uint8)
    for block in blocks(layout, granularity):
        here = slice(block.start, block.stop)
        values = vector[here].reshape(block.rows, block.row_length)
        mean = means[block.rescalers : block.rescalers + block.rows, None]
        scale = np.divide(FRACTION, mean, out=np.zeros_like(mean), where=mean > 0)
        summand = np.minimum(np.rint(np.abs(values) * scale), LARGEST_SUMMAND)
        magnitudes[here] += summand.astype(np.uint32).reshape(-1)
        write_bits(signs, block.start, vector[here] > 0)
    added = SignedTask(task, state.next_uid, means.astype(np.float32), signs)
    return replace(
        state,
        magnitudes=magnitudes,
        counts=state.counts + (means > 0),
        tasks=(*state.tasks, added),
        next_uid=state.next_uid + 1,
    )


def with_rescalers(state: SignState, task: str, rescalers: Any) -> SignState:
    """The state with other rescalers for one task; the reconstruction of every other stays equal, bit for bit.

    rescalers: f32[G] (NumPy or torch, any floating dtype). Raises FusionError for an unknown task, another shape, NaN
    and Inf.
    """
    position, values = state.position(task), as_f32(rescalers)
    if values.shape != state.counts.shape:
        raise FusionError(f"task {task!r}: rescalers of shape {values.shape}, its state has {state.counts.shape}")
    if not np.isfinite(values).all():
        raise FusionError(f"task {task!r}: its rescalers hold NaN or infinity", "take those it was fused with")
    held = list(state.tasks)
    held[position] = replace(held[position], rescalers=values)
    return replace(state, tasks=tuple(held))


def reconstruct(state: SignState, task: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The task's delta as the fused state holds it, f32[total]: rescaler * u with the task's sign; +0 on padding.

    out: f32[total] to write into. Raises FusionError for an unknown task or another shape or dtype of `out`.
    """
    held, out = state.tasks[state.position(task)], blank(state.layout.total, out)
    for block in blocks(state.layout, state.granularity):
        here = slice(block.start, block.stop)
        value = out[here].reshape(block.rows, block.row_length)
        np.multiply(state.magnitudes[here].reshape(value.shape), _factors(state, held, block)[:, None], out=value)
        below = ~_bits(held.signs, block.start, block.stop)
        np.negative(out[here], out=out[here], where=below & (out[here] != 0))
    return out


def values_at(state: SignState, task: str, coordinates: NDArray[np.int64]) -> NDArray[np.float32]:
    """The task's reconstruction at some coordinates, f32[n], without making the rest."""
    held = state.tasks[state.position(task)]
    group = group_of(state.layout, state.granularity, coordinates)
    counts = np.maximum(state.counts[group], 1) * float(FRACTION)
    factor = (held.rescalers[group].astype(np.float64) / counts).astype(np.float32)
    value = (state.magnitudes[coordinates] * factor.astype(np.float64)).astype(np.float32)
    above = (held.signs[coordinates // 8] >> (coordinates % 8).astype(np.uint8)) & np.uint8(1) != 0
    found: NDArray[np.float32] = np.where(above | (value == 0), value, -value)
    return found


def forget(state: SignState, task: str) -> SignState:
    """The state without `task`; the reconstruction of every other task stays equal, bit for bit.

    What the task added to the shared magnitudes stays: they are means over all tasks ever learned, and the state does
    not keep what it would take to subtract one. Raises FusionError for an unknown name.
    """
    gone = state.tasks[state.position(task)]
    rest = tuple(other for other in state.tasks if other is not gone)
    return replace(state, tasks=rest, forgotten=tuple(sorted((*state.forgotten, gone.uid))))


def meta(state: SignState) -> dict[str, Any]:
    """What is small in a state, as JSON."""
    return {
        "forgotten": list(state.forgotten),
        "granularity": state.granularity,
        "layout": state.layout.digest,
        "next_uid": state.next_uid,
        "tasks": [{"name": task.name, "uid": task.uid} for task in state.tasks],
        "triggers": "sign",
    }


def objects(state: SignState) -> Objects:
    """What a store has to hold: object name -> array name -> array. A state before its first session needs nothing.

        magnitudes-<uid>  magnitudes  uint32[total]      signs-<uid>   signs      uint8[total / 8]
                          counts      int64[G]                         rescalers  f32[G]
        tasks-<uid>       meta        uint8, JSON

    Along one lineage the same name always means the same bytes. A forget makes tasks-<uid>-without-<uid>...
    """
    if state.next_uid == 0:
        return {}
    newest = state.next_uid - 1
    small = json.dumps(meta(state), sort_keys=True, separators=(",", ":")).encode()
    without = "-without-" + "-".join(map(str, state.forgotten)) if state.forgotten else ""
    found: Objects = {
        f"magnitudes-{newest}": {"magnitudes": state.magnitudes, "counts": state.counts},
        f"tasks-{newest}{without}": {"meta": np.frombuffer(small, np.uint8)},
    }
    for task in state.tasks:
        found[f"signs-{task.uid}"] = {"signs": task.signs, "rescalers": task.rescalers}
    return found


def load(layout: Layout, granularity: Granularity, objects: Mapping[str, Mapping[str, NDArray[Any]]]) -> SignState:
    """The state that `objects` describes, equal to the bit; objects of other names are left alone.

    Raises FusionError naming the object that is missing, of the wrong size, or made with another layout or granularity.
    """
    empty = SignState.empty(layout, granularity)
    found = [name for name in objects if name.startswith("tasks-")]
    if not found and not any(name.startswith(("magnitudes-", "signs-")) for name in objects):
        return empty
    if len(found) != 1:
        raise FusionError(f"one object 'tasks-...' is needed, found {len(found)}", "give one version's objects")
    small = read_meta(layout, granularity, objects, found[0])
    groups, newest = group_count(layout, granularity), int(small["next_uid"]) - 1
    tasks = tuple(
        SignedTask(
            str(task["name"]),
            int(task["uid"]),
            read_array(objects, f"signs-{task['uid']}", "rescalers", np.float32, (groups,)),
            read_array(objects, f"signs-{task['uid']}", "signs", np.uint8, (layout.total // 8,)),
        )
        for task in small["tasks"]
    )
    return SignState(
        layout,
        granularity,
        read_array(objects, f"magnitudes-{newest}", "magnitudes", np.uint32, (layout.total,)),
        read_array(objects, f"magnitudes-{newest}", "counts", np.int64, (groups,)),
        tasks,
        newest + 1,
        tuple(small["forgotten"]),
    )


def _means(layout: Layout, granularity: Granularity, vector: NDArray[np.float32]) -> NDArray[np.float64]:
    """f64[G]: mean |d| of each group."""
    parts: list[tuple[Block, NDArray[np.float64]]] = []
    sizes = np.zeros(group_count(layout, granularity))
    for block in blocks(layout, granularity):
        values = vector[block.start : block.stop].reshape(block.rows, block.row_length)
        sums = np.abs(values).sum(axis=1, dtype=np.float64)
        if not sums.max() <= LARGEST_NORM:
            raise not_finite(block.entry)
        parts.append((block, sums[None]))
        sizes[block.rescalers : block.rescalers + block.rows] += block.row_length
    means: NDArray[np.float64] = combine(layout, granularity, parts)[0] / sizes
    # A subnormal mean could not be divided by: such a group is as good as zero.
    return np.where(means.astype(np.float32) >= np.finfo(np.float32).tiny, means, 0.0)


def _factors(state: SignState, task: SignedTask, block: Block) -> NDArray[np.float64]:
    """f64[rows], rounded to float32: what an A of the block is multiplied by."""
    rows = slice(block.rescalers, block.rescalers + block.rows)
    counts = np.maximum(state.counts[rows], 1) * float(FRACTION)
    return (task.rescalers[rows].astype(np.float64) / counts).astype(np.float32).astype(np.float64)


def _bits(plane: Plane, start: int, stop: int) -> NDArray[np.bool_]:
    """bool[stop - start]; rows need not start at a whole byte."""
    bits = np.unpackbits(plane[start // 8 : -(-stop // 8)], bitorder="little")
    return bits[start % 8 : start % 8 + stop - start].astype(np.bool_)
