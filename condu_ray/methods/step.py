"""What a training says of itself while it runs. Imports nothing: who only passes it on needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What is reported while a task trains. loss: of this process's share of the batch."""

    task: str
    step: int
    steps: int
    loss: float
    pictures_per_second: float
