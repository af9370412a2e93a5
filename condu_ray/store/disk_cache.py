"""Objects of far stores on this machine's disk, by content: what was read once is mapped from here.

<CONDU_CACHE>/store/objects/<sha256>    whole objects, the least used one goes first when there are too many bytes
<CONDU_CACHE>/store/tmp/                files that are being written

Several processes share the folder. A file that goes while another process has it mapped stays readable for that one.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from condu_ray.errors import StoreError
from condu_ray.paths import cache_root

DEFAULT_LIMIT_GIB = 20.0
_ABANDONED_S = 24 * 3600.0


class DiskCache:
    """At most `limit` bytes of objects in `folder`, the one that was put last aside."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._objects, self._tmp, self._limit = folder / "objects", folder / "tmp", limit

    def find(self, sha256: str, size: int) -> Path | None:
        """The file with these bytes, if it has been put here; its content is for the caller to check."""
        path = self._objects / sha256
        try:
            state = path.stat()
            if state.st_size != size:
                return None
        except OSError:
            return None
        with suppress(OSError):  # of another user, or in a folder that is only read
            os.utime(path, ns=(time.time_ns(), state.st_mtime_ns))  # when it was used; its content is as old as before
        return path

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A name for a new file beside the objects; afterwards that name is gone again."""
        path = self._tmp / uuid.uuid4().hex
        try:
            for folder in (self._objects, self._tmp):
                folder.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:
            mend = "set CONDU_CACHE to a folder with space"
            raise StoreError(f"the cache folder {self._tmp} cannot be written ({error.strerror})", mend) from error
        finally:
            path.unlink(missing_ok=True)

    def put(self, file: Path, sha256: str) -> Path:
        """Gives a file made by `temporary` its place, and makes room; returns its new name."""
        path = self._objects / sha256
        os.replace(file, path)
        self._trim(path)
        return path

    def drop(self, sha256: str) -> None:
        """Removes the file with these bytes."""
        (self._objects / sha256).unlink(missing_ok=True)

    def _trim(self, newest: Path) -> None:
        files = []
        for path in self._objects.iterdir():
            with suppress(FileNotFoundError):  # another process makes room too
                state = path.stat()
                files.append((state.st_atime, state.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit:
                break
            if path != newest:
                with suppress(PermissionError):  # another user's, in a folder where each removes his own
                    path.unlink(missing_ok=True)
                    total -= size
        for path in self._tmp.iterdir():  # of processes that were killed
            with suppress(FileNotFoundError, PermissionError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)


def store_cache() -> DiskCache:
    """The cache that the environment asks for: CONDU_CACHE, and CONDU_CACHE_GIB for its limit.

    Raises StoreError for a limit that is no number above 0.
    """
    root = cache_root()
    text = os.environ.get("CONDU_CACHE_GIB") or str(DEFAULT_LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        raise StoreError(f"CONDU_CACHE_GIB is {text!r}", "give a number of GiB above 0")
    return DiskCache(root / "store", int(limit * 2**30))
