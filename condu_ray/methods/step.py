"""What a training says of itself while it runs. Imports no torch: who only passes it on needs none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Losses = list[tuple[int, float]]
"""(step, loss), steps counted from 1; about a hundred of a training."""


@dataclass(frozen=True)
class Step:
    """What is reported while a task trains. loss: of this process's share of the batch."""

    task: str
    step: int
    steps: int
    loss: float
    pictures_per_second: float


class Log:
    """Reports each step of a training, and keeps its losses."""

    def __init__(
        self, task: str, steps: int, on_step: Callable[[Step], None], losses: Sequence[tuple[int, float]] = ()
    ) -> None:
        self.losses: Losses = list(losses)
        self._task, self._steps, self._on_step, self._begun = task, steps, on_step, time.monotonic()

    def done(self, steps: int, loss: float, pictures: int) -> None:
        """After as many `steps`; `pictures` is how many the last one took."""
        if (steps - 1) % max(1, self._steps // 100) == 0 or steps == self._steps:
            self.losses.append((steps, loss))
        now = time.monotonic()
        self._on_step(Step(self._task, steps, self._steps, loss, pictures / max(1e-9, now - self._begun)))
        self._begun = now
