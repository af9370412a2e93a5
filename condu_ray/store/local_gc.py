"""Removing from a local store what no kept version names."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from condu_ray.errors import StoreError
from condu_ray.store.base import GcReport
from condu_ray.store.files import temporary
from condu_ray.store.manifest import parse_manifest


def collect(root: Path, gone: Mapping[int, Path], named: set[str], *, dry_run: bool, in_use_s: float) -> GcReport:
    """Removes the manifests in `gone` and the objects that are not in `named`; the caller holds the store's lock.

    Manifests go first, so that a version whose objects are going is never seen. An object of a version that goes was
    last put or found before its commit, unless a later session has found it again; such a one, and an object that no
    manifest names, stays until `in_use_s` seconds have passed. So do temporary files and work folders.
    """
    now = _now(root)
    published = _published(gone)
    objects: list[str] = []
    leftovers: list[str] = []
    in_use: list[str] = []
    freed = 0
    doomed: list[Path] = list(gone.values())
    for file in sorted(root.glob("objects/*/*")):
        path = file.relative_to(root).as_posix()
        if path in named:
            continue
        changed = file.stat().st_mtime
        if changed > published.get(path, 0.0) and now - changed < in_use_s:
            in_use.append(path)
            continue
        objects.append(path)
        doomed.append(file)
    for entry in sorted([*root.glob("tmp/*"), *root.glob("work/*")]):
        path = entry.relative_to(root).as_posix()
        if now - _last_change(entry, now) < in_use_s:
            in_use.append(path)
        else:
            leftovers.append(path)
            doomed.append(entry)
    for item in doomed:
        freed += sum(file.stat().st_size for file in [item, *item.rglob("*")] if file.is_file())
        if dry_run:
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)
    if not dry_run:
        _remove_empty(root)
    return GcReport(sorted(gone), objects, leftovers, freed, in_use, dry_run)


def _now(root: Path) -> float:
    """The clock of the file system (epoch s), which dated the files: that of this machine may be wrong."""
    try:
        with temporary(root / "tmp", []) as file:
            return file.stat().st_mtime
    except OSError:  # a dry run where nothing may be written
        return time.time()


def _published(gone: Mapping[int, Path]) -> dict[str, float]:
    """Returns, for each object that a removed version names, when the last such version was committed (epoch s)."""
    times: dict[str, float] = {}
    for path in gone.values():
        try:
            refs = parse_manifest(path.read_bytes(), str(path)).objects.values()
        except StoreError:  # unreadable and going: its objects count as named by nobody
            continue
        committed = path.stat().st_mtime
        for ref in refs:
            times[ref.path] = max(committed, times.get(ref.path, committed))
    return times


def _last_change(entry: Path, now: float) -> float:
    try:
        return max(item.stat().st_mtime for item in [entry, *entry.rglob("*")])
    except FileNotFoundError:  # its session has just finished with it
        return now


def _remove_empty(root: Path) -> None:
    for folder in root.glob("objects/*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
