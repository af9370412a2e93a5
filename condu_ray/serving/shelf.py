"""The versions that a process has loaded: one that serves, and a few others. Knows no Ray.

A new version is built aside and takes the place of the old one by a single assignment; one that cannot be built leaves
everything as it was, and says why.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from condu_ray.errors import ConduError, NotFound
from condu_ray.voting.classifier import Classifier

AGAIN_SECONDS = 30.0
"""After so long a version that could not be loaded is tried again: its store may have been out of reach."""

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Fault:
    """Why a version does not serve. version: None where the store itself cannot be read."""

    version: int | None
    reason: str


class Shelf:
    """Loaded versions of one store.

    versions: the numbers there are, oldest first. load: builds a version, ready to answer; slow, may raise anything.
    keep: how many versions besides the one that serves stay loaded.
    """

    def __init__(self, versions: Callable[[], list[int]], load: Callable[[int], Classifier], keep: int) -> None:
        self._versions, self._load, self._keep = versions, load, keep
        self._others: OrderedDict[int, Classifier] = OrderedDict()
        self._current: Classifier | None = None
        self._pinned: int | None = None
        self._held: int | None = None
        self._loading = Lock()
        self._tried = 0.0
        self.fault: Fault | None = None
        self.newest: int | None = None

    @property
    def current(self) -> Classifier:
        """The version that serves. Raises NotFound before the first `refresh`."""
        if self._current is None:
            raise NotFound("no version is loaded yet", "ask again in a moment")
        return self._current

    def pin(self, version: int | None) -> None:
        """From the next `refresh` on this version serves, or (None) the newest."""
        self._pinned, self._tried = version, 0.0

    def hold(self, version: int | None) -> None:
        """Once loaded this version stays, besides those that `keep` counts; None: no version does."""
        self._held = version

    def refresh(self) -> bool:
        """Loads what should serve, if that is another version; returns whether it changed. Never raises.

        Without a version that serves yet, an older one than wanted will do. Others that are no longer in the store are
        let go: gc removes what was forgotten.
        """
        with self._loading:
            try:
                known = self._versions()
                for version in [each for each in self._others if each not in known]:
                    del self._others[version]
                self.newest = known[-1] if known else None
                if not known or (self._pinned is not None and self._pinned not in known):
                    raise NotFound(f"version {self._pinned or 1} is not in the store", "learn a task, or pin another")
            except Exception as error:
                self.fault = Fault(None, sentence_of(error))
                return False
            wanted = self._pinned or known[-1]
            if self._current is not None and self._current.version == wanted:
                self.fault = None
                return False
            if self.fault and self.fault.version == wanted and time.monotonic() - self._tried < AGAIN_SECONDS:
                return False
            older = [version for version in reversed(known) if version < wanted] if self._current is None else []
            return any(self._take(version, wanted) for version in (wanted, *older))

    def _take(self, version: int, wanted: int) -> bool:
        try:
            loaded = self._others.pop(version, None) or self._load(version)
        except Exception as error:
            log.warning("version %s cannot be loaded", version, exc_info=error, extra={"version": version})
            if version == wanted:
                self.fault, self._tried = Fault(version, sentence_of(error)), time.monotonic()
            return False
        before, self._current = self._current, loaded
        if version == wanted:
            self.fault = None
        if before is not None:
            before.cached.empty()  # its experts may be as large as models, and few will ask for them
            self._put_aside(before)
        log.info("version %s serves", version, extra={"version": version})
        return True

    def at_hand(self, version: int | None) -> Classifier | None:
        """The version that serves (None), or one by its number if it is loaded."""
        if version is None or version == self.current.version:
            return self.current
        return self._others.get(version)

    def fetch(self, version: int) -> Classifier:
        """A version by its number, loaded if need be; slow. Raises what `load` raises, NotFound among it."""
        with self._loading:
            found = self.at_hand(version) or self._load(version)
            if found is not self._current:
                self._put_aside(found)
            return found

    def _put_aside(self, loaded: Classifier) -> None:
        self._others[loaded.version] = loaded
        self._others.move_to_end(loaded.version)
        spare = [version for version in self._others if version != self._held]
        for version in spare[: max(0, len(spare) - self._keep)]:
            del self._others[version]


def sentence_of(error: Exception) -> str:
    """One sentence for whoever runs the server."""
    return str(error) if isinstance(error, ConduError) else f"{type(error).__name__}: {error}"
