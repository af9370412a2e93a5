"""Progress of long work on standard error: bars on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 5.0

Update = Callable[[int, int, str], None]
"""(done, total, note) -> None"""

Stage = Callable[[str], AbstractContextManager[Update]]
"""Opens one stage of work, by its name."""


@contextmanager
def stage(name: str) -> Iterator[Update]:
    """Shows one stage of work for as long as the block runs; yields the function that moves it on."""
    console = Console(stderr=True)
    with _bar(name, console) if console.is_terminal else _lines(name) as update:
        yield update


@contextmanager
def _bar(name: str, console: Console) -> Iterator[Update]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=None, note="")
        yield lambda done, total, note: progress.update(bar, completed=done, total=total, note=note)


@contextmanager
def _lines(name: str) -> Iterator[Update]:
    begun = time.monotonic()
    last = [begun]

    def update(done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if now - last[0] >= LINE_SECONDS:
            last[0] = now
            print(f"{name}: {done} of {total} after {now - begun:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)

    yield update
    print(f"{name}: done in {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def silent(name: str) -> Iterator[Update]:
    """A stage that shows nothing."""
    yield no_update


def no_update(done: int, total: int, note: str) -> None:
    """Shows nothing."""
