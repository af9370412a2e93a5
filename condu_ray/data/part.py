"""A part of a source's classes as a task of its own, so that a large set makes a stream without a copy of it.

`PATH#2/4` is the second of four equal parts of the class list. `PATH#21-40` are its classes 21 to 40, and
`PATH#21-40@1993` those of the list in another order: that of NumPy's legacy permutation for a seed, as the field's
class-incremental benchmarks have it, or of a text file that names every class, or its number from 0, once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from condu_ray.data.listing import Listing, read_lines
from condu_ray.data.templates import word_key
from condu_ray.errors import DataError
from condu_ray.paths import as_path

_PART = re.compile(r"(?P<source>.+)#(?P<number>[0-9]+)/(?P<parts>[0-9]+)")
_SPAN = re.compile(r"(?P<source>.+)#(?P<first>[0-9]+)-(?P<last>[0-9]+)(@(?P<order>.+))?")


@dataclass(frozen=True)
class ClassPart:
    """The `number`-th (from 1) of `parts` parts of a class list."""

    number: int
    parts: int

    def of(self, listing: Listing, source: str) -> Listing:
        """The listing with the classes of this part alone, in their order; sizes of parts differ by one at most.

        Raises DataError where a part would have fewer than two classes.
        """
        count = len(listing.classes)
        if not 1 <= self.number <= self.parts or count < 2 * self.parts:
            raise DataError(
                f"{source}: there is no part {self.number} of {self.parts} of {count} classes",
                f"count from 1, and cut them into at most {max(1, count // 2)} parts, so that each has two classes",
            )
        first, last = ((self.number - at) * count // self.parts for at in (1, 0))
        return _chosen(listing, range(first, last))


@dataclass(frozen=True)
class ClassSpan:
    """The classes `first` to `last` (from 1, both included) of a class list in a seed's order, a file's, or its own."""

    first: int
    last: int
    order: str | None = None

    def of(self, listing: Listing, source: str) -> Listing:
        """The listing with these classes alone, relabelled in this order.

        Raises DataError where they are not there or fewer than two, and for an order that is not one of them all.
        """
        count = len(listing.classes)
        if not 1 <= self.first < self.last <= count:
            raise DataError(
                f"{source}: there are no classes {self.first} to {self.last} of {count}",
                "count from 1, and take at least two",
            )
        return _chosen(listing, ordered(listing.classes, self.order)[self.first - 1 : self.last])


def ordered(classes: Sequence[str], order: str | None) -> list[int]:
    """Places of the classes in the order of a seed, of a file, or (None) their own.

    Where all lines are names of classes they are taken for these, also where names are numbers. Raises DataError for a
    file that is no order of them.
    """
    if order is None:
        return list(range(len(classes)))
    if order.isdecimal():
        return [int(each) for each in np.random.RandomState(int(order) % 2**32).permutation(len(classes))]
    lines = read_lines(as_path(order))
    if lines is None:
        raise DataError(f"there is no class order {order}", "give a seed, or a text file with a class a line")
    names = {word_key(name): place for place, name in enumerate(classes)}
    found = [names.get(word_key(line), -1) for line in lines]
    if -1 in found:
        found = [int(line) if line.isdecimal() else place for line, place in zip(lines, found, strict=True)]
    if sorted(found) != list(range(len(classes))):
        strange = next((line for line, place in zip(lines, found, strict=True) if not 0 <= place < len(classes)), None)
        fault = f"{strange!r} is none" if strange else f"{len(lines)} lines"
        mend = "name every class, or its number from 0, once"
        raise DataError(f"{order} is not an order of {len(classes)} classes ({fault})", mend)
    return found


def _chosen(listing: Listing, places: Sequence[int]) -> Listing:
    labels = {place: label for label, place in enumerate(places)}
    entries = [replace(entry, label=labels[entry.label]) for entry in listing.entries if entry.label in labels]
    return replace(listing, classes=tuple(listing.classes[place] for place in places), entries=entries)


def split_part(source: str) -> tuple[str, ClassPart | ClassSpan | None]:
    """(where the data is, which part of its classes); a path that really ends in #2/4 is taken as it stands."""
    part, span = _PART.fullmatch(source), _SPAN.fullmatch(source)
    if (part is None and span is None) or as_path(source).exists():
        return source, None
    if part is not None:
        return part["source"], ClassPart(int(part["number"]), int(part["parts"]))
    assert span is not None
    return span["source"], ClassSpan(int(span["first"]), int(span["last"]), span["order"])
