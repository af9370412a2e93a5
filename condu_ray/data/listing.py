"""What a reader finds before any picture is opened, and the class list and template files that may stand beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from condu_ray.data.task import Picture, Skipped
from condu_ray.data.templates import check_templates, word_key
from condu_ray.errors import DataError

Part = Literal["train", "test", ""]
SplitName = Literal["train", "val", "test"]
# What splits are called, whatever the case, as folders and in CSVs.
SPLITS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
CLASS_FILE = "classnames.txt"
TEMPLATE_FILE = "zeroshot_classification_templates.txt"


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture as listed. part: '' where the source has no test pictures. shown: its path for people."""

    picture: Picture
    label: int
    part: Part
    shown: str


@dataclass(frozen=True)
class Listing:
    """classes: in label order. templates: None where the source brings none. skipped: what cannot even be listed."""

    classes: tuple[str, ...]
    templates: tuple[str, ...] | None
    entries: list[Entry]
    skipped: list[Skipped]


def part_of(split: SplitName, given: Collection[SplitName]) -> Part:
    """Where pictures of a split go, among the splits given: val joins train, or is the test split if there is none."""
    if set(given) == {"train"}:
        return ""
    if split == "val":
        return "train" if "test" in given else "test"
    return split


def read_lines(path: Path) -> list[str] | None:
    """Returns the lines of a UTF-8 text file (byte order mark allowed, blank end dropped), None if there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})", "save it as UTF-8") from None
    return [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []


def read_templates(folder: Path) -> tuple[str, ...] | None:
    """Returns the folder's templates, None if it has no template file."""
    lines = read_lines(folder / TEMPLATE_FILE)
    if lines is None:
        return None
    return check_templates([line for line in lines if line], str(folder / TEMPLATE_FILE))


def check_names(classes: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns the class names; raises DataError for fewer than two, an empty one, one that is no text, or two that are
    the same word."""
    if not classes:
        raise DataError(f"{where} names no class", "give at least two")
    seen: dict[str, tuple[int, str]] = {}
    for number, name in enumerate(classes, start=1):
        check_text(name, f"{where}: the class name")
        key = word_key(name)
        if not key:
            raise DataError(f"{where}: class {number} has an empty name", "write its name or take it out")
        if key in seen:
            first, twin = seen[key]
            raise DataError(
                f"{where}: the classes {twin!r} (number {first}) and {name!r} (number {number}) have the same name",
                "a text tower cannot tell them apart; rename one or put them together",
            )
        seen[key] = number, name
    if len(classes) < 2:
        raise DataError(f"{where} has one class only ({classes[0]!r})", "a task needs at least two classes")
    return tuple(classes)


def check_text(name: str, what: str) -> None:
    """Raises DataError for a name that no manifest can hold: that of a file whose bytes are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} {name!r} is not UTF-8 text", "rename it") from None
