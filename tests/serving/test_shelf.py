"""Which version serves while versions come, go and cannot be loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from condu_ray.errors import DamagedObject, NotFound, StoreError
from condu_ray.serving import shelf as module
from condu_ray.serving.shelf import Fault, Shelf


class Stored:
    """Versions that can be made, damaged and counted."""

    def __init__(self, *versions: int) -> None:
        self.known = list(versions)
        self.damaged: set[int] = set()
        self.away = False
        self.loads: list[int] = []
        self.emptied: list[int] = []

    def versions(self) -> list[int]:
        if self.away:
            raise StoreError("the store is away")
        return list(self.known)

    def load(self, version: int) -> Any:
        self.loads.append(version)
        if version not in self.known:
            raise NotFound(f"no version {version}")
        if version in self.damaged:
            raise DamagedObject(f"version {version} is damaged")
        return SimpleNamespace(version=version, cached=SimpleNamespace(empty=lambda: self.emptied.append(version)))

    def shelf(self, keep: int = 1) -> Shelf:
        return Shelf(self.versions, self.load, keep)


def test_the_newest_serves_and_a_newer_one_takes_its_place() -> None:
    stored = Stored(1, 2)
    shelf = stored.shelf()
    with pytest.raises(NotFound):
        _ = shelf.current
    assert shelf.refresh()
    assert (shelf.current.version, shelf.fault) == (2, None)
    assert not shelf.refresh()
    stored.known.append(3)
    assert shelf.refresh()
    assert shelf.current.version == 3
    assert stored.loads == [2, 3], "what serves already is not loaded again"
    assert stored.emptied == [2], "experts as large as models are those of the version that serves"


def test_a_version_that_cannot_be_loaded_leaves_the_one_before_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(1)
    shelf = stored.shelf()
    shelf.refresh()
    serving = shelf.current
    stored.known.append(2)
    stored.damaged.add(2)
    assert not shelf.refresh()
    assert shelf.current is serving
    assert shelf.fault == Fault(2, "version 2 is damaged.")
    shelf.refresh()
    assert stored.loads == [1, 2], "it is not tried at every look"
    stored.known.append(3)
    assert shelf.refresh()
    assert (shelf.current.version, shelf.fault) == (3, None)

    stored.known.append(4)
    stored.damaged.add(4)
    shelf.refresh()
    stored.damaged.clear()
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.0)
    assert shelf.refresh(), "after a while it is tried again: the store may have been out of reach"
    assert shelf.current.version == 4


def test_at_the_start_an_older_version_will_do() -> None:
    stored = Stored(1, 2, 3)
    stored.damaged |= {2, 3}
    shelf = stored.shelf()
    assert shelf.refresh()
    assert shelf.current.version == 1
    assert shelf.fault == Fault(3, "version 3 is damaged.")


def test_a_store_that_is_away_changes_nothing() -> None:
    stored = Stored(1)
    shelf = stored.shelf()
    shelf.refresh()
    stored.away = True
    assert not shelf.refresh()
    assert (shelf.current.version, shelf.fault) == (1, Fault(None, "the store is away."))
    stored.away = False
    shelf.refresh()
    assert shelf.fault is None


def test_a_pinned_version_serves_until_it_is_let_go() -> None:
    stored = Stored(1, 2, 3)
    shelf = stored.shelf()
    shelf.pin(2)
    shelf.refresh()
    assert (shelf.current.version, shelf.newest) == (2, 3)
    shelf.pin(9)
    shelf.refresh()
    assert shelf.current.version == 2
    assert shelf.fault is not None and "9" in shelf.fault.reason
    shelf.pin(None)
    shelf.refresh()
    assert (shelf.current.version, shelf.fault) == (3, None)


def test_other_versions_are_fetched_once_and_make_room() -> None:
    stored = Stored(1, 2, 3, 4)
    shelf = stored.shelf(keep=2)
    shelf.refresh()
    assert shelf.at_hand(None) is shelf.at_hand(4) is shelf.current
    assert shelf.at_hand(1) is None
    one = shelf.fetch(1)
    assert shelf.fetch(1) is one is shelf.at_hand(1)
    shelf.fetch(2)
    shelf.fetch(3)
    assert shelf.at_hand(1) is None
    assert shelf.at_hand(2) is not None
    assert stored.loads == [4, 1, 2, 3]
    with pytest.raises(NotFound):
        shelf.fetch(9)
    assert shelf.fetch(4) is shelf.current


def test_the_version_before_stays_at_hand_for_requests_under_way_and_for_going_back() -> None:
    stored = Stored(1)
    shelf = stored.shelf()
    shelf.refresh()
    before = shelf.current
    stored.known.append(2)
    shelf.refresh()
    assert shelf.at_hand(1) is before
    shelf.pin(1)
    shelf.refresh()
    assert shelf.current is before
    assert stored.loads == [1, 2]


def test_what_gc_has_removed_is_let_go_and_what_serves_goes_on() -> None:
    stored = Stored(1, 2, 3)
    shelf = stored.shelf(keep=2)
    shelf.refresh()
    assert [shelf.fetch(version).version for version in (1, 2)] == [1, 2]
    stored.known.remove(1)
    shelf.refresh()
    assert (shelf.at_hand(1), shelf.at_hand(2) is None) == (None, False)
    stored.known = [4]
    stored.damaged.add(4)
    shelf.refresh()
    assert (shelf.at_hand(2), shelf.current.version) == (None, 3)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_version_that_is_held_is_loaded_once_whatever_others_are_asked_for(keep: int) -> None:
    stored = Stored(1, 2, 3, 4)
    shelf = stored.shelf(keep)
    shelf.hold(1)
    shelf.refresh()
    for version in (1, 2, 1, 3, 1):
        assert shelf.fetch(version).version == version
    assert stored.loads.count(1) == 1
    assert (shelf.at_hand(2), shelf.at_hand(3) is not None) == (None, bool(keep))
    shelf.hold(None)
    shelf.fetch(2)
    assert shelf.at_hand(1) is None
