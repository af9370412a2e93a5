"""Says again and again that what a session has finished is in use, or gc would take it from one that lasts long."""

from __future__ import annotations

import time
from collections.abc import Sequence

from condu_ray.store import Store

TOUCH_SECONDS = 3600.0


class Keeper:
    """Of these objects (paths as in `ObjectRef`; those that are not there are no matter) and of a place for work."""

    def __init__(self, store: Store, paths: Sequence[str], work: str | None = None) -> None:
        self._store, self._paths, self._work = store, paths, work
        self._touched = time.monotonic()

    def touch(self) -> None:
        """Does it, unless it has been done within the hour."""
        if time.monotonic() - self._touched < TOUCH_SECONDS:
            return
        for path in self._paths:
            self._store.touch(path)
        if self._work is not None:
            self._store.work(self._work)
        self._touched = time.monotonic()
