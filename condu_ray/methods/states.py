"""What systems keep of their tasks: fused, apart, only the latest, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError, nearest
from condu_ray.fusion import triggers
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import Fidelity, probe_coordinates
from condu_ray.methods.protocol import NO_MEMORY, Arrays, Memory, Stored, Vector

PROBE_COUNT = 65_536
PROBE_SEED = 0


@dataclass(frozen=True, eq=False)
class FusedState:
    """ConDU: one unified delta and one trigger a task, with a sample of each delta by which fidelity is told later.

    probes: task -> f32[min(PROBE_COUNT, parameters)], the task's own delta at the same coordinates for every task.
    """

    memory: ClassVar[Memory] = NO_MEMORY
    fused: triggers.State
    probes: Mapping[str, Vector] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(trigger.name for trigger in self.fused.tasks)

    def add(self, task: str, delta: Vector, memory: Memory = NO_MEMORY) -> FusedState:
        return self._with(triggers.unify(self.fused, task, delta), task, delta)

    def joined(self, task: str, delta: Vector, parts: Sequence[triggers.Part]) -> FusedState:
        """What `add` gives, bit for bit, from the shares of several processes in their order."""
        return self._with(triggers.joined(self.fused, task, parts), task, delta)

    def _with(self, fused: triggers.State, task: str, delta: Vector) -> FusedState:
        fused = triggers.with_sizes(fused, task, delta)
        probe = delta[probe_coordinates(fused.layout, PROBE_COUNT, PROBE_SEED)]
        return FusedState(fused, {**self.probes, task: probe})

    def rescaled(self, task: str, rescalers: Vector) -> FusedState:
        """With other rescalers for one task, f32[G]. Raises FusionError where the triggers are masks."""
        return replace(self, fused=triggers.with_rescalers(self.fused, task, rescalers))

    def forget(self, task: str) -> FusedState:
        return FusedState(
            triggers.forget(self.fused, task), {name: p for name, p in self.probes.items() if name != task}
        )

    def delta(self, task: str) -> Vector:
        return triggers.reconstruct(self.fused, task)

    def add_to(self, task: str, start: Vector) -> None:
        """Makes θ⁰, f32[total], the task's expert: start += delta, in place and in one pass."""
        triggers.add_to(self.fused, task, start)

    def fidelity(self, task: str) -> Fidelity:
        """How much of the task's own fine-tuning is left, from the kept sample (exact up to 65,536 parameters)."""
        coordinates = probe_coordinates(self.fused.layout, PROBE_COUNT, PROBE_SEED)
        return triggers.fidelity_at(self.fused, task, coordinates, self.probes[task])

    def folded(self) -> FusedState:
        """The same state, bit for bit, that needs no flips of earlier sessions."""
        return replace(self, fused=triggers.fold(self.fused))

    def objects(self) -> Arrays:
        probes = {f"probe-{trigger.uid}": {"values": self.probes[trigger.name]} for trigger in self.fused.tasks}
        return {**triggers.objects(self.fused), **probes}

    def meta(self) -> dict[str, Any]:
        return triggers.meta(self.fused)

    @classmethod
    def load(cls, layout: Layout, meta: Mapping[str, Any], objects: Stored) -> FusedState:
        # Stores of the first release know masks alone and do not say so.
        fused = triggers.load(layout, meta["granularity"], meta.get("triggers", "mask"), objects)
        probes = {trigger.name: _stored(objects, f"probe-{trigger.uid}", "values") for trigger in fused.tasks}
        return cls(fused, probes)


@dataclass(frozen=True, eq=False)
class SeparateState:
    """Every task's delta apart, dense; in half precision where `half`."""

    memory: ClassVar[Memory] = NO_MEMORY
    layout: Layout
    half: bool = False
    deltas: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    uids: Mapping[str, int] = field(default_factory=dict)
    next_uid: int = 1

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.deltas)

    def add(self, task: str, delta: Vector, memory: Memory = NO_MEMORY) -> SeparateState:
        _check_delta(self.layout, self.tasks, task, delta)
        return replace(
            self,
            deltas={**self.deltas, task: _half(task, delta) if self.half else delta},
            uids={**self.uids, task: self.next_uid},
            next_uid=self.next_uid + 1,
        )

    def forget(self, task: str) -> SeparateState:
        _check_task(self.tasks, task)
        return replace(
            self,
            deltas={name: d for name, d in self.deltas.items() if name != task},
            uids={name: uid for name, uid in self.uids.items() if name != task},
        )

    def delta(self, task: str) -> Vector:
        _check_task(self.tasks, task)
        return self.deltas[task].astype(np.float32, copy=False)

    def objects(self) -> Arrays:
        return {f"delta-{self.uids[name]}": {"delta": delta} for name, delta in self.deltas.items()}

    def meta(self) -> dict[str, Any]:
        return {"kind": "separate", "half": self.half, "uids": dict(self.uids), "next_uid": self.next_uid}

    @classmethod
    def load(cls, layout: Layout, meta: Mapping[str, Any], objects: Stored) -> SeparateState:
        deltas = {name: _stored(objects, f"delta-{uid}", "delta") for name, uid in meta["uids"].items()}
        return cls(layout, meta["half"], deltas, dict(meta["uids"]), meta["next_uid"])


