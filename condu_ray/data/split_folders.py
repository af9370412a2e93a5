"""Which folders of a source are its splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from unicodedata import normalize

from condu_ray.data.listing import SPLITS, SplitName
from condu_ray.data.walk import holds_pictures, pictures, subfolders
from condu_ray.errors import DataError


def split_folders(root: Path, holds: Callable[[Path], object]) -> dict[SplitName, Path]:
    """The folders in `root` that are called like a split, and hold what one does: train, val, test.

    Raises DataError for two folders of one split.
    """
    found: dict[SplitName, Path] = {}
    for child in subfolders(root):
        split = SPLITS.get(child.name.casefold())
        if split is None or not holds(child):
            continue
        if split in found:
            raise DataError(
                f"{root} has both {found[split].name}/ and {child.name}/", "put them together, or take one away"
            )
        found[split] = child
    return {split: found[split] for split in get_args(SplitName) if split in found}


def find_splits(root: Path) -> dict[SplitName, Path]:
    """The folder of each split, which holds class folders.

    Names with something around the word for the split (training_set, seg_train) are taken for splits where the same
    stands around another split's and both hold the same class folders. A folder in one of the same name
    (seg_train/seg_train/CLASS) is the split itself. Raises DataError for two folders of one split, and where a split
    may be a class.
    """
    found = split_folders(root, subfolders)
    if "train" not in found:
        certain = [splits for marked in _marked(root).values() if (splits := _certain(marked))]
        found = certain[0] if len(certain) == 1 else found
    if set(found) == {"train"}:
        _refuse_others(root, found["train"])
    return {split: _inner(folder) for split, folder in found.items()}


def _certain(marked: dict[SplitName, list[Path]]) -> dict[SplitName, Path]:
    """One folder a split, train among several, where all hold the same class folders; else none."""
    found = {split: marked[split][0] for split in get_args(SplitName) if len(marked.get(split, ())) == 1}
    classes = [_names(_inner(folder)) for folder in found.values()]
    same = len(found) == len(marked) > 1 and bool(classes[0]) and classes[1:] == classes[:-1]
    return found if same and "train" in found else {}


def _refuse_others(root: Path, train: Path) -> None:
    """Raises DataError where train/, the only split, may be a class: other folders beside it hold pictures.

    Pictures without classes in a folder that is called like a split (test/1.jpg) are left alone.
    """
    splits = {folder for marked in _marked(root).values() for each in marked.values() for folder in each}
    for child in subfolders(root):
        unlabelled = child in splits and not subfolders(child)
        if child != train and not unlabelled and holds_pictures(child):
            raise DataError(
                f"{root} has {train.name}/ with folders in it, no test split, and pictures in {child.name}/",
                f"call the other split test/ or val/, give {train} itself, or, if it is a class, take its pictures out "
                "of their folders",
            )


def refuse_splits(root: Path) -> None:
    """Raises DataError where folders that would be classes look like splits.

    Those are names that differ in the split alone, and a split's name beside folders that all hold the same folders.
    """
    for marked in _marked(root).values():
        folders = [folder for each in marked.values() for folder in each]
        if len(marked) > 1 or _same_inside(subfolders(root)):
            named = " and ".join(sorted(f"{folder.name}/" for folder in folders)[:3])
            raise DataError(
                f"{root} has {named}, by name {'splits' if len(folders) > 1 else 'a split'} and no class",
                "sort the pictures as train/CLASS/PICTURE and test/CLASS/PICTURE, or, if they are classes, rename them",
            )


def _marked(root: Path) -> dict[str, dict[SplitName, list[Path]]]:
    """Folders whose names hold one word for a split, by what is around it and by the split."""
    found: dict[str, dict[SplitName, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for child in subfolders(root):
        # train2017 and TrainingSet are two words each.
        parted = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\D)(?=\d)|(?<=\d)(?=\D)", " ", child.name)
        words = re.split(r"[\W_]+", parted.casefold())
        splits = [SPLITS[word] for word in words if word in SPLITS]
        if len(splits) == 1:
            around = " ".join("*" if word in SPLITS else word for word in words)
            found[around][splits[0]].append(child)
    return found


def _inner(folder: Path) -> Path:
    """The folder, or the one of its own name that is all it holds."""
    inside = subfolders(folder)
    return inside[0] if [child.name for child in inside] == [folder.name] and subfolders(inside[0]) else folder


def _same_inside(folders: list[Path]) -> bool:
    """Whether these folders, more than one, hold no pictures and the same folders, more than one."""
    names = [_names(folder) for folder in folders]
    return (
        len(folders) > 1
        and len(names[0]) > 1
        and names[1:] == names[:-1]
        and all(next(pictures(folder, deep=False), None) is None for folder in folders)
    )


def _names(folder: Path) -> set[str]:
    return {normalize("NFC", child.name) for child in subfolders(folder)}
