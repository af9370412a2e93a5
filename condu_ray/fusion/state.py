"""What is kept of all tasks between sessions, in memory and as named arrays.

Everything but u is append-only. A session writes u anew and adds one bit plane for the new task (its birth) and one for
the bits that all older tasks lost (its flips); the mask of task i is birth_i and not (flips_i+1 or ... or flips_T).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError, nearest
from condu_ray.fusion.groups import check_granularity, group_count
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.planes import Plane, Planes, grow, read_bits, shrink

if TYPE_CHECKING:
    from condu_ray.config import Granularity

Objects = dict[str, dict[str, NDArray[Any]]]


@dataclass(frozen=True, eq=False)
class Task:
    """One task's trigger. uid: number of the session that added it, never used again in a lineage.

    norms: f64[G], of the original delta, written once. rescalers: f32[G], of the newest session. birth: the mask bits
    after session `since`: the one that added the task, or a later one whose flips were folded in.
    """

    name: str
    uid: int
    norms: NDArray[np.float64]
    rescalers: NDArray[np.float32]
    birth: Plane
    since: int


@dataclass(frozen=True, eq=False)
class FusionState:
    """All tasks in one vector. Every change makes a new state; arrays are shared between states, so write into none.

    u: f32[total], finite, without -0.0. tasks: in the order learned. flips: by uid of the session, for every session
    after the oldest birth. next_uid: of the next session. forgotten: uids dropped since u was written, ascending.
    """

    layout: Layout
    granularity: Granularity
    u: NDArray[np.float32]
    tasks: tuple[Task, ...]
    flips: Mapping[int, Plane]
    next_uid: int
    forgotten: tuple[int, ...] = ()

    @classmethod
    def empty(cls, layout: Layout, granularity: Granularity) -> FusionState:
        """The state before the first task. Raises FusionError for an unknown granularity."""
        check_granularity(granularity)
        return cls(layout, granularity, np.zeros(layout.total, np.float32), (), {}, 0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def position(self, task: str) -> int:
        """Index of a task in the order learned. Raises FusionError for an unknown name."""
        return position_of(task, self.names)

    @property
    def planes(self) -> Planes:
        return Planes([(task.since, task.birth) for task in self.tasks], self.flips)

    def mask_plane(self, task: str, part: slice | NDArray[np.int64] | None = None) -> Plane:
        """The task's mask now as a bit plane, uint8[total / 8], or these bytes of it."""
        own = self.tasks[self.position(task)]
        part = slice(0, self.layout.total // 8) if part is None else part
        plane: Plane = Planes([(own.since, own.birth)], self.flips).masks(part)[0]
        return plane

    def mask(self, task: str) -> NDArray[np.bool_]:
        """The task's mask now, bool[total]; False on padding."""
        mask: NDArray[np.bool_] = read_bits(self.mask_plane(task), 0, self.layout.total).view(np.bool_)
        return mask


def meta(state: FusionState) -> dict[str, Any]:
    """What is small in a state, as JSON: order and uids of the tasks, granularity, next uid, digest of the layout."""
    return {
        "forgotten": list(state.forgotten),
        "granularity": state.granularity,
        "layout": state.layout.digest,
        "next_uid": state.next_uid,
        "tasks": [_described(task) for task in state.tasks],
    }


def _described(task: Task) -> dict[str, Any]:
    folded = {} if task.since == task.uid else {"since": task.since}
    return {"name": task.name, "uid": task.uid, **folded}


def _birth_name(uid: int, since: int) -> str:
    return f"birth-{uid}" if since == uid else f"birth-{uid}-at-{since}"


def objects(state: FusionState) -> Objects:
    """What a store has to hold: object name -> array name -> array. A state before its first session needs nothing.

        u-<uid>           u         f32[total]           rescalers-<uid>   rescalers  f32[T, G]
        birth-<uid>       birth     uint8[total / 8]                       meta       uint8, `meta(state)` as JSON
                          norms     f64[G]               flips-<uid>       flips      uint8[total / 8], or as `shrink`

    Along one lineage the same name always means the same bytes, so an object that is stored already need not be written
    again. A forget changes rescalers-<uid> alone, which then is called rescalers-<uid>-without-<uid>-<uid>...
    A birth that holds the flips up to a later session is called birth-<uid>-at-<uid>.
    """
    if state.next_uid == 0:
        return {}
    newest = state.next_uid - 1
    groups = group_count(state.layout, state.granularity)
    rescalers = [task.rescalers for task in state.tasks]
    small = json.dumps(meta(state), sort_keys=True, separators=(",", ":")).encode()
    found: Objects = {
        f"u-{newest}": {"u": state.u},
        _rescalers_name(newest, state): {
            "rescalers": np.array(rescalers, np.float32).reshape(len(rescalers), groups),
            "meta": np.frombuffer(small, np.uint8),
        },
    }
    for task in state.tasks:
        found[_birth_name(task.uid, task.since)] = {"birth": task.birth, "norms": task.norms}
    for uid, plane in state.flips.items():
        found[f"flips-{uid}"] = shrink(plane)
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
    since = [int(task.get("since", task["uid"])) for task in small["tasks"]]
    births = [_birth_name(*each) for each in zip(uids, since, strict=True)]
    newest, plane = int(small["next_uid"]) - 1, (layout.total // 8,)
    groups = group_count(layout, granularity)
    rescalers = read_array(objects, found[0], "rescalers", np.float32, (len(uids), groups))
    tasks = tuple(
        Task(
            str(task["name"]),
            uid,
            read_array(objects, births[position], "norms", np.float64, (groups,)),
            rescalers[position],
            read_array(objects, births[position], "birth", np.uint8, plane),
            since[position],
        )
        for position, (uid, task) in enumerate(zip(uids, small["tasks"], strict=True))
    )
    sessions = needed_flips(tasks, newest + 1)
    flips = {uid: _flips(objects, f"flips-{uid}", plane) for uid in sessions}
    u = read_array(objects, f"u-{newest}", "u", np.float32, (layout.total,))
    return FusionState(layout, granularity, u, tasks, flips, newest + 1, tuple(small["forgotten"]))


def _flips(objects: Mapping[str, Mapping[str, NDArray[Any]]], name: str, shape: tuple[int]) -> Plane:
    if "where" in objects.get(name, {}):
        return grow(name, objects[name], shape[0])
    return read_array(objects, name, "flips", np.uint8, shape)


def needed_flips(tasks: tuple[Task, ...], next_uid: int) -> range:
    """uids of the sessions whose flips some task still needs: all after the oldest birth."""
    return range(tasks[0].since + 1, next_uid) if tasks else range(0)


def fold(state: FusionState) -> FusionState:
    """The state with every flip taken into the births, so that no flip of an earlier session is needed any more.

    Nothing that the state says of a task changes, bit for bit. A state without flips is returned as it is.
    """
    if not state.flips:
        return state
    everything, newest = state.planes.masks(slice(0, state.layout.total // 8)), state.next_uid - 1
    tasks = tuple(replace(task, birth=mask, since=newest) for task, mask in zip(state.tasks, everything, strict=True))
    return replace(state, tasks=tasks, flips={})


def _rescalers_name(uid: int, state: FusionState) -> str:
    """Another name for everything that can be said after one session: tasks may be forgotten and births folded."""
    without = "-without-" + "-".join(map(str, state.forgotten)) if state.forgotten else ""
    folded = [task.since for task in state.tasks if task.since != task.uid]
    return f"rescalers-{uid}{without}" + (f"-at-{max(folded)}" if folded else "")


def position_of(task: str, names: tuple[str, ...]) -> int:
    """Index of a task in the order learned. Raises FusionError for an unknown name."""
    try:
        return names.index(task)
    except ValueError:
        raise FusionError(f"task {task!r} is not in the fused state", nearest(task, names)) from None


def checked(out: NDArray[Any], size: int, dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """`out`, where it can be written. Raises FusionError for another shape or dtype, and for a read-only array."""
    if out.shape != (size,) or out.dtype != dtype or not out.flags.c_contiguous:
        raise FusionError(f"out is {out.dtype}{list(out.shape)}, expected {dtype.__name__}[{size}] in one piece")
    if not out.flags.writeable:
        raise FusionError("out is read-only", "give an array that can be written")
    return out


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
