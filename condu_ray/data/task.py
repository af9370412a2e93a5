"""What a task's data is: pictures with labels in a train and a test split, class names and prompt templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file, or `size` bytes from `offset` of an uncompressed tar (offset -1: the whole file)."""

    path: str
    offset: int = -1
    size: int = -1


@dataclass(frozen=True)
class Skipped:
    """A picture that was left out, and why; path is relative to the source, 'train/0.tar: KEY.jpg' in a tar."""

    path: str
    reason: str


@dataclass(frozen=True)
class Sizes:
    """(smallest, median, largest) in pixels, over all pictures as they are seen (after EXIF rotation)."""

    width: tuple[int, int, int]
    height: tuple[int, int, int]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Pictures and their labels (int64, one per picture, an index into the task's classes).

    Pickles small (each path once, offsets as arrays), so that it can be sent to every worker.
    """

    pictures: tuple[Picture, ...]
    labels: Labels

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", tuple(self.pictures))
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if self.labels.shape != (len(self.pictures),):
            raise ValueError(f"{len(self.pictures)} pictures but labels of shape {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.pictures)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Split):
            return NotImplemented
        return self.pictures == other.pictures and np.array_equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash(self.pictures)

    def __repr__(self) -> str:
        return f"Split({len(self)} pictures)"

    def take(self, indices: npt.ArrayLike) -> Split:
        """Returns the split of the pictures at these positions, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Split(tuple(self.pictures[i] for i in chosen), self.labels[chosen])

    def __reduce__(self) -> tuple[Any, ...]:
        paths: dict[str, int] = {}
        numbers = np.array([paths.setdefault(p.path, len(paths)) for p in self.pictures], np.int32)
        spans = np.array([(p.offset, p.size) for p in self.pictures], np.int64).reshape(-1, 2)
        return _unpack, (list(paths), numbers, spans, self.labels)


def _unpack(paths: list[str], numbers: npt.NDArray[np.int32], spans: npt.NDArray[np.int64], labels: Labels) -> Split:
    rows = zip(numbers.tolist(), spans.tolist(), strict=True)
    return Split(tuple(Picture(paths[n], offset, size) for n, (offset, size) in rows), labels)


@dataclass(frozen=True)
class TaskData:
    """A task, opened and checked: every picture was read, hashed and decoded once.

    source: as the user gave it. classes: names in label order. templates: prompts with {c} or {}; the first one trains.
    train, test: in an order that depends on content only. skipped: pictures left out.
    fingerprint: hex sha256 of what is learned (classes, templates, picture bytes, labels, split),
    whatever the files are called and wherever they lie.
    sizes: of the pictures kept. split_made: the source has no test pictures, so some were set aside by seed.
    leaked: test pictures whose very bytes are among the training pictures too (kept, counted).
    """

    name: str
    source: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    test: Split
    skipped: tuple[Skipped, ...]
    fingerprint: str
    sizes: Sizes
    split_made: bool
    leaked: int
