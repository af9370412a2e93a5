"""Two and three sessions on one store, in every order of their calls: one after another explains what is there.

Exhaustive where it can be: every schedule with a bounded number of changes from one session to the other. Beyond that,
hypothesis draws schedules of three sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from in_memory_s3 import InMemoryS3
from stepping import Act, Deed, Gated, History, Session, cleans, forgets, learns, reads, rolls_back

from condu_ray.store import Store, StoreHeader, bucket, create_store, open_store, s3, s3_gc
from condu_ray.store.local import LocalStore

HEADER = StoreHeader(method="condu", model={}, model_sha256="0" * 64, layout={})
PAIRS = {
    "two tasks": (learns("cars"), learns("birds")),
    "one task twice": (learns("cars"), learns("cars")),
    "learn and forget": (learns("cars"), forgets("pets")),
    "forget twice": (forgets("pets"), forgets("pets")),
    "learn and go back": (learns("cars"), rolls_back(1)),
    "go back and forget": (rolls_back(1), forgets("food")),
    "learn and clean": (learns("cars"), cleans(1)),
    "forget and clean": (forgets("pets"), cleans(1)),
    "go back and clean": (rolls_back(1), cleans(1)),
    "clean twice": (cleans(1), cleans(2)),
    "read and clean": (reads, cleans(1)),
}


class World:
    """A store with two versions, and gated ways into it."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.server, self._patch = kind, InMemoryS3(), monkeypatch
        monkeypatch.setattr(bucket, "_THREADS", 1)  # so that the calls of a session have one order
        monkeypatch.setenv("CONDU_CACHE", str(folder / "cache"))
        monkeypatch.setattr(bucket, "make_client", lambda: self.server)
        self.url = "s3://memory/store" if kind == "s3" else str(folder / "store")
        self.history = History()
        store = create_store(self.url, HEADER)
        for name in ("pets", "food"):
            made = learns(name)(store)
            assert made is not None
            self.history.made[made.version] = made

    def way_in(self, session: Session) -> Store:
        """A store whose calls (S3: requests) wait at the session's gate."""
        if self.kind == "local":
            return Gated(LocalStore.open(self.url), session)  # type: ignore[return-value]
        self._patch.setattr(bucket, "make_client", lambda: self.server)
        store = open_store(self.url)
        store._bucket._client = Gated(self.server, session)  # type: ignore[attr-defined]
        return store


def play(world: World, acts: tuple[Act, Act], switches: list[int]) -> int:
    """Runs two sessions, changing from one to the other before the steps in `switches`; returns how many steps it took.

    A session that has ended hands over to the other.
    """
    sessions = [Session(), Session()]
    for session, act in zip(sessions, acts, strict=True):
        session.start(act, world.way_in(session))
    now, steps = 0, 0
    while any(session.alive for session in sessions):
        if steps in switches or not sessions[now].alive:
            now = 1 - now
        if not sessions[now].alive:
            now = 1 - now
        sessions[now].step()
        steps += 1
    for session, act in zip(sessions, acts, strict=True):
        world.history.finished(Deed("", act), session)
    return steps


def schedules(bound: int, steps: int) -> Iterator[list[int]]:
    """Every way to place at most `bound` switches among the steps; the second session may begin (a switch at 0)."""

    def more(begun: list[int]) -> Iterator[list[int]]:
        yield begun
        if len(begun) < bound:
            for at in range(begun[-1] + 1 if begun else 0, steps):
                yield from more([*begun, at])

    return more([])


