"""What lies in a folder: folders, and files that may be pictures; hidden ones and companions are left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# How files are called whose formats can be read. Files of a folder are looked into, whatever they are called.
PICTURES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".mpo")
)
TARS = (".tar", ".tar.gz", ".tgz")
# What macOS, Synology's and QNAP's servers, Windows and Linux put beside a user's own folders.
_OF_SYSTEMS = frozenset(
    ("__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
# Files that often lie beside pictures and are none; anything else is opened, and counted as skipped if it is none.
_COMPANIONS = frozenset(
    (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".html", ".yaml", ".yml", ".toml", ".ini", ".db")
    + (".mat", ".npy", ".npz", ".log", ".py", ".sh")
)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted."""
    with os.scandir(folder) as found:
        return sorted(Path(child.path) for child in found if not _hidden(child.name) and child.is_dir())


def pictures(folder: Path, deep: bool = True) -> Iterator[Path]:
    """Candidates in sorted order; links to files are followed, links to folders are not (they may be circles)."""
    with os.scandir(folder) as found:
        children = sorted(found, key=lambda child: child.name)
    for child in children:
        if _hidden(child.name):
            continue
        if child.is_dir(follow_symlinks=False):
            if deep:
                yield from pictures(Path(child.path))
        elif (child.is_file() or (child.is_symlink() and not child.is_dir())) and not _companion(child.name):
            yield Path(child.path)


def holds_pictures(folder: Path) -> bool:
    """Whether a file anywhere in this folder is called like a picture."""
    return any(path.suffix.lower() in PICTURES for path in pictures(folder))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _companion(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _COMPANIONS
