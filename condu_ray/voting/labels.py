"""What can be answered: the classes of a task, the caller's own labels, or everything learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, Protocol

from condu_ray.data import DEFAULT_TEMPLATES, prompts
from condu_ray.errors import DataError

MAX_CANDIDATES = 10_000


class Card(Protocol):
    """What a label space needs to know of a task."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def templates(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Label:
    """A class of a task, or (`task` None) a label that the caller gave."""

    task: str | None
    name: str


@dataclass(frozen=True)
class Block:
    """The labels of one task (or of the caller) in a label space: indices start to stop, and their prompts."""

    task: str | None
    start: int
    stop: int
    prompts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LabelSpace:
    """Labels, those of one task side by side, and for each label the texts that stand for it."""

    kind: Literal["task", "candidates", "union"]
    labels: tuple[Label, ...]
    prompts: tuple[tuple[str, ...], ...]

    @staticmethod
    def of_task(card: Card) -> LabelSpace:
        """The classes of one task, by its own templates."""
        return LabelSpace("task", *_of_cards([card]))

    @staticmethod
    def of_candidates(names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> LabelSpace:
        """The caller's labels. Raises DataError for none, an empty one, one given twice, or more than 10,000."""
        names = [name.strip() for name in names]
        if not 1 <= len(names) <= MAX_CANDIDATES:
            raise DataError(f"{len(names)} labels given", f"give 1 to {MAX_CANDIDATES:,}")
        if "" in names:
            raise DataError(f"label {names.index('') + 1} of {len(names)} is empty", "leave it out")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise DataError(f"label '{name}' is given {times} times", "give each label once")
        labels = tuple(Label(None, name) for name in names)
        return LabelSpace("candidates", labels, tuple(tuple(prompts(name, templates)) for name in names))

    @staticmethod
    def of_union(cards: Iterable[Card]) -> LabelSpace:
        """All classes of all tasks, each by its task's templates; a name that two tasks share stays two labels."""
        return LabelSpace("union", *_of_cards(cards))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The labels cut by task."""
        blocks: list[Block] = []
        for task, group in groupby(self.labels, key=lambda label: label.task):
            start = blocks[-1].stop if blocks else 0
            stop = start + len(list(group))
            blocks.append(Block(task, start, stop, self.prompts[start:stop]))
        return tuple(blocks)


def _of_cards(cards: Iterable[Card]) -> tuple[tuple[Label, ...], tuple[tuple[str, ...], ...]]:
    pairs = [(card, name) for card in cards for name in card.classes]
    labels = tuple(Label(card.name, name) for card, name in pairs)
    return labels, tuple(tuple(prompts(name, card.templates)) for card, name in pairs)
