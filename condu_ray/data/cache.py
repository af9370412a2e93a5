"""The cache folder: compressed tars unpacked to plain ones, data sets of torchvision as picture files."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from condu_ray.errors import DataError
from condu_ray.paths import cache_root

_OPENERS: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)
_OLD = 7 * 86400  # seconds after which nobody can still be at work on a partial copy


def cache_folder(kind: str) -> Path:
    """Returns CONDU_CACHE (or ~/.cache/condu-ray) / kind, made if needed. Raises DataError if it cannot be written."""
    root = cache_root()
    try:
        (root / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    return root / kind


def plain_tar(path: Path) -> Path:
    """Returns the tar itself if it is not compressed, else an unpacked copy in the cache.

    The copy's name holds the sha256 of the compressed tar and of the copy, and the copy is checked against its own
    name, so one that was damaged since is made anew. It appears under its name only when it is whole.
    """
    with open(path, "rb") as packed:
        head = packed.read(8)
        opener = next((opener for magic, opener in _OPENERS if head.startswith(magic)), None)
        if opener is None:
            return path
        packed.seek(0)
        key = hashlib.file_digest(packed, "sha256").hexdigest()
        folder = cache_folder("tars")
        for copy in sorted(folder.glob(f"{key}-*.tar")):
            if _sha256(copy) == copy.stem.partition("-")[2]:
                return copy
            copy.unlink(missing_ok=True)
        packed.seek(0)
        return _unpack(path, opener(packed), folder, key)


def _unpack(path: Path, stream: IO[bytes], folder: Path, key: str) -> Path:
    _sweep(folder)
    partial = _partial(folder)
    try:
        file = open(partial, "xb")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        digest = hashlib.sha256()
        with file:
            while chunk := _read(path, stream):
                digest.update(chunk)
                try:
                    file.write(chunk)
                except OSError as error:
                    raise _unwritable(folder, error) from error
        whole = folder / f"{key}-{digest.hexdigest()}.tar"
        os.replace(partial, whole)
        return whole
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, stream: IO[bytes]) -> bytes:
    try:
        return stream.read(1 << 20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged and cannot be unpacked ({error})", "fetch it again") from error


def fill(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`; if it was not there, `make` fills a temporary one beside it, renamed when it is whole."""
    if folder.is_dir():
        return folder
    _sweep(folder.parent)
    partial = _partial(folder.parent)
    try:
        partial.mkdir()
        make(partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        return folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(folder: Path) -> Path:
    """A new name there. Not by `tempfile`: what that makes is for this user alone, and a cache may be shared."""
    return folder / f"partial-{uuid.uuid4().hex}"


def _sweep(folder: Path) -> None:
    """Removes what killed processes left here."""
    for partial in folder.glob("partial-*"):
        with contextlib.suppress(OSError):  # another process may be at it, too
            if time.time() - partial.stat().st_mtime < _OLD:
                continue
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache folder {folder} cannot be written ({error.strerror})", "set CONDU_CACHE to a folder with space"
    )
