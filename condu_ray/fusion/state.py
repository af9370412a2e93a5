"""What is kept of all tasks between sessions, in memory and as named arrays.

On disk everything is append-only. A session writes u anew and adds one bit plane for the new task (its birth) and one
for the bits that all older tasks lost (its flips); the mask of task i is birth_i and not (flips_i+1 or ... or flips_T).
In memory the masks are packed besides, eight tasks in a byte a coordinate, so that a session is one pass over them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError, nearest
from condu_ray.fusion.groups import check_granularity, group_count
from condu_ray.fusion.layout import Layout

if TYPE_CHECKING:
    from condu_ray.config import Granularity

Plane = NDArray[np.uint8]
"""uint8[total / 8]: one bit a coordinate, least significant bit first."""

Objects = dict[str, dict[str, NDArray[Any]]]

LARGEST_NORM = 1e25
"""Deltas beyond this are refused: below it no product of rescaler and u can leave float32, in any granularity."""

_CHUNK = 1 << 17  # bytes of a plane worked on at once: a million coordinates


@dataclass(frozen=True, eq=False)
class Task:
    """One task's trigger. uid: number of the session that added it, never used again in a lineage.

    norms: f64[G], of the original delta, written once. rescalers: f32[G], of the newest session. birth: the mask bits
    at the session that added the task.
    """

    name: str
    uid: int
    norms: NDArray[np.float64]
    rescalers: NDArray[np.float32]
    birth: Plane


@dataclass(frozen=True, eq=False)
class FusionState:
    """All tasks in one vector. Every change makes a new state; arrays are shared between states, so write into none.

    u: f32[total], finite, without -0.0. tasks: in the order learned. flips: by uid of the session, for every session
    after that of the oldest task. packed: uint8[ceil(T / 8), total], bit t % 8 of packed[t // 8] is the mask of
    tasks[t]. next_uid: of the next session. forgotten: uids dropped since u was written, ascending.
    """

    layout: Layout
    granularity: Granularity
    u: NDArray[np.float32]
    tasks: tuple[Task, ...]
    flips: Mapping[int, Plane]
    packed: NDArray[np.uint8]
    next_uid: int
    forgotten: tuple[int, ...] = ()

    @classmethod
    def empty(cls, layout: Layout, granularity: Granularity) -> FusionState:
        """The state before the first task. Raises FusionError for an unknown granularity."""
        check_granularity(granularity)
        nothing = np.zeros((0, layout.total), np.uint8)
        return cls(layout, granularity, np.zeros(layout.total, np.float32), (), {}, nothing, 0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def position(self, task: str) -> int:
        """Index of a task in the order learned. Raises FusionError for an unknown name."""
        return position_of(task, self.names)

    def mask(self, task: str) -> NDArray[np.bool_]:
        """The task's mask now, bool[total]; False on padding."""
        position = self.position(task)
        bits = self.packed[position // 8] & np.uint8(1 << position % 8)
        mask: NDArray[np.bool_] = bits.astype(np.bool_)
        return mask

    def mask_plane(self, task: str) -> Plane:
        """The task's mask now as a bit plane, uint8[total / 8]."""
        return np.packbits(self.mask(task), bitorder="little")


def meta(state: FusionState) -> dict[str, Any]:
    """What is small in a state, as JSON: order and uids of the tasks, granularity, next uid, digest of the layout."""
    return {
        "forgotten": list(state.forgotten),
        "granularity": state.granularity,
        "layout": state.layout.digest,
        "next_uid": state.next_uid,
        "tasks": [{"name": task.name, "uid": task.uid} for task in state.tasks],
    }


def objects(state: FusionState) -> Objects:
    """What a store has to hold: object name -> array name -> array. A state before its first session needs nothing.

        u-<uid>           u         f32[total]           rescalers-<uid>   rescalers  f32[T, G]
        birth-<uid>       birth     uint8[total / 8]                       meta       uint8, `meta(state)` as JSON
                          norms     f64[G]               flips-<uid>       flips      uint8[total / 8]

    Along one lineage the same name always means the same bytes, so an object that is stored already need not be written
    again. A forget changes rescalers-<uid> alone, which then is called rescalers-<uid>-without-<uid>-<uid>...
    """
    if state.next_uid == 0:
        return {}
    newest = state.next_uid - 1
    groups = group_count(state.layout, state.granularity)
    rescalers = [task.rescalers for task in state.tasks]
    small = json.dumps(meta(state), sort_keys=True, separators=(",", ":")).encode()
    found: Objects = {
        f"u-{newest}": {"u": state.u},
        _rescalers_name(newest, state.forgotten): {
            "rescalers": np.array(rescalers, np.float32).reshape(len(rescalers), groups),
            "meta": np.frombuffer(small, np.uint8),
        },
    }
    for task in state.tasks:
        found[f"birth-{task.uid}"] = {"birth": task.birth, "norms": task.norms}
    for uid, plane in state.flips.items():
        found[f"flips-{uid}"] = {"flips": plane}
    return found


def load(layout: Layout, granularity: Granularity, objects: Mapping[str, Mapping[str, NDArray[Any]]]) -> FusionState:
    """The state that `objects` describes, equal to the bit; objects of other names are left alone.

    Arrays may be read-only and memory-mapped; they are used in place. Raises FusionError naming the object that is
    missing, of the wrong size, or made with another layout or granularity.
    """
    check_granularity(granularity)
    found = [name for name in objects if name.startswith("rescalers-")]
    if not found and not any(name.startswith(("u-", "birth-", "flips-")) for name in objects):
        return FusionState.empty(layout, granularity)
    if len(found) != 1:
        raise FusionError(f"one object 'rescalers-...' is needed, found {len(found)}", "give one version's objects")
    small = read_meta(layout, granularity, objects, found[0])
    uids = [int(task["uid"]) for task in small["tasks"]]
    newest, plane = int(small["next_uid"]) - 1, (layout.total // 8,)
    groups = group_count(layout, granularity)
    rescalers = read_array(objects, found[0], "rescalers", np.float32, (len(uids), groups))
    tasks = tuple(
        Task(
            str(task["name"]),
            uid,
            read_array(objects, f"birth-{uid}", "norms", np.float64, (groups,)),
            rescalers[position],
            read_array(objects, f"birth-{uid}", "birth", np.uint8, plane),
        )
        for position, (uid, task) in enumerate(zip(uids, small["tasks"], strict=True))
    )
    sessions = needed_flips(tasks, newest + 1)
    flips = {uid: read_array(objects, f"flips-{uid}", "flips", np.uint8, plane) for uid in sessions}
    u = read_array(objects, f"u-{newest}", "u", np.float32, (layout.total,))
    packed = pack_masks(layout, tasks, flips)
    return FusionState(layout, granularity, u, tasks, flips, packed, newest + 1, tuple(small["forgotten"]))


def needed_flips(tasks: tuple[Task, ...], next_uid: int) -> range:
    """uids of the sessions whose flips some task still needs: all after the oldest task's own."""
    return range(tasks[0].uid + 1, next_uid) if tasks else range(0)


def pack_masks(layout: Layout, tasks: tuple[Task, ...], flips: Mapping[int, Plane]) -> NDArray[np.uint8]:
    """The masks of all tasks now, uint8[ceil(T / 8), total], walking from the newest session to the oldest."""
    packed = np.zeros((-(-len(tasks) // 8), layout.total), np.uint8)
    sessions = sorted(flips, reverse=True)
    for start in range(0, layout.total // 8, _CHUNK):
        part = slice(start, min(start + _CHUNK, layout.total // 8))
        lost, later = np.zeros(part.stop - part.start, np.uint8), iter([*sessions, -1])
        session = next(later)
        for position in range(len(tasks) - 1, -1, -1):
            while session > tasks[position].uid:
                lost |= flips[session][part]
                session = next(later)
            bits = np.unpackbits(tasks[position].birth[part] & ~lost, bitorder="little")
            packed[position // 8, 8 * part.start : 8 * part.stop] |= bits << np.uint8(position % 8)
    return packed


def _rescalers_name(uid: int, forgotten: tuple[int, ...]) -> str:
    return f"rescalers-{uid}" + ("-without-" + "-".join(map(str, forgotten)) if forgotten else "")


def position_of(task: str, names: tuple[str, ...]) -> int:
    """Index of a task in the order learned. Raises FusionError for an unknown name."""
    try:
        return names.index(task)
    except ValueError:
        raise FusionError(f"task {task!r} is not in the fused state", nearest(task, names)) from None


def blank(total: int, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """f32[total] of zeros, padding too: `out` where it is given. Raises FusionError for another shape or dtype."""
    if out is None:
        return np.zeros(total, np.float32)
    if out.shape != (total,) or out.dtype != np.float32:
        raise FusionError(f"out is {out.dtype}{list(out.shape)}, expected float32[{total}]")
    out[:] = 0
    return out


def write_bits(plane: Plane, start: int, bits: NDArray[np.bool_]) -> None:
    """Sets bits from coordinate `start` on, in a plane that is still 0 there; rows need not start at a whole byte."""
    before = start % 8
    if before:
        bits = np.concatenate([np.zeros(before, np.bool_), bits])
    packed = np.packbits(bits, bitorder="little")
    plane[start // 8 : start // 8 + packed.size] |= packed


def read_meta(
    layout: Layout, granularity: str, objects: Mapping[str, Mapping[str, NDArray[Any]]], name: str
) -> dict[str, Any]:
    """What `meta` wrote, checked against the layout and granularity. Raises FusionError."""
    try:
        small: dict[str, Any] = json.loads(np.asarray(objects[name]["meta"], np.uint8).tobytes())
        theirs = {"layout": small["layout"], "granularity": small["granularity"]}
    except (KeyError, TypeError, ValueError) as error:
        raise FusionError(f"object {name!r}: its meta cannot be read ({type(error).__name__}: {error})") from error
    for word, value in {"layout": layout.digest, "granularity": granularity}.items():
        if theirs[word] != value:
            raise FusionError(
                f"object {name!r} was made with {word} {theirs[word]}, not {value}", "use its own settings"
            )
    return small


def read_array(
    objects: Mapping[str, Mapping[str, NDArray[Any]]],
    name: str,
    key: str,
    dtype: type[np.generic],
    shape: tuple[int, ...],
) -> NDArray[Any]:
    """One array of an object. Raises FusionError where it is missing or of another dtype or shape."""
    try:
        array = objects[name][key]
    except KeyError:
        raise FusionError(f"object {name!r} with array {key!r} is missing") from None
    if array.dtype != dtype or array.shape != shape:
        found, expected = f"{array.dtype}{list(array.shape)}", f"{dtype.__name__}{list(shape)}"
        raise FusionError(f"object {name!r}: {key} is {found}, expected {expected}")
    return array
