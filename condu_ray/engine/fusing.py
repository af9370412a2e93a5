"""Adds a task to the state of a version, in the process that owns the state. Knows no Ray.

Every change is named by a key made from its input, so a repeated call, or one after a restart, gives the same result:
the store is the truth, the state in memory a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from condu_ray.fusion.groups import shares
from condu_ray.fusion.triggers import Part, fuse
from condu_ray.methods import registry
from condu_ray.methods.protocol import TaskState
from condu_ray.methods.states import FusedState
from condu_ray.methods.stored import config_of, layout_of, put_state, state_of
from condu_ray.methods.training import memory_in
from condu_ray.store import Manifest, ObjectRef, Store, open_store


@dataclass(frozen=True)
class Fused:
    """A state that is written but not yet named by a version.

    objects: logical name -> where it is. meta: the state's small part. fidelity: task -> (relative L2 error, cosine,
    share of bits alive), for systems that fuse.
    """

    key: str
    objects: dict[str, ObjectRef]
    meta: dict[str, Any]
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)


Spread = Callable[[Manifest | None, str, ObjectRef], Sequence[Part]]
"""Gets the shares of several processes (`Shard.part`), in order. Arguments: as of `Fuser.propose`."""


class Shard:
    """Does one share of each pass over the vector. It keeps no state, so another process can always take its place."""

    def __init__(self, url: str, index: int, count: int) -> None:
        self._store, self._index, self._count = open_store(url), index, count

    def part(self, parent: Manifest | None, task: str, delta: ObjectRef) -> Part | None:
        """This share of adding `task` to the state of `parent`; None where the layout has fewer shares."""
        header = self._store.header
        state = _state(self._store, parent)
        assert isinstance(state, FusedState), "only fused tasks are sharded"
        dealt = shares(layout_of(header), state.fused.granularity, self._count)
        if self._index >= len(dealt):
            return None
        return fuse(state.fused, task, self._store.get(delta)["delta"], dealt[self._index])


class Fuser:
    """Owns the newest state of one store. spread: who does the passes over the vector; without it, this process."""

    def __init__(self, url: str, spread: Spread | None = None) -> None:
        self._spread = spread
        self._store = open_store(url)
        self._layout = layout_of(self._store.header)
        self._done: Fused | None = None
        self.state: TaskState = _state(self._store, None)

    def hold(self, version: Manifest | None) -> None:
        """Makes the state of a version the current one."""
        self.state, self._done = self._at(version), None

    def propose(self, parent: Manifest | None, task: str, delta: ObjectRef | None) -> TaskState:
        """The state of `parent` with `task` added, not written.

        delta: as trained (None where the system does not train).
        """
        state = self._at(parent)
        if delta is None:
            return state.add(task, np.zeros(self._layout.total, np.float32))
        trained = self._store.get(delta)
        if self._spread is None or not isinstance(state, FusedState):
            return state.add(task, trained["delta"], memory_in(trained))
        return state.joined(task, trained["delta"], self._spread(parent, task, delta))

    def add(
        self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None, rescalers: ObjectRef | None
    ) -> Fused:
        """What `propose` says, with these rescalers if any; its new objects are in the store when this returns.

        Doing it again with the same key changes nothing.
        """
        done = self._done
        if done is not None and done.key == key and all(self._store.touch(ref.path) for ref in done.objects.values()):
            return done
        state = self.propose(parent, task, delta)
        if rescalers is not None:
            assert isinstance(state, FusedState), "only fused tasks have rescalers"
            state = state.rescaled(task, self._store.get(rescalers)["rescalers"])
        objects = put_state(self._store, key, state, parent)
        self.state = state
        self._done = Fused(key, objects, state.meta(), _fidelities(state))
        return self._done

    def _at(self, parent: Manifest | None) -> TaskState:
        done = self._done
        if parent is not None and done is not None and done.meta == parent.state["method"] and _holds(parent, done):
            return self.state
        return _state(self._store, parent)


def _state(store: Store, version: Manifest | None) -> TaskState:
    """That of a version, mapped from the store; None: before the first."""
    if version is not None:
        return state_of(store, version)
    header = store.header
    return registry.get(header.method).empty(layout_of(header), config_of(header))


def _holds(parent: Manifest, done: Fused) -> bool:
    return all(parent.objects.get(name) == ref for name, ref in done.objects.items())


def _fidelities(state: TaskState) -> dict[str, dict[str, float]]:
    measure = getattr(state, "fidelity", None)
    if measure is None:
        return {}
    found = {}
    for task in state.tasks:
        fidelity = measure(task)
        found[task] = {
            "relative_l2": float(fidelity.relative_l2),
            "cosine": float(fidelity.cosine),
            "bits_alive": float(fidelity.bits_alive),
        }
    return found
