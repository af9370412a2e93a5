"""A pool that loses a node with several of its actors at once. Its actors are plain objects here, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from condu_ray.config import SessionConfig
from condu_ray.engine import pool as pools
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.pool import Pool
from condu_ray.engine.progress import no_update
from condu_ray.errors import TrainingError


class Node:
    """One of whose actors' calls the node does not survive, if any."""

    def __init__(self, lives: int | None = None) -> None:
        self.left = lives

    @property
    def lost(self) -> bool:
        return self.left is not None and self.left <= 0


class Actor:
    def __init__(self, node: Node) -> None:
        self._node = node
        self.__ray_ready__ = SimpleNamespace(remote=lambda: self._answer(True))
        self.double = SimpleNamespace(remote=self._double)

    def _double(self, number: int) -> Callable[[], Any]:
        if self._node.left is not None:
            self._node.left -= 1
        return self._answer(2 * number)

    def _answer(self, what: Any) -> Callable[[], Any]:
        def answer() -> Any:
            if self._node.lost:
                raise RayActorError
            return what

        return answer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Node]], tuple[Pool, list[int]]]:
    """A pool of an actor on each of these nodes, which finds no place for more; and how many it sought each time."""

    def wait(refs: Sequence[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        return list(refs[:num_returns]), list(refs[num_returns:])

    monkeypatch.setattr(pools, "ray", SimpleNamespace(wait=wait, kill=lambda actor: None))
    monkeypatch.setattr(pools, "answer_of", lambda ref: ref())

    def make(nodes: list[Node]) -> tuple[Pool, list[int]]:
        pool, sought = Pool(None, SessionConfig(), Cluster(((len(nodes), 0),), joined=True)), list[int]()  # type: ignore[arg-type]
        places = [Actor(node) for node in nodes]

        def hire(count: int, update: Any) -> list[Any]:
            sought.append(count)
            found, places[:] = places[:count], places[count:]
            if not found and not pool._actors:
                raise TrainingError("no CPU core of the cluster came free")
            return list(found)

        monkeypatch.setattr(pool, "_hire", hire)
        return pool, sought

    return make


def test_work_of_one_actor_survives_a_node_with_many(made: Any) -> None:
    """A call was handed from one actor of the lost node to the next, three times."""
    doomed, well = Node(lives=1), Node()
    pool, sought = made([doomed] * 4 + [well])
    pool._hired(5, no_update)
    assert pool.alone(lambda actor: pools.answer_of(actor.double.remote(21)), no_update) == 42
    assert sought == [5, 4]


def test_the_last_calls_of_a_step_survive_a_node_with_many(made: Any) -> None:
    doomed, well = Node(lives=1), Node()
    pool, sought = made([well] + [doomed] * 4)
    pool._hired(5, no_update)
    assert pool.spread([("double", (number,)) for number in range(2)], no_update) == [0, 2]
    assert sought == [5, 3]


def test_a_place_for_what_is_lost_is_sought_once(made: Any) -> None:
    """Each try waits for a minute, and all other actors with it."""
    doomed, well = Node(lives=4), Node()
    pool, sought = made([well] + [doomed] * 4)
    assert pool.spread([("double", (number,)) for number in range(5)], no_update) == [0, 2, 4, 6, 8]
    assert sought == [5, 1]
    assert len(pool._actors) == 1


def test_a_call_that_ends_every_process_is_not_tried_for_ever(made: Any) -> None:
    pool, _ = made([Node(lives=1) for _ in range(6)])
    with pytest.raises(TrainingError, match="a process of this session is gone"):
        pool.alone(lambda actor: pools.answer_of(actor.double.remote(1)), no_update)
    with pytest.raises(TrainingError, match="a process of this session is gone"):
        pool.spread([("double", (1,))], no_update)


def test_a_pool_without_a_place_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session may hold every core for as long as it trains."""
    waits = iter([([], ["ref"]), ([], ["ref"]), (["ref"], [])])
    monkeypatch.setattr(pools, "ray", SimpleNamespace(wait=lambda refs, **given: next(waits)))
    monkeypatch.setattr(pools, "answer_of", lambda ref: True)
    actor, notes = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=lambda: "ref")), list[str]()
    assert pools.those_ready([actor], "GPU", lambda done, total, note: notes.append(note)) == [actor]
    assert notes == ["waiting for a GPU of the cluster to come free (`ray status`)"] * 2