Move = Callable[[Vector | None, Vector], Vector]
"""(The model so far or None, the model that the newest task's training gave) -> the model from now on, as deltas."""


def taken_over(before: Vector | None, trained: Vector) -> Vector:
    """The newest task's model as it is."""
    return trained


@dataclass(frozen=True, eq=False)
class LatestState:
    """One model that every task changes, and which answers for all of them.

    move: how the model that a task's training gave enters, a function that pickles. latest: the model as a delta, None
    before the first task. uid: how many tasks were added. memory: see `TaskState`; written: task -> the object that
    holds its memory. What a task did to the model cannot be taken out again, so forgetting drops its name and memory
    alone; without any task the model is θ⁰.
    """

    layout: Layout
    move: Move = taken_over
    names: tuple[str, ...] = ()
    latest: Vector | None = None
    uid: int = 0
    memory: Memory = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.names

    def add(self, task: str, delta: Vector, memory: Memory = NO_MEMORY) -> LatestState:
        _check_delta(self.layout, self.names, task, delta)
        names, uid = (*self.names, task), self.uid + 1
        for name in memory:
            _check_task(names, name)
        return replace(
            self,
            names=names,
            latest=self.move(self.latest, delta),
            uid=uid,
            memory={**self.memory, **memory},
            written={**self.written, **{name: f"memory-{uid}-{place}" for place, name in enumerate(memory)}},
        )

    def forget(self, task: str) -> LatestState:
        names = _without(self.names, task)
        return replace(
            self,
            names=names,
            latest=self.latest if names else None,
            memory={name: kept for name, kept in self.memory.items() if name != task},
            written={name: place for name, place in self.written.items() if name != task},
        )

    def delta(self, task: str) -> Vector | None:
        _check_task(self.names, task)
        return self.latest

    def objects(self) -> Arrays:
        latest: Arrays = {} if self.latest is None else {f"latest-{self.uid}": {"delta": self.latest}}
        return latest | {place: dict(self.memory[name]) for name, place in self.written.items()}

    def meta(self) -> dict[str, Any]:
        written = {"memory": dict(self.written)} if self.written else {}
        return {"kind": "latest", "tasks": list(self.names), "uid": self.uid, **written}

    @classmethod
    def load(cls, layout: Layout, meta: Mapping[str, Any], objects: Stored, move: Move = taken_over) -> LatestState:
        uid, places = meta["uid"], meta.get("memory", {})
        written = {name: places[name] for name in meta["tasks"] if name in places}  # in the order learned
        latest = _stored(objects, f"latest-{uid}", "delta") if meta["tasks"] else None
        memory = {name: _object(objects, place) for name, place in written.items()}
        return cls(layout, move, tuple(meta["tasks"]), latest, uid, memory, written)


@dataclass(frozen=True)
class NamesState:
    """Zero-shot: the base model answers; only the names of the tasks are kept."""

    memory: ClassVar[Memory] = NO_MEMORY
    names: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.names

    def add(self, task: str, delta: Vector, memory: Memory = NO_MEMORY) -> NamesState:
        _check_name(self.names, task)
        return NamesState((*self.names, task))

    def forget(self, task: str) -> NamesState:
        return NamesState(_without(self.names, task))

    def delta(self, task: str) -> None:
        _check_task(self.names, task)

    def objects(self) -> Arrays:
        return {}

    def meta(self) -> dict[str, Any]:
        return {"kind": "names", "tasks": list(self.names)}


def _check_name(tasks: tuple[str, ...], task: str) -> None:
    if not task or task in tasks:
        raise FusionError(f"task '{task}' is in the state already" if task else "a task needs a name (found '')")


def _check_task(tasks: tuple[str, ...], task: str) -> None:
    if task not in tasks:
        raise FusionError(f"task '{task}' is not in the state", nearest(task, tasks))


def _check_delta(layout: Layout, tasks: tuple[str, ...], task: str, delta: Vector) -> None:
    _check_name(tasks, task)
    if delta.shape != (layout.total,) or delta.dtype != np.float32:
        found = f"{delta.dtype}{list(delta.shape)}"
        raise FusionError(f"task {task}: its delta is {found}, the layout holds float32[{layout.total}]")
    if not np.isfinite(delta).all():
        raise FusionError(f"task {task}: its delta holds NaN or infinity", "train with a smaller --train.lr")


def _without(tasks: tuple[str, ...], task: str) -> tuple[str, ...]:
    _check_task(tasks, task)
    return tuple(name for name in tasks if name != task)


def _half(task: str, delta: Vector) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # refused by name below
        half = delta.astype(np.float16)
    if not np.isfinite(half).all():
        raise FusionError(f"task {task}: its delta exceeds half precision (65504)", "train with a smaller --train.lr")
    return half


def _object(objects: Stored, name: str) -> Mapping[str, NDArray[Any]]:
    if name not in objects:
        raise FusionError(f"object '{name}' is missing", "give one version's objects")
    return objects[name]


def _stored(objects: Stored, name: str, array: str) -> NDArray[Any]:
    try:
        return objects[name][array]
    except KeyError:
        raise FusionError(f"object '{name}' with array '{array}' is missing", "give one version's objects") from None
