"""Which folders of a source are its splits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from condu_ray.data.listing import SPLITS, SplitName
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


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as found:
        return sorted(Path(child.path) for child in found if not hidden(child.name) and child.is_dir())


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
