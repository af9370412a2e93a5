"""Reads, hashes and decodes every picture once, in threads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from condu_ray.data.picture import Unreadable, inspect, read_bytes, reason
from condu_ray.data.task import Picture

Progress = Callable[[int, int], None]
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Seen:
    """digest: blake2b of the file's bytes (32 bytes). width, height: pixels."""

    digest: bytes
    width: int
    height: int


def scan(pictures: Sequence[Picture], progress: Progress | None = None) -> list[Seen | str]:
    """Returns for each picture what was seen, or in a few words why it cannot be used.

    progress: called with (done, total) from the calling thread.
    """
    chunks = [pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK)]
    results: list[Seen | str] = []
    # PIL warns of odd metadata and of sizes below our own limit: what matters is whether the picture decodes.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="condu-scan")
        try:
            for part in pool.map(_scan_chunk, chunks):
                results.extend(part)
                if progress is not None:
                    progress(len(results), len(pictures))
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def _scan_chunk(pictures: Sequence[Picture]) -> list[Seen | str]:
    results: list[Seen | str] = []
    with contextlib.ExitStack() as stack:
        path = ""
        file: IO[bytes] | None = None
        for picture in pictures:
            try:
                if picture.offset >= 0 and (file is None or picture.path != path):
                    stack.close()
                    file, path = stack.enter_context(open(picture.path, "rb")), picture.path
                body = read_bytes(picture, file if picture.offset >= 0 else None)
                width, height = inspect(body)
                results.append(Seen(hashlib.blake2b(body, digest_size=32).digest(), width, height))
            except (OSError, Unreadable) as error:
                results.append(reason(error))
    return results
