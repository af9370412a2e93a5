"""Pieces of one vector, worked on by the cores that the process may use. What comes out depends on neither."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int | None = None) -> list[_Result]:
    """Results in the order of the items; of several errors, that of the earliest item. threads: [all cores]."""
    work = list(items)
    workers = min(threads or cores(), len(work))
    if workers < 2:
        return [function(item) for item in work]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, work))
