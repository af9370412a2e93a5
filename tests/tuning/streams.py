"""What tests of sweeps share: a stream that is ready to be scored again, and records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.store import Store
from condu_ray.tuning.cache import Cached
from condu_ray.tuning.records import Record, Report

SHARE = 0.34


@dataclass(frozen=True)
class Stream:
    """A stream that is ready to be scored again. tasks: their `test` holds the validation pictures."""

    config: SessionConfig
    store: Store
    tasks: list[TaskData]
    cached: Cached


def ended(number: int, settings: dict[str, Any], *values: float, state: Any = "finished", budget: int = 3) -> Record:
    """A trial that has ended with these values; budget: how far it went."""
    return Record(number, settings, (Report(budget, values, {}, 3, 0.0),), state)
