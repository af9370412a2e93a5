"""Image folders: CLASS/PICTURE, or train|test|val/CLASS/PICTURE (also NAME_train/CLASS/PICTURE and the like)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from unicodedata import normalize

from condu_ray.data.listing import (
    CLASS_FILE,
    Entry,
    Listing,
    Part,
    check_names,
    part_of,
    read_lines,
    read_templates,
)
from condu_ray.data.split_folders import find_splits, refuse_splits
from condu_ray.data.task import Picture
from condu_ray.data.templates import word_key
from condu_ray.data.walk import TARS, pictures, subfolders
from condu_ray.errors import DataError


def list_folder(root: Path, tests: bool = True) -> Listing:
    """Lists an image folder; without its test split, which is not looked into, where `tests` is false.

    With train/ and test/, val/ joins train; with train/ and val/ only, val/ is the test split. classnames.txt gives one
    display name for each class folder in sorted order, or the folders' own names in label order.
    """
    parts = [(part, folder) for part, folder in _parts(root) if tests or part != "test"]
    folders = {part_folder: [child.name for child in subfolders(part_folder)] for _, part_folder in parts}
    names = _one_spelling([name for found in folders.values() for name in found])
    if not names:
        loose = next(pictures(root, deep=False), None)
        if loose is not None and loose.name.endswith(TARS):
            raise DataError(
                f"{root} holds tars ({loose.name}) but no train/", "put them into train/, those to test on into test/"
            )
        if loose is not None:
            raise DataError(
                f"{root} holds pictures ({loose.name}) but no class folders",
                "put each picture into a folder named as its class",
            )
        raise DataError(f"{root} holds no class folders", "give a folder that has one folder of pictures a class")
    if all((part_folder / name / "train").is_dir() for part_folder, found in folders.items() for name in found):
        raise DataError(
            f"each folder in {root} ({', '.join(sorted(names)[:3])}) is a data set with its own train/",
            "give one of them as a task",
        )
    shown = _display_names(root, sorted({*names.values()}))
    classes = check_names(list(shown.values()), str(root))
    labels = {name: label for label, name in enumerate(shown)}
    entries: list[Entry] = []
    for part, part_folder in parts:
        for name in folders[part_folder]:
            before = len(entries)
            label = labels[names[name]]
            for path in pictures(part_folder / name):
                entries.append(Entry(Picture(str(path)), label, part, _printable(path.relative_to(root))))
            if len(entries) == before:
                raise DataError(
                    f"the class folder {part_folder / name} holds no pictures", "add pictures or remove the folder"
                )
    return Listing(classes, read_templates(root), entries, [])


def _parts(root: Path) -> list[tuple[Part, Path]]:
    """The split folders, or the root itself. A class that is called 'train' holds pictures, a split holds folders."""
    found = find_splits(root)
    if "train" not in found:
        only = found.get("test") or found.get("val")
        if only is not None and len(subfolders(root)) == 1:
            raise DataError(
                f"{root} has {only.name}/ but no train/",
                f"add train/, or give {only} itself to have some of its pictures set aside as a test",
            )
        refuse_splits(root)
        return [("", root)]
    return [(part_of(split, found), folder) for split, folder in found.items()]


def _one_spelling(names: Iterable[str]) -> dict[str, str]:
    """Each folder's name, and the one to know it by: Unicode's composed form where its accents are written two ways."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in names:
        spellings[normalize("NFC", name)].add(name)
    return {name: composed if len(each) > 1 else name for composed, each in spellings.items() for name in each}


def _display_names(root: Path, names: list[str]) -> dict[str, str]:
    """Class name of each class folder, in label order: its line of classnames.txt, else its own name."""
    lines = read_lines(root / CLASS_FILE)
    if lines is None:
        return {name: name for name in names}
    known = {normalize("NFC", name): name for name in names}
    if len(lines) == len(names) and {normalize("NFC", line) for line in lines} == {*known}:
        return {known[normalize("NFC", line)]: line for line in lines}
    if len(lines) != len(names):
        unknown = [line for line in lines if line not in names]
        without = [name for name in names if name not in lines]
        mend = "write one line a class folder, in sorted order"
        if unknown and len(unknown) < len(lines):
            mend += f" (no folder: {', '.join(unknown[:3])})"
        if without and len(without) < len(names):
            mend += f" (no line: {', '.join(without[:3])})"
        raise DataError(f"{root / CLASS_FILE} has {len(lines)} lines for {len(names)} class folders", mend)
    place = {word_key(name.replace("-", " ")): number for number, name in enumerate(names)}
    for number, line in enumerate(lines):
        other = place.get(word_key(line.replace("-", " ")), number)
        if other != number:
            raise DataError(
                f"{root / CLASS_FILE}: line {number + 1} is {line!r}, but that folder is {names[number]!r}",
                "write one line a class folder, in sorted order",
            )
    return dict(zip(names, lines, strict=True))


def _printable(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()
