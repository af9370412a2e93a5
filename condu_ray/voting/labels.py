"""What can be answered: the classes of a task, the caller's own labels, or everything learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from condu_ray.data import DEFAULT_TEMPLATES, prompts
from condu_ray.data.templates import word_key
from condu_ray.errors import DataError

MAX_CANDIDATES = 10_000
Place = tuple[str, int]
"""A task, and which of its classes, from 0."""


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
    """The labels of one task (or of the caller) in a label space: indices start to stop, and their prompts.

    learned: see `LabelSpace`.
    """

    task: str | None
    start: int
    stop: int
    prompts: tuple[tuple[str, ...], ...]
    learned: tuple[Place, ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """The caller's labels that are classes of one task: their places i64[N] among the labels, and among its classes."""

    labels: NDArray[np.int64]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class LabelSpace:
    """Labels, those of one task side by side, and for each label the texts that stand for it.

    learned: for each of a caller's labels the class that it is, where one model answers that has learned them all
    (`as_learned`); else empty.
    """

    kind: Literal["task", "candidates", "union"]
    labels: tuple[Label, ...]
    prompts: tuple[tuple[str, ...], ...]
    learned: tuple[Place, ...] = ()

    @staticmethod
    def of_task(card: Card) -> LabelSpace:
        """The classes of one task, by its own templates."""
        return LabelSpace("task", *_of_cards([card]))

    @staticmethod
    def of_candidates(names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> LabelSpace:
        """The caller's labels. Raises DataError for a text, none, an empty one, two that are one, or over 10,000."""
        if isinstance(names, str):  # or its letters would be the labels
            raise DataError(f"labels are one text ({names[:100]!r})", "give a list of labels")
        names = [name.strip() for name in names]
        if not 1 <= len(names) <= MAX_CANDIDATES:
            raise DataError(f"{len(names)} labels given", f"give 1 to {MAX_CANDIDATES:,}")
        seen: dict[str, str] = {}
        for number, name in enumerate(names, start=1):
            key = word_key(name)
            if not key:
                raise DataError(f"label {number} of {len(names)} is empty", "leave it out")
            if key in seen:
                twice = f"label '{name}' is given {names.count(name)} times"
                both = f"labels '{seen[key]}' and '{name}' cannot be told apart"
                raise DataError(twice if name == seen[key] else both, "give each label once")
            seen[key] = name
        labels = tuple(Label(None, name) for name in names)
        return LabelSpace("candidates", labels, tuple(tuple(prompts(name, templates)) for name in names))

    def as_learned(self, cards: Sequence[Card]) -> LabelSpace:
        """The caller's labels as classes, each by its task's templates, if every one is a class; else as they are.

        Of several tasks that have a label, one that has them all comes first, then the newest.
        """
        parts = self.by_task(cards)
        if not parts:
            return self
        chosen: dict[int, tuple[Card, int]] = {}
        having = [card for card in cards if card.name in parts]
        for card in sorted(having, key=lambda card: self.whole(parts[card.name])):  # the last that has a label keeps it
            part = parts[card.name]
            chosen |= {
                label: (card, place) for label, place in zip(part.labels.tolist(), part.classes.tolist(), strict=True)
            }
        found = [chosen[label] for label in range(len(self.labels))]
        texts = tuple(tuple(prompts(card.classes[place], card.templates)) for card, place in found)
        return replace(self, prompts=texts, learned=tuple((card.name, place) for card, place in found))

    def by_task(self, cards: Sequence[Card]) -> dict[str, Part]:
        """For each task that has some of the caller's labels, which these are; {} where a label is no task's class."""
        places = {card.name: _places([label.name for label in self.labels], card.classes) for card in cards}
        if any(all(place is None for place in of_label) for of_label in zip(*places.values(), strict=True)):
            return {}
        found = {task: {i: place for i, place in enumerate(each) if place is not None} for task, each in places.items()}
        return {
            task: Part(np.array(list(own), dtype=np.int64), np.array(list(own.values()), dtype=np.int64))
            for task, own in found.items()
            if own
        }

    def whole(self, part: Part) -> bool:
        """Whether the part has all labels; then its `classes` are in the order of the labels."""
        return len(part.labels) == len(self.labels)

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
            blocks.append(Block(task, start, stop, self.prompts[start:stop], self.learned[start:stop]))
        return tuple(blocks)


def _places(labels: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """Where each label stands among a task's classes, None where it is none. Spellings of the same word (`word_key`)
    count as different only where the task has both."""
    exact = {name: place for place, name in enumerate(classes)}
    same = {word_key(name): place for name, place in exact.items()}
    return [exact.get(label, same.get(word_key(label))) for label in labels]


def _of_cards(cards: Iterable[Card]) -> tuple[tuple[Label, ...], tuple[tuple[str, ...], ...]]:
    pairs = [(card, name) for card in cards for name in card.classes]
    labels = tuple(Label(card.name, name) for card, name in pairs)
    return labels, tuple(tuple(prompts(name, card.templates)) for card, name in pairs)
