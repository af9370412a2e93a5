"""What a sweep looks for: figures of a trial by name, and how they become numbers to make larger.

A row is what one version answers: accuracy in percent by task of the stream, learned or not; None: not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from condu_ray.tracking.matrix import mean

Name = Literal["accuracy", "last", "average", "zero_shot_loss", "latency"]
Row = Sequence[float | None]

SENSE: dict[str, int] = {"accuracy": 1, "last": 1, "average": 1, "zero_shot_loss": -1, "latency": -1}
"""1: more is better, -1: less is better."""

UNITS = {
    "accuracy": "accuracy %",
    "last": "Last %",
    "average": "Average %",
    "zero_shot_loss": "zero-shot loss, points",
    "latency": "ms a picture",
}


@dataclass(frozen=True)
class Goals:
    """names: the objectives, the first one chooses the best. penalty: points that an accuracy loses for each point of
    zero-shot loss. latency: ms a picture above which an accuracy does not count; None: no bound."""

    names: tuple[Name, ...]
    penalty: float = 0.0
    latency: float | None = None

    @property
    def unseen(self) -> bool:
        """Whether tasks that are not learned yet have to be measured."""
        return self.penalty > 0 or "average" in self.names or "zero_shot_loss" in self.names

    @property
    def timed(self) -> bool:
        return self.latency is not None or "latency" in self.names

    def too_slow(self, figures: Mapping[str, float]) -> bool:
        return self.latency is not None and figures["latency"] > self.latency

    def values(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """One number an objective, each in its own sense (see SENSE).

        An accuracy above the latency bound becomes minus the latency over the bound: below every accuracy, and better
        the nearer it is to the bound.
        """
        return tuple(self._value(name, figures) for name in self.names)

    def _value(self, name: Name, figures: Mapping[str, float]) -> float:
        if SENSE[name] < 0:
            return figures[name]
        if self.latency is not None and self.too_slow(figures):
            return -figures["latency"] / self.latency
        lost = max(0.0, figures["zero_shot_loss"]) if self.penalty else 0.0
        return figures[name] - self.penalty * lost


def figures_of(rows: Sequence[Row], zero_shot: Row) -> dict[str, float]:
    """Figures after the first R versions of a stream of T tasks, R <= T; row r is the version that learned task r.

    last: mean over the tasks learned so far, by the last of the versions. average: mean over all tasks and versions so
    far. zero_shot_loss: over the tasks after the first, by how much the versions before their own answer them worse
    than θ⁰ (row `zero_shot`); 0 for a single task. After T versions these are Last and Average of
    tracking/matrix.py, and the loss is zero-shot less Transfer. A figure that lacks an entry is left out.
    """
    learned = len(rows)
    tasks = range(len(rows[0]))
    found = {"last": mean(rows[-1][:learned]), "average": mean([value for row in rows for value in row])}
    losses: list[float | None] = []
    for task in tasks[1:]:
        before = mean([row[task] for row in rows[:task]])
        base = zero_shot[task]
        losses.append(None if before is None or base is None else base - before)
    found["zero_shot_loss"] = mean(losses) if losses else 0.0
    return {name: value for name, value in found.items() if value is not None}


def dominates(one: Sequence[float], other: Sequence[float], names: Sequence[str]) -> bool:
    """Whether `one` is as good in every objective and better in one."""
    pairs = [(SENSE[name] * a, SENSE[name] * b) for name, a, b in zip(names, one, other, strict=True)]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def front(values: Sequence[Sequence[float]], names: Sequence[str]) -> list[int]:
    """Positions of those that no other one dominates (Pareto), the best in the first objective first; of equals the
    first."""
    order = sorted(
        range(len(values)), key=lambda i: [-SENSE[name] * v for name, v in zip(names, values[i], strict=True)]
    )
    kept: list[int] = []
    for position in order:
        known = [values[each] for each in kept]
        if not any(
            dominates(other, values[position], names) or tuple(other) == tuple(values[position]) for other in known
        ):
            kept.append(position)
    return kept
