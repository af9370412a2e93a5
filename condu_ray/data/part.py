"""A part of a source's classes as a task of its own: `PATH#2/4` is the second of four equal parts of the class list.

One large set makes a class-incremental stream so, without a copy of its pictures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from condu_ray.data.listing import Listing
from condu_ray.errors import DataError

_PART = re.compile(r"(?P<source>.+)#(?P<number>[0-9]+)/(?P<parts>[0-9]+)")


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
        entries = [
            replace(entry, label=entry.label - first) for entry in listing.entries if first <= entry.label < last
        ]
        return replace(listing, classes=listing.classes[first:last], entries=entries)


def split_part(source: str) -> tuple[str, ClassPart | None]:
    """(where the data is, which part of its classes); a path that really ends in #2/4 is taken as it stands."""
    found = _PART.fullmatch(source)
    if found is None or Path(source).expanduser().exists():
        return source, None
    return found["source"], ClassPart(int(found["number"]), int(found["parts"]))
