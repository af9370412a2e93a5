"""Processes that train a task together do the same, whatever each of them sees in the store at its moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_crew import make_store, opened, settings

from condu_ray.config import SessionConfig
from condu_ray.engine.session import _jobs
from condu_ray.engine.work import Job, checkpoints, work_through
from condu_ray.methods.checkpoint import Checkpoint
from condu_ray.methods.training import Place
from condu_ray.store import Store

PATIENCE_S = 120


class Two:
    """Places of two threads, which stand for the processes of a group."""

    def __init__(self) -> None:
        self._meeting, self._said = threading.Barrier(2, timeout=PATIENCE_S), [(0,), (0,)]

    def places(self) -> list[Place]:
        return [Place(rank, 2, barrier=self._meet, agree=self._asked_by(rank)) for rank in range(2)]

    def _meet(self) -> None:
        self._meeting.wait()

    def _asked_by(self, rank: int) -> Callable[..., bool]:
        def agree(*numbers: Any) -> bool:
            self._said[rank] = numbers
            self._meet()
            same = self._said[0] == self._said[1]
            self._meet()
            return same

        return agree


class Late:
    """A store that shows this process a delta only when it looks a third time."""

    def __init__(self, store: Store) -> None:
        self._store, self._looks = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def find(self, key: str, name: str) -> Any:
        if name == "delta":
            self._looks += 1
            if self._looks <= 2:
                return None
        return self._store.find(key, name)


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> SessionConfig:
    return settings(tmp_path / "store", tiny_model_dir)


@pytest.fixture
def job(config: SessionConfig, picture_tasks: dict[str, Path]) -> Job:
    return _jobs(make_store(config), config, opened(picture_tasks, "colours"))[0]


def test_a_delta_that_one_of_them_sees_is_trained_by_none(config: SessionConfig, job: Job) -> None:
    """Another session puts it between their looks: the one that goes on must not wait for the other for ever."""
    store = make_store(config)
    work_through(store, config, [job], Place(), lambda step: None)
    steps = list[int]()

    def take_part(place: Place) -> None:
        seen: Any = store if place.rank == 0 else Late(store)
        work_through(seen, config, [job], place, lambda step: steps.append(place.rank))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(take_part, Two().places()))
    assert steps == []


@pytest.mark.parametrize(
    ("other", "resumed"),
    [
        ({"step": np.array([3]), "parameter/w": np.ones(2)}, True),
        ({"step": np.array([2]), "parameter/w": np.ones(2)}, False),
        ({"parameter/w": np.ones(2)}, False),
        (None, False),
    ],
)
def test_they_go_on_from_a_checkpoint_that_all_of_them_found(other: Checkpoint | None, resumed: bool) -> None:
    found = [{"step": np.array([3]), "parameter/w": np.ones(2)}, other]

    def load(place: Place) -> Checkpoint | None:
        class Here:
            def load_work(self, key: str, name: str) -> Checkpoint | None:
                return found[place.rank]

        return checkpoints(Here(), "key", place).load()  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(load, Two().places()))
    assert [each is not None for each in loaded] == [resumed, resumed]
