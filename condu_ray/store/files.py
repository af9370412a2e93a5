"""Files that appear whole or not at all.

A file is written under a temporary name, flushed to the disk, and then given its real name by a hard link, which fails
if the name is taken. Where a file system has no hard links a rename under the store's lock does the same.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from condu_ray.errors import StoreError
from condu_ray.store.base import Digest

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV}
_CHUNK = 1 << 22


def refusal(error: OSError, what: str, path: Path) -> StoreError:
    """Turns an error of the operating system into a sentence with a mend; `what` was tried on `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        mend = "free some space (`condu-ray gc` removes old versions) or choose another --store; nothing was changed"
        return StoreError(f"no space left to {what} {path}", mend)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        mend = "give this user the permission or choose another --store"
        return StoreError(f"no permission to {what} {path} ({error.strerror})", mend)
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StoreError(f"cannot {what} {path}: a file is in the way", "choose another --store")
    return StoreError(f"cannot {what} {path} ({error.strerror or error})")


def hash_file(path: Path) -> Digest:
    """Counts and hashes the bytes of a file."""
    total = Digest()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, so that a new file survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse, and are synchronous anyway
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Holds the folder's advisory lock (freed by the system if the process dies); False where there are no locks.

    A file, open for writing: NFS, SMB and FUSE pass on the locks of such, and keep those of folders to one machine.
    """
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        yield False
        return
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


@contextmanager
def temporary(folder: Path, parts: Iterable[Any]) -> Iterator[Path]:
    """Writes the pieces to a new file in `folder`, flushed to the disk; afterwards that name is gone again."""
    folder.mkdir(exist_ok=True)
    path = folder / uuid.uuid4().hex
    try:
        with open(path, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(source: Path, target: Path, locked: bool) -> None:
    """Gives a finished temporary file its real name.

    locked: whether the caller holds the store's lock. Raises FileExistsError if the name is taken by another file. An
    error with unknown outcome (a network file system may report one for a link that was made) is read back first.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if not _is_same(source, target):
            if error.errno not in _NO_LINKS:
                raise
            _rename(source, target, locked)
    sync_folder(target.parent)
    sync_folder(target.parent.parent)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _rename(source: Path, target: Path, locked: bool) -> None:
    if target.exists():
        raise FileExistsError(errno.EEXIST, "exists", str(target))
    if not locked:
        mend = "choose a --store on another file system"
        raise StoreError(f"the file system of {target.parent} has neither hard links nor locks", mend)
    os.rename(source, target)
