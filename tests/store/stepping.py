"""Sessions in short that are moved on call by call, in any order that a test chooses, and what has to hold after it.

A session here does with a store what `learn`, `forget`, `rollback` and `gc` do, without training. It runs in a thread
of its own that waits before each call: of the store, where those are atomic (a folder), or of the server (S3).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from condu_ray.errors import StoreError, VersionTaken
from condu_ray.store import Manifest, Store, TaskCard
from condu_ray.store.history import rollback

PATIENCE_S = 60.0
Act = Callable[[Store], Manifest | None]


class Session:
    """A thread that stops before each call; `step` lets one call through."""

    def __init__(self) -> None:
        self.result: Manifest | None = None
        self.refused: StoreError | None = None
        self.fault: BaseException | None = None
        self.alive = False
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, act: Act, store: Store) -> None:
        """Runs `act` up to its first call."""

        def run() -> None:
            try:
                self.result = act(store)
            except StoreError as refused:
                self.refused = refused
            except BaseException as fault:
                self.fault = fault
            self.alive = False
            self._waits.release()

        self.result = self.refused = self.fault = None
        self.alive = True
        threading.Thread(target=run, daemon=True).start()
        self._wait()

    def gate(self) -> None:
        """What a call does first: waits until it may go on."""
        self._waits.release()
        assert self._go.acquire(timeout=PATIENCE_S)

    def step(self) -> None:
        """Lets one call happen, and all that follows it up to the next."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        assert self._waits.acquire(timeout=PATIENCE_S), "a session hangs"


class Gated:
    """An object whose methods wait at a session's gate."""

    def __init__(self, inner: Any, session: Session) -> None:
        self._inner, self._session = inner, session

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def waits(*given: Any, **named: Any) -> Any:
            self._session.gate()
            return value(*given, **named)

        return waits


def _card(name: str, version: int) -> TaskCard:
    return TaskCard(
        name=name,
        uid=version,
        classes=["cat", "dog"],
        templates=[],
        source=name,
        fingerprint="f" * 64,
        method="condu",
        train_key=f"train-{name}",
        learned_in=version,
        pictures={"train": 1, "test": 1},
    )


def content(names: list[str]) -> np.ndarray:
    """What a state of these tasks holds."""
    return np.array([int(hashlib.sha256(name.encode()).hexdigest()[:7], 16) for name in names], np.int64)


def _state_key(parent: Manifest | None, deed: str) -> str:
    before = sorted(ref.path for ref in parent.objects.values()) if parent else []
    return f"state-{hashlib.sha256(repr((before, deed)).encode()).hexdigest()[:16]}"


def _commit(store: Store, parent: Manifest | None, cards: list[TaskCard], objects: dict[str, Any], deed: str) -> Any:
    objects["u"] = store.put(_state_key(parent, deed), "u", {"u": content([card.name for card in cards])})
    made = Manifest(
        version=parent.version + 1 if parent else 1,
        parent=parent.version if parent else None,
        kind="learn" if deed.startswith("learn") else "forget",
        tasks=cards,
        objects=objects,
        message=deed,
    )
    store.commit(made)
    return made


def learns(name: str) -> Act:
    """As `engine.session.learn`."""

    def act(store: Store) -> Manifest | None:
        delta = store.find(f"train-{name}", "delta") or store.put(f"train-{name}", "delta", {"d": content([name])})
        for _ in range(20):
            parent = store.manifest() if store.versions() else None
            if parent and parent.task(name):
                return None
            version = parent.version + 1 if parent else 1
            cards = [*(parent.tasks if parent else []), _card(name, version)]
            objects = {each: ref for each, ref in (parent.objects if parent else {}).items() if each != "u"}
            objects[f"birth-{version}"] = store.put(_state_key(parent, name), "birth", {"b": content([name])})
            try:
                made: Manifest = _commit(store, parent, cards, objects, f"learn {name}")
            except VersionTaken:
                continue
            assert delta
            store.discard(f"train-{name}", "delta")
            return made
        raise AssertionError("it never came through")

    return act


def forgets(name: str) -> Act:
    """As `engine.forget.forget`; nothing where there is no such task."""

    def act(store: Store) -> Manifest | None:
        while True:
            parent = store.manifest()
            gone = parent.task(name)
            if gone is None:
                return None
            cards = [card for card in parent.tasks if card.name != name]
            objects = {each: ref for each, ref in parent.objects.items() if each not in ("u", f"birth-{gone.uid}")}
            try:
                made: Manifest = _commit(store, parent, cards, objects, f"forget {name}")
            except VersionTaken:
                continue
            return made

    return act


def rolls_back(version: int) -> Act:
    return lambda store: rollback(store, version)


def cleans(keep: int) -> Act:
    def act(store: Store) -> None:
        store.gc(keep)

    return act


def reads(store: Store) -> None:
    """A reader, which may find that its version was removed meanwhile, and nothing else."""
    manifest = store.manifest()
    for ref in manifest.objects.values():
        store.get(ref)


@dataclass
class Deed:
    """What a session was asked for."""

    name: str
    act: Act


class History:
    """Every version that was ever committed, as its writer was told."""

    def __init__(self) -> None:
        self.made: dict[int, Manifest] = {}

    def finished(self, deed: Deed, session: Session) -> None:
        """Takes down how a session ended. Raises what no user should see."""
        if session.fault is not None:
            raise session.fault
        if session.result is not None:
            number = session.result.version
            assert number not in self.made, f"version {number} was given twice"
            self.made[number] = session.result

    def check(self, store: Store) -> None:
        """The store is what its versions, one after another, explain; nothing that a version names is gone."""
        there = store.versions()
        assert there == sorted(set(there))
        assert not there or there[-1] == max(self.made)
        assert sorted(self.made) == list(range(1, len(self.made) + 1))
        for number in there:
            manifest = store.manifest(number)
            assert manifest == self.made[number]
            for name, ref in manifest.objects.items():
                assert store.fault(ref) is None, f"{name} of version {number}: {store.fault(ref)}"
            names = [card.name for card in manifest.tasks]
            np.testing.assert_array_equal(store.get(manifest.objects["u"])["u"], content(names))
        for number, manifest in self.made.items():
            before = [card.name for card in self.made[number - 1].tasks] if number > 1 else []
            assert manifest.parent == (number - 1 or None)
            assert [card.name for card in manifest.tasks] == self._expected(manifest, before)

    def check_nothing_else(self, store: Store) -> None:
        """After a last gc there is nothing but what versions name."""
        named = {ref.path for number in store.versions() for ref in store.manifest(number).objects.values()}
        store.gc(in_use_s=0)
        report = store.gc(in_use_s=0)
        assert (report.objects, report.leftovers, report.in_use) == ([], [], [])
        self.check(store)
        assert named == {ref.path for n in store.versions() for ref in store.manifest(n).objects.values()}

    def _expected(self, manifest: Manifest, before: list[str]) -> list[str]:
        deed, _, what = manifest.message.partition(" ")
        if deed == "learn":
            assert what not in before, f"{what} was learned twice"
            return [*before, what]
        if deed == "forget":
            return [name for name in before if name != what]
        return [card.name for card in self.made[int(what.split()[-1])].tasks]
