"""Tasks are dealt out to workers so that all end at about the same time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from condu_ray.config import SessionConfig
from condu_ray.engine.train import deal
from condu_ray.engine.work import Job
from condu_ray.methods.training import steps_for

CONFIG = SessionConfig()


def jobs(sizes: list[int]) -> list[Job]:
    return [Job(f"key-{i}", cast(Any, SimpleNamespace(train=range(size)))) for i, size in enumerate(sizes)]


def steps(dealt: list[Job]) -> int:
    return sum(steps_for(len(job.data.train), CONFIG) for job in dealt)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=12), st.integers(1, 5))
def test_every_task_is_trained_by_one_worker_and_none_has_a_whole_task_too_much(sizes: list[int], workers: int) -> None:
    given_jobs = jobs(sizes)
    dealt = deal(given_jobs, workers, CONFIG)
    assert sorted(job.key for mine in dealt for job in mine) == sorted(job.key for job in given_jobs)
    longest = max(steps([job]) for job in given_jobs)
    assert max(map(steps, dealt)) - min(map(steps, dealt)) <= longest


def test_one_worker_keeps_the_order_given() -> None:
    given_jobs = jobs([10, 5000, 300])
    assert deal(given_jobs, 1, CONFIG) == [given_jobs]


def test_the_longest_task_does_not_wait_behind_another() -> None:
    dealt = deal(jobs([800, 2100, 600, 1000, 700]), 2, CONFIG)
    assert [[job.key for job in mine] for mine in dealt] == [["key-1", "key-2"], ["key-3", "key-0", "key-4"]]
