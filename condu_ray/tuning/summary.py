"""What a sweep says in the end: the best, what matters, what does not, what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from condu_ray.tuning.objectives import front
from condu_ray.tuning.proposals import importances
from condu_ray.tuning.records import Record, finished
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.space import Choice, Log, size

MATTERS, HARDLY = 0.15, 0.05
"""Shares of importance from which a setting matters, and below which it hardly does."""

NEAR = 0.1
"""Share of a range that counts as its edge."""


def best_of(sweep: Sweep, records: Sequence[Record]) -> list[Record]:
    """The best trial, or the Pareto front of several objectives, the best in the first one first.

    Of a search that stops early only those that ran to the end: the others were measured half trained.
    """
    done = finished(records)
    values = [record.values for record in done if record.values is not None]
    return [done[place] for place in front(values, sweep.goals.names)]


def advice(sweep: Sweep, records: Sequence[Record], best: Record) -> dict[str, Any]:
    """{"importance": by setting, "matters": names, "hardly": names, "try": sentences}."""
    importance = importances(sweep, records)
    matters = [name for name, share in importance.items() if share >= MATTERS]
    hardly = [name for name, share in importance.items() if share < HARDLY]
    tries = [edge for name in sweep.space if (edge := _edge(sweep, name, best))]
    if matters and len(hardly) == len(sweep.space) - len(matters):
        tries.append(f"search again for {', '.join(matters)} alone, around the best, and leave the others as they are")
    if failed := sum(record.state == "failed" for record in records):
        tries.append(f"look at the reasons of the {failed} trials that failed, and narrow the space")
    if len(records) < size(sweep.space) and _still_rising(records):
        tries.append(
            "more trials (raise `trials`, the same command goes on): of those that finished, the last quarter "
            "still found better"
        )
    return {"importance": importance, "matters": matters, "hardly": hardly, "try": tries}


def cautions(sweep: Sweep, best: Record) -> list[str]:
    """What the best should not be taken for, in sentences."""
    found = []
    if sweep.goals.too_slow(best.figures):
        found.append(
            f"no configuration answers within latency_ms {sweep.latency_ms:g}: the best is the fastest, at "
            f"{best.figures['latency']:.3g} ms a picture. Raise latency_ms, or search smaller vote.k."
        )
    if sweep.search == "grid" and sweep.most < (there := size(sweep.space)):
        found.append(
            f"the grid was tried in part, {sweep.most:,} of {there:,.0f} combinations: raise `trials`, and the same "
            "command goes on."
        )
    return found


def _edge(sweep: Sweep, name: str, best: Record) -> str | None:
    """Whether the best value lies at an end of its range, where a better one may lie beyond."""
    entry, value = sweep.space[name], best.settings[name]
    if isinstance(entry, Choice) or isinstance(value, str | None):
        return None
    low, high = (float(each) for each in entry.corners() if isinstance(each, int | float))
    place = (
        math.log(float(value) / low) / math.log(high / low) if isinstance(entry, Log) else (value - low) / (high - low)
    )
    if NEAR < place < 1 - NEAR:
        return None
    size_of = "smaller" if place < 0.5 else "larger"
    return f"a {size_of} {name}: {value:.3g} is at the end of its range ({low:g} to {high:g})"


def _still_rising(records: Sequence[Record]) -> bool:
    values = [record.values[0] for record in finished(records) if record.values is not None]
    part = len(values) // 4
    return part > 0 and max(values[-part:]) > max(values[:-part])