def explore(kind: str, acts: tuple[Act, Act], bound: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    longest = play(World(kind, folder / "first", monkeypatch), acts, [])
    count = 0
    for number, switches in enumerate(schedules(bound, longest)):
        world = World(kind, folder / str(number), monkeypatch)
        try:
            play(world, acts, switches)
            store = open_store(world.url)
            world.history.check(store)
            if number % 10 == 0:
                world.history.check_nothing_else(store)
        except BaseException as error:
            error.add_note(f"schedule: {switches}")
            raise
        count += 1
    return count


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_every_order_with_one_change(kind: str, pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explore(kind, PAIRS[pair], 1, tmp_path, monkeypatch) >= 3


GUARDS = {
    "a commit looks what a gc is about to remove": (s3, "doomed", lambda place: set()),
    "a gc looks for marks": (s3_gc, "_marks", lambda place: {}),
    "a commit marks what it names": (s3.S3Store, "_mark", lambda store, paths: None),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_without_a_guard_some_order_loses_an_object(
    guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a version that is going names, a new one is about to name: the case that takes two changes."""
    monkeypatch.setattr(*GUARDS[guard])
    with pytest.raises(AssertionError, match="the file is missing"):
        explore("s3", PAIRS["go back and clean"], 2, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_every_order_with_two_changes(kind: str, pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explore(kind, PAIRS[pair], 2, tmp_path, monkeypatch)


TASKS = st.sampled_from(["pets", "food", "cars", "birds"])


class Sessions(RuleBasedStateMachine):
    """Three sessions; each rule starts one or lets one of them do its next call."""

    kind = "s3"
    folder: Path
    patch: pytest.MonkeyPatch
    worlds = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).worlds += 1
        self.world = World(self.kind, self.folder / str(self.worlds), self.patch)
        self.sessions = [Session() for _ in range(3)]
        self.deeds: dict[int, Deed] = {}

    def begin(self, who: int, deed: Deed) -> None:
        if not self.sessions[who].alive:
            self.deeds[who] = deed
            self.sessions[who].start(deed.act, self.world.way_in(self.sessions[who]))
            self.settle(who)

    def settle(self, who: int) -> None:
        if not self.sessions[who].alive and who in self.deeds:
            self.world.history.finished(self.deeds.pop(who), self.sessions[who])

    @rule(who=st.integers(0, 2), name=TASKS)
    def learn(self, who: int, name: str) -> None:
        self.begin(who, Deed("learn", learns(name)))

    @rule(who=st.integers(0, 2), name=TASKS)
    def forget(self, who: int, name: str) -> None:
        self.begin(who, Deed("forget", forgets(name)))

    @rule(who=st.integers(0, 2), back=st.integers(0, 3))
    def go_back(self, who: int, back: int) -> None:
        self.begin(who, Deed("rollback", rolls_back(max(1, max(self.world.history.made) - back))))

    @rule(who=st.integers(0, 2), keep=st.integers(1, 2))
    def clean(self, who: int, keep: int) -> None:
        self.begin(who, Deed("gc", cleans(keep)))

    @rule(who=st.integers(0, 2))
    def read(self, who: int) -> None:
        self.begin(who, Deed("read", reads))

    @precondition(lambda self: self.deeds)
    @rule(data=st.data(), count=st.integers(1, 12))
    def move_on(self, data: Any, count: int) -> None:
        who = data.draw(st.sampled_from(sorted(self.deeds)))
        for _ in range(count):
            if self.sessions[who].alive:
                self.sessions[who].step()
        self.settle(who)

    @invariant()
    def what_is_published_is_whole(self) -> None:
        store = open_store(self.world.url)
        newest = store.manifest()
        assert all(store.fault(ref) is None for ref in newest.objects.values())

    def teardown(self) -> None:
        while self.deeds:
            for who in sorted(self.deeds):
                if self.sessions[who].alive:
                    self.sessions[who].step()
                self.settle(who)
        store = open_store(self.world.url)
        self.world.history.check(store)
        self.world.history.check_nothing_else(store)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_three_sessions_in_any_order(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sessions.kind, Sessions.folder, Sessions.patch = kind, tmp_path, monkeypatch
    checks = list(HealthCheck)
    run_state_machine_as_test(
        Sessions,
        settings=settings(max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=checks),
    )
