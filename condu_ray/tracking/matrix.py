"""The accuracy matrix of a stream of tasks, and Transfer, Average and Last (MTIL; ZSCL, section 5).

A[r][c] is the accuracy on task c, in percent, after the session of task r; tasks in the order learned, 0 <= r, c < n.
There is no row before the first session. Where a figure needs an entry that was not measured (NaN) it is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AccuracyMatrix:
    """tasks: n names in the order learned. values: n rows of n accuracies in percent; None or NaN: not measured.

    Raises ValueError if the values are not n by n, or there are no tasks.
    """

    tasks: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def __init__(self, tasks: Iterable[str], values: Iterable[Iterable[float | None]]) -> None:
        rows = tuple(tuple(math.nan if value is None else float(value) for value in row) for row in values)
        object.__setattr__(self, "tasks", tuple(tasks))
        object.__setattr__(self, "values", rows)
        n = len(self.tasks)
        if n == 0 or len(rows) != n or any(len(row) != n for row in rows):
            raise ValueError(f"{n} tasks need {n} rows of {n} accuracies, found rows of {[len(row) for row in rows]}")

    def transfer_row(self) -> list[float | None]:
        """Returns for each task the mean over the sessions before its own; None for the first task, which has none."""
        return [None, *(mean([self.values[r][c] for r in range(c)]) for c in range(1, len(self.tasks)))]

    def average_row(self) -> list[float | None]:
        """Returns for each task the mean over all sessions, those before its own included."""
        return [mean(column) for column in zip(*self.values, strict=True)]

    def last_row(self) -> list[float | None]:
        """Returns for each task the accuracy after the last session."""
        return [mean([value]) for value in self.values[-1]]

    def transfer(self) -> float | None:
        """Returns the mean of `transfer_row` over all tasks but the first; None for a single task."""
        return mean(self.transfer_row()[1:])

    def average(self) -> float | None:
        """Returns the mean of `average_row`."""
        return mean(self.average_row())

    def last(self) -> float | None:
        """Returns the mean of `last_row`."""
        return mean(self.last_row())

    def incremental_row(self, pictures: Sequence[int]) -> list[float | None]:
        """Returns for each session the accuracy over all test pictures of the tasks learned so far, each counting once.

        pictures: how many test pictures each task has.
        """
        return [
            mean([value for value, count in zip(row[: r + 1], pictures, strict=False) for _ in range(count)])
            for r, row in enumerate(self.values)
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns tasks, values (null where not measured), and the three means, ready for `json.dumps`."""
        return {
            "tasks": list(self.tasks),
            "values": [[None if math.isnan(value) else value for value in row] for row in self.values],
            "transfer": self.transfer(),
            "average": self.average(),
            "last": self.last(),
        }


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean, None where there is no value or one was not measured (None or NaN)."""
    measured = [value for value in values if value is not None and not math.isnan(value)]
    if not values or len(measured) < len(values):
        return None
    return math.fsum(measured) / len(measured)
