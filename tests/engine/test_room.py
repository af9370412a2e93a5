"""A cluster that is too small may grow: its autoscaler is asked for what the workers need, for as long as they work."""

from __future__ import annotations

from typing import Any

import pytest
from in_process_crew import silent

from condu_ray.config import SessionConfig
from condu_ray.engine import room as rooms
from condu_ray.engine.cluster import Cluster
from condu_ray.errors import TrainingError


class Autoscaler:
    """Brings nodes one after another, one each time somebody looks, once it was asked."""

    def __init__(self, *nodes: tuple[int, int]) -> None:
        self.asked: list[list[dict[str, float]]] = []
        self.coming, self.there = list(nodes), list[tuple[int, int]]()

    def request(self, bundles: list[dict[str, float]]) -> None:
        self.asked.append(bundles)

    def seen(self, joined: bool) -> Cluster:
        if self.asked and self.coming:
            self.there.append(self.coming.pop(0))
        return Cluster(tuple(self.there), joined)


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(*nodes: tuple[int, int]) -> Autoscaler:
        made = Autoscaler(*nodes)
        monkeypatch.setattr(rooms, "request_resources", made.request)
        monkeypatch.setattr(rooms, "seen", made.seen)
        monkeypatch.setattr(rooms, "LOOK_SECONDS", 0.001)
        return made

    return of


EMPTY = Cluster(((0, 0),), joined=True)


def test_nodes_are_asked_for_awaited_and_given_back(grow: Any) -> None:
    autoscaler = grow((4, 0), (4, 0))
    config = SessionConfig(workers=2, cpus_per_worker=4, node_wait_seconds=60)
    with rooms.room(config, 2, EMPTY, silent) as cluster:
        assert cluster.cpus == 8
        assert autoscaler.asked == [[{"CPU": 4}] * 2]
    assert autoscaler.asked[-1] == []


def test_each_worker_gets_a_gpu_where_the_first_node_has_one(grow: Any) -> None:
    autoscaler = grow((8, 1), (8, 1))
    with rooms.room(SessionConfig(workers=2, node_wait_seconds=60), 2, EMPTY, silent) as cluster:
        assert cluster.gpus == 2
        assert autoscaler.asked == [[{"CPU": 1}] * 2, [{"CPU": 1, "GPU": 1.0}] * 2]


@pytest.mark.parametrize(("joined", "seconds"), [(True, 0), (False, 60)])
def test_nobody_is_asked_without_a_wait_or_on_a_cluster_of_ones_own(grow: Any, joined: bool, seconds: float) -> None:
    autoscaler = grow((4, 0))
    config = SessionConfig(workers=1, node_wait_seconds=seconds)
    with pytest.raises(TrainingError, match="the cluster has 0"), rooms.room(config, 1, Cluster((), joined), silent):
        pass
    assert autoscaler.asked == []


def test_nodes_that_do_not_come_are_not_awaited_for_ever(grow: Any) -> None:
    autoscaler = grow((1, 0))
    config = SessionConfig(workers=2, node_wait_seconds=0.05, parallel="data")
    refused = pytest.raises(TrainingError, match="2 workers need 2 CPU cores, the cluster has 1")
    with refused, rooms.room(config, 1, EMPTY, silent):
        pass
    assert autoscaler.asked[-1] == []


def test_a_cluster_with_room_is_asked_for_nothing(grow: Any) -> None:
    autoscaler, there = grow(), Cluster(((8, 0),), joined=True)
    with rooms.room(SessionConfig(workers=2, node_wait_seconds=60), 2, there, silent) as cluster:
        assert cluster is there
    assert autoscaler.asked == []
