"""A cluster that is too small may grow: its autoscaler is asked for what the workers need."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from in_process_crew import silent

from condu_ray.config import SessionConfig
from condu_ray.engine import room as rooms
from condu_ray.engine.cluster import Cluster
from condu_ray.errors import TrainingError


class Autoscaler:
    """Brings nodes one after another, one each time somebody looks, as long as a placement group waits for them."""

    def __init__(self, *nodes: tuple[int, int]) -> None:
        self.asked: list[list[dict[str, float]]] = []
        self.waiting: list[int] = []
        self.coming, self.there = list(nodes), list[tuple[int, int]]()

    def ask(self, bundles: list[dict[str, float]]) -> int:
        self.asked.append(bundles)
        self.waiting.append(len(self.asked))
        return len(self.asked)

    def seen(self, joined: bool) -> Cluster:
        if self.waiting and self.coming:
            self.there.append(self.coming.pop(0))
        return Cluster(tuple(self.there), joined)


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(*nodes: tuple[int, int]) -> Autoscaler:
        made = Autoscaler(*nodes)
        monkeypatch.setattr(rooms, "placement_group", made.ask)
        monkeypatch.setattr(rooms, "remove_placement_group", made.waiting.remove)
        monkeypatch.setattr(rooms, "seen", made.seen)
        monkeypatch.setattr(rooms, "LOOK_SECONDS", 0.001)
        return made

    return of


EMPTY = Cluster(((0, 0),), joined=True)


def test_nodes_are_asked_for_and_awaited(grow: Any) -> None:
    autoscaler = grow((4, 0), (4, 0))
    config = SessionConfig(workers=2, cpus_per_worker=4, node_wait_seconds=60)
    assert rooms.room(config, 2, EMPTY, silent).cpus == 8
    assert autoscaler.asked == [[{"CPU": 4}] * 2]
    assert autoscaler.waiting == []  # or it would hold what the workers are to get


def test_each_worker_gets_a_gpu_where_the_first_node_has_one(grow: Any) -> None:
    autoscaler = grow((8, 1), (8, 1))
    assert rooms.room(SessionConfig(workers=2, node_wait_seconds=60), 2, EMPTY, silent).gpus == 2
    assert autoscaler.asked == [[{"CPU": 1}] * 2, [{"CPU": 1, "GPU": 1.0}] * 2]
    assert autoscaler.waiting == []


@pytest.mark.parametrize(("joined", "seconds"), [(True, 0), (False, 60)])
def test_nobody_is_asked_without_a_wait_or_on_a_cluster_of_ones_own(grow: Any, joined: bool, seconds: float) -> None:
    autoscaler = grow((4, 0))
    config = SessionConfig(workers=1, node_wait_seconds=seconds)
    with pytest.raises(TrainingError, match="the cluster has 0"):
        rooms.room(config, 1, Cluster((), joined), silent)
    assert autoscaler.asked == []


def test_nodes_that_do_not_come_are_not_awaited_for_ever(grow: Any) -> None:
    autoscaler = grow((1, 0))
    config = SessionConfig(workers=2, node_wait_seconds=0.05, parallel="data")
    with pytest.raises(TrainingError, match="2 workers need 2 CPU cores, the cluster has 1"):
        rooms.room(config, 1, EMPTY, silent)
    assert autoscaler.waiting == []


def test_a_cluster_with_room_is_asked_for_nothing(grow: Any) -> None:
    autoscaler, there = grow(), Cluster(((8, 0),), joined=True)
    assert rooms.room(SessionConfig(workers=2, node_wait_seconds=60), 2, there, silent) is there
    assert autoscaler.asked == []


@pytest.mark.usefixtures("ray_cluster")
def test_what_two_sessions_ask_for_stands_side_by_side_and_goes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to the autoscaler itself would replace the other's, and stay if the session is killed."""
    other = ray.util.placement_group([{"CPU": 60}])
    found = list[list[dict[str, Any]]]()

    def seen(joined: bool) -> Cluster:
        found.append([*ray.util.placement_group_table().values()])
        return Cluster(((50, 0),), joined)

    monkeypatch.setattr(rooms, "seen", seen)
    rooms.room(SessionConfig(workers=1, cpus_per_worker=50, node_wait_seconds=60), 1, EMPTY, silent)
    pending = [group["bundles"][0] for group in found[0] if group["state"] == "PENDING"]
    assert {"CPU": 50.0} in pending
    assert {"CPU": 60.0} in pending
    ray.util.remove_placement_group(other)
    table = ray.util.placement_group_table().values()
    left = [group["state"] for group in table if group["bundles"][0] in ({"CPU": 50.0}, {"CPU": 60.0})]
    assert left == ["REMOVED"] * 2
