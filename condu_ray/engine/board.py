"""The newest step of each task that trains: workers write it up, the driver reads it and shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from condu_ray.engine.progress import Update
from condu_ray.errors import ConduError
from condu_ray.methods.step import Step

POLL_SECONDS = 0.5
REPORT_SECONDS = 0.5


class Board:
    """Ray actor: the newest step of each task, and what went wrong."""

    def __init__(self) -> None:
        self._steps: dict[str, Step] = {}
        self._fault: ConduError | None = None

    def step(self, step: Step) -> None:
        self._steps[step.task] = step

    def fail(self, fault: ConduError) -> None:
        self._fault = self._fault or fault

    def read(self) -> tuple[dict[str, Step], ConduError | None]:
        return self._steps, self._fault


def post() -> Any:
    """Starts a board, an actor that takes no CPU core; returns its handle."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote()


def reporter(board: Any) -> Callable[[Step], None]:
    """Returns a function that sends steps to the board, at most two a second; the last step it waits for.

    board: handle from `post`.
    """
    last = [0.0]

    def report(step: Step) -> None:
        now = time.monotonic()
        if step.step == step.steps:
            ray.get(board.step.remote(step))  # or the board may be ended before, and Ray prints about a lost call
        elif now - last[0] >= REPORT_SECONDS:
            last[0] = now
            board.step.remote(step)

    return report


def show(steps: Mapping[str, Step], total: int, update: Update) -> None:
    """Shows the steps of all tasks together as progress of `total`, with each task's loss and rate as a note."""
    note = "  ".join(
        f"{s.task} {s.step}/{s.steps} loss {s.loss:.2f} {s.pictures_per_second:.0f} pictures/s"
        for s in steps.values()
        if s.step < s.steps
    )
    update(sum(s.step for s in steps.values()), total, note)
