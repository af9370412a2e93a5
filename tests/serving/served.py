"""What the tests of this folder know of their server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from condu_ray.store import Store


@dataclass(frozen=True)
class Served:
    """Where the server is, what it serves, and pictures to ask about. learn: publishes one more task."""

    url: str
    store: Store
    pictures: list[Path]
    learn: Callable[[str], int]
