"""A sweep as it runs: a table on a terminal, a line a trial elsewhere; on standard error, as all progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table as Drawn

from condu_ray.tuning.objectives import UNITS
from condu_ray.tuning.records import Record
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.space import Scalar

ROWS = 12
"""Trials that the table shows at most: those that run, then the best."""


def text(value: Scalar) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "unset" if value is None else str(value)


class Table:
    """The newest state of each trial."""

    def __init__(self, sweep: Sweep, live: Live | None) -> None:
        self._sweep, self._live = sweep, live
        self._records: dict[int, Record] = {}
        self._begun = time.monotonic()

    def show(self, record: Record) -> None:
        before = self._records.get(record.number)
        self._records[record.number] = record
        if self._live is not None:
            self._live.update(self.drawn())
        elif record.ended and (before is None or not before.ended):
            print(self._line(record), file=sys.stderr, flush=True)

    def drawn(self) -> Drawn:
        ended = sum(record.ended for record in self._records.values())
        seconds = time.monotonic() - self._begun
        drawn = Drawn(title=f"{ended} of {self._sweep.most} trials, {seconds:.0f} s", title_justify="left")
        names = [*self._sweep.space]
        units = [UNITS[name] for name in self._sweep.goals.names]
        for column in ("trial", "state", *names, *units, "steps"):
            drawn.add_column(column, overflow="fold")
        for record in self._shown():
            last = record.reports[-1] if record.reports else None
            values = [f"{value:.2f}" for value in last.values] if last else ["-"] * len(units)
            settings = [text(record.settings[name]) for name in names]
            drawn.add_row(str(record.number), record.state, *settings, *values, str(last.steps) if last else "-")
        return drawn

    def _shown(self) -> list[Record]:
        best = sorted(
            (record for record in self._records.values() if record.ended),
            key=lambda record: record.reached or (0, 0.0),
            reverse=True,
        )
        return [*(record for record in self._records.values() if not record.ended), *best][:ROWS]

    def _line(self, record: Record) -> str:
        settings = ", ".join(f"{name} {text(value)}" for name, value in record.settings.items())
        units = [UNITS[name] for name in self._sweep.goals.names]
        found = ", ".join(f"{unit} {value:.2f}" for unit, value in zip(units, record.values or (), strict=False))
        return f"trial {record.number} {record.state} ({settings}) {record.reason or found}".rstrip()


@contextmanager
def shown(sweep: Sweep) -> Iterator[Table]:
    """The table for as long as the block runs."""
    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        yield Table(sweep, None)
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        yield Table(sweep, live)
