"""A state of sign triggers as named arrays for a store, and back to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import group_count
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.planes import grow, shrink
from condu_ray.fusion.signs import SignedTask, SignState, halves, unhalved
from condu_ray.fusion.sizes import Sizes, kept, spread
from condu_ray.fusion.state import Objects, read_array, read_meta

if TYPE_CHECKING:
    from condu_ray.config import Granularity

Stored = Mapping[str, Mapping[str, NDArray[Any]]]


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

        magnitudes-<uid>  magnitudes  uint32[total]
                          counts      int64[G]
        tasks-<uid>       meta        uint8, JSON
        signs-<uid>       rescalers   f16[K], of the K groups whose rescaler is not 0, times 2 ^ shift
                          shift       int32[1]
                          groups      bit plane over G: which these are; packed where that is smaller (planes.shrink)
                          signs       their bits alone
                          sized       bit plane over K: groups with a second bit
                          large       the second bits alone
                          levels      f32[tensors, 2]

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
        found[f"signs-{task.uid}"] = _stored(state, task)
    return found


def _stored(state: SignState, task: SignedTask) -> dict[str, NDArray[Any]]:
    values, shift = halves(task.rescalers)
    there, sizes = values != 0, task.sizes
    second = sizes.groups & there
    return {
        "rescalers": values[there],
        "shift": np.array([shift], np.int32),
        **{f"groups.{name}": array for name, array in shrink(np.packbits(there, bitorder="little")).items()},
        "signs": kept(state.layout, state.granularity, task.signs, there),
        "sized": np.packbits(second[there], bitorder="little"),
        "large": kept(state.layout, state.granularity, sizes.large, second),
        "levels": sizes.levels,
    }


def _task_of(layout: Layout, granularity: Granularity, objects: Stored, name: str, uid: int) -> SignedTask:
    """What `_stored` wrote. Raises FusionError, naming the object, where its arrays do not fit each other."""
    held, groups = f"signs-{uid}", group_count(layout, granularity)
    found = objects.get(held, {})
    shrunk = {key.removeprefix("groups."): array for key, array in found.items() if key.startswith("groups.")}
    bits = shrunk["flips"] if "flips" in shrunk else grow(held, shrunk, -(-groups // 8))
    if bits.dtype != np.uint8 or bits.shape != (-(-groups // 8),):
        raise FusionError(f"object {held!r}: groups is {bits.dtype}{list(bits.shape)}, not that of {groups} groups")
    there = np.unpackbits(bits, count=groups, bitorder="little").view(np.bool_)
    count = int(there.sum())
    rescalers, second = np.zeros(groups, np.float16), np.zeros(groups, np.bool_)
    rescalers[there] = read_array(objects, held, "rescalers", np.float16, (count,))
    sized = read_array(objects, held, "sized", np.uint8, (-(-count // 8),))
    second[there] = np.unpackbits(sized, count=count, bitorder="little").view(np.bool_)
    shift = int(read_array(objects, held, "shift", np.int32, (1,))[0])
    levels = read_array(objects, held, "levels", np.float32, (len(layout.entries), 2))
    planes = []
    for key, own in (("signs", there), ("large", second)):
        plane = spread(layout, granularity, _bytes(objects, held, key), own)
        if plane is None:
            raise FusionError(f"object {held!r}: {key} are not the bits of its {int(own.sum())} groups")
        planes.append(plane)
    signs, large = planes
    sizes = Sizes(second, large if second.any() else np.zeros(0, np.uint8), levels)
    return SignedTask(name, uid, unhalved(rescalers, shift), signs, sizes)


def _bytes(objects: Stored, name: str, key: str) -> NDArray[np.uint8]:
    size = objects.get(name, {}).get(key, np.zeros(0, np.uint8)).size
    found: NDArray[np.uint8] = read_array(objects, name, key, np.uint8, (size,))
    return found


def load(layout: Layout, granularity: Granularity, objects: Stored) -> SignState:
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
    named = [(str(task["name"]), int(task["uid"])) for task in small["tasks"]]
    tasks = tuple(_task_of(layout, granularity, objects, name, uid) for name, uid in named)
    return SignState(
        layout,
        granularity,
        read_array(objects, f"magnitudes-{newest}", "magnitudes", np.uint32, (layout.total,)),
        read_array(objects, f"magnitudes-{newest}", "counts", np.int64, (groups,)),
        tasks,
        newest + 1,
        tuple(small["forgotten"]),
    )
