"""Marks what a session has finished as in use, every hour: gc removes what no version names after a day."""

from __future__ import annotations

import time
from collections.abc import Sequence

from condu_ray.store import Store

TOUCH_SECONDS = 3600.0


class Keeper:
    """Keeps the objects at these paths (as in `ObjectRef`) from gc, and the folder of unfinished work called `work`.

    Objects that are not there are passed over.
    """

    def __init__(self, store: Store, paths: Sequence[str], work: str | None = None) -> None:
        self._store, self._paths, self._work = store, paths, work
        self._touched = time.monotonic()

    def touch(self) -> None:
        """Marks all of it as in use, at most once an hour; cheap to call again and again."""
        if time.monotonic() - self._touched < TOUCH_SECONDS:
            return
        for path in self._paths:
            self._store.touch(path)
        if self._work is not None:
            self._store.work(self._work)
        self._touched = time.monotonic()
