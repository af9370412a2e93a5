"""Webdataset folders as clip_benchmark writes them: train|test|val/*.tar with pairs KEY.jpg, KEY.cls."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from condu_ray.data.cache import plain_tar
from condu_ray.data.listing import (
    CLASS_FILE,
    Entry,
    Listing,
    SplitName,
    check_names,
    part_of,
    read_lines,
    read_templates,
)
from condu_ray.data.split_folders import split_folders
from condu_ray.data.task import Picture, Skipped
from condu_ray.data.walk import PICTURES, TARS, holds_pictures, subfolders
from condu_ray.errors import DataError, nearest

_MAX_LABEL_BYTES = 32


def find_tars(root: Path) -> dict[SplitName, list[Path]]:
    """The tars of each split; none if this is no webdataset folder."""
    return {split: _tars(folder) for split, folder in split_folders(root, _tars).items()}


def list_tars(root: Path, splits: Mapping[SplitName, list[Path]], tests: bool = True) -> Listing:
    """Lists a webdataset folder; nothing is unpacked under a member's name.

    splits: as found by `find_tars`. tests: false leaves the test split out, whose tars are then not opened. Plain tars
    are read where they lie; compressed ones are unpacked once into the cache.
    """
    if "train" not in splits:
        only = next(iter(splits.values()))[0].parent.name
        mend = "name the folder train/ to have some of its pictures set aside as a test"
        if "train" in split_folders(root, subfolders):
            mend = "unpack them into class folders, as train/ has, or take them away"
        raise DataError(f"{root} has {only}/*.tar but no train/*.tar", mend)
    names = read_lines(root / CLASS_FILE)
    if names is None:
        raise DataError(f"{root} has no {CLASS_FILE}", "line N of it, from 0, is the name of label N")
    classes = check_names(names, str(root / CLASS_FILE))
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for split, tars in splits.items():
        part = part_of(split, splits)
        for tar in tars if tests or part != "test" else ():
            shown = f"{tar.parent.name}/{tar.name}"
            for picture, label, name in _pairs(tar, shown, classes, skipped):
                entries.append(Entry(picture, label, part, f"{shown}: {name}"))
    return Listing(classes, read_templates(root), entries, skipped)


def _tars(folder: Path) -> list[Path]:
    """The folder's tars; none where they lie beside class folders, as when a set was unpacked.

    Raises DataError if nshards.txt counts another number of them.
    """
    tars = sorted(child for child in folder.iterdir() if child.name.endswith(TARS) and child.name[0] != ".")
    if tars and any(holds_pictures(child) for child in subfolders(folder)):
        return []
    count = folder / "nshards.txt"
    if tars and count.is_file():
        said = count.read_text(encoding="utf-8", errors="replace").strip()
        if said != str(len(tars)):
            raise DataError(
                f"{count} says {said[:20]!r}, but there are {len(tars)} tars", "fetch them all, or correct it"
            )
    return tars


def _pairs(
    tar: Path, shown: str, classes: tuple[str, ...], skipped: list[Skipped]
) -> Iterator[tuple[Picture, int, str]]:
    """Yields (picture, label, member name) for each pair; what has no partner is added to `skipped`."""
    path = plain_tar(tar)
    labels: dict[str, int] = {}
    pictures: dict[str, tuple[Picture, str]] = {}
    with open(path, "rb") as file:
        for member in _members(tar, file):
            key, _, ending = member.name.rpartition(".")
            ending = "." + ending.lower()
            if member.name.rpartition("/")[2].startswith("."):  # macOS writes ._KEY.jpg beside KEY.jpg
                continue
            if ending == ".cls":
                file.seek(member.offset_data)
                labels[key] = _label(file.read(min(member.size, _MAX_LABEL_BYTES)), shown, key, classes)
            elif ending in PICTURES and key in pictures:
                skipped.append(Skipped(f"{shown}: {member.name}", "a second picture of the same name"))
            elif ending in PICTURES:
                pictures[key] = Picture(str(path), member.offset_data, member.size), member.name
    for key, (picture, name) in pictures.items():
        label = labels.pop(key, None)
        if label is None:
            skipped.append(Skipped(f"{shown}: {name}", "no .cls file beside it"))
        else:
            yield picture, label, name
    skipped.extend(Skipped(f"{shown}: {key}.cls", "no picture beside it") for key in labels)


def _members(tar: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of a plain tar; raises DataError if it is damaged or cut off."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it ends within {member.name[-60:]}")
                if member.isreg() and not member.issparse():
                    yield member
            end = archive.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{tar} is not a tar, or is damaged ({error})", "fetch it again") from error
    # tarfile takes a damaged header for the end of the archive; a true end is a block of zeros.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{tar} is damaged or cut off at byte {end}", "fetch it again")


def _label(text: bytes, shown: str, key: str, classes: tuple[str, ...]) -> int:
    said = text.decode("utf-8", "replace").strip()
    try:
        label = int(said)
    except ValueError:
        raise DataError(
            f"{shown}: {key}.cls holds {said!r}, not a number from 0 to {len(classes) - 1}", nearest(said, classes)
        ) from None
    if not 0 <= label < len(classes):
        raise DataError(
            f"{shown}: {key}.cls holds the label {label}, outside the {len(classes)} classes (0 to {len(classes) - 1})",
            "add the missing names to the class list or correct the label",
        )
    return label
