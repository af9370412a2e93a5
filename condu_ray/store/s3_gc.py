"""Removing from an S3 store what no kept version names, beside sessions that commit.

There is no lock. A gc first says what it is about to remove (a notice in gc/), then looks again for marks, then for new
versions. A commit first marks what it names, then looks for notices, then publishes, then takes its marks away. If the
commit looked before the notice was there, its marks or its version were there before the gc looked again, and the gc
spares the objects; else the commit sees the notice and is refused, and nothing was published.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Collection, Mapping

from condu_ray.errors import StoreError
from condu_ray.store.base import GcReport
from condu_ray.store.bucket import Bucket, Entry

NOTICE_S = 600.0
"""For how long a commit believes a notice; a gc that is held up for longer stops instead of removing more."""

_CHUNK = 200


def mark_of(path: str) -> str:
    """Where the mark of an object is."""
    return path.replace("objects/", "marks/", 1)


def doomed(bucket: Bucket) -> set[str]:
    """Paths of objects that a gc is about to remove now."""
    going: set[str] = set()
    for notice in bucket.entries("gc/"):
        if bucket.now() - notice.changed < NOTICE_S:
            going.update(json.loads(bucket.read(notice.path) or b"[]"))
    return going


def collect(
    bucket: Bucket,
    manifests: Callable[[], Mapping[int, Entry]],
    paths: Callable[[int], Collection[str]],
    keep: int | None,
    *,
    dry_run: bool,
    in_use_s: float,
) -> GcReport:
    """As `Store.gc`.

    manifests: lists the versions that there are now. paths: of the objects that a version names. A removed manifest
    leaves an empty object, so that no writer, however late, can give its number again. An object counts as last used
    when it was written, or at its mark. Marks in the same second as a commit count as later than it.
    """
    known = manifests()
    objects = {entry.path: entry for entry in bucket.entries("objects/")}
    now = bucket.now()
    kept = sorted(known) if keep is None else sorted(known)[-keep:]
    gone = {number: entry for number, entry in sorted(known.items()) if number not in kept}
    named = {path for number in kept for path in paths(number)}
    published: dict[str, float] = {}
    for number, entry in gone.items():
        try:
            theirs = paths(number)
        except StoreError:  # unreadable and going: its objects count as named by nobody
            continue
        for path in theirs:
            published[path] = max(entry.changed, published.get(path, 0.0))

    def used(path: str, marks: Mapping[str, float]) -> bool:
        marked, written, since = marks.get(mark_of(path), -1.0), objects[path].changed, published.get(path, 0.0)
        return (marked >= since or written > since) and now - max(marked, written) < in_use_s

    marks = _marks(bucket)
    unnamed = [path for path in objects if path not in named]
    in_use = [path for path in unnamed if used(path, marks)]
    going = [path for path in unnamed if path not in in_use]
    work, uploads = _leftovers(bucket)
    old = {path for path, changed in {**work, **uploads}.items() if now - changed >= in_use_s}
    in_use += sorted(work.keys() - old)
    if not dry_run:
        spared = _remove(bucket, manifests, paths, gone, going, marks, used)
        going, in_use = [path for path in going if path not in spared], in_use + sorted(spared)
        freed = _sweep(bucket, old, marks, now, in_use_s)
    else:
        freed = sum(entry.bytes for path in old for entry in bucket.entries(f"{path}/"))
    freed += sum(objects[path].bytes for path in going) + sum(entry.bytes for entry in gone.values())
    return GcReport(sorted(gone), going, sorted(old), freed, in_use, dry_run)


def _remove(
    bucket: Bucket,
    manifests: Callable[[], Mapping[int, Entry]],
    paths: Callable[[int], Collection[str]],
    gone: Mapping[int, Entry],
    going: list[str],
    seen: Mapping[str, float],
    used: Callable[[str, Mapping[str, float]], bool],
) -> set[str]:
    """Removes versions and objects; returns the objects that somebody has started to use meanwhile."""
    if not gone and not going:
        return set()
    notice, told = f"gc/{uuid.uuid4().hex}.json", json.dumps(going).encode()
    bucket.write(notice, told)
    since = time.monotonic()
    try:
        marks = {path: changed for path, changed in _marks(bucket).items() if seen.get(path) != changed}
        named = {path for number in manifests() if number not in gone for path in paths(number)}  # after the marks
        spared = {path for path in going if path in named or (mark_of(path) in marks and used(path, marks))}
        for entry in gone.values():
            bucket.write(entry.path, b"")
        rest = [path for path in going if path not in spared]
        for start in range(0, len(rest), _CHUNK):
            if time.monotonic() - since > NOTICE_S / 2:
                raise StoreError(f"gc of {bucket.url} was held up for too long", "run it again")
            bucket.write(notice, told)
            since = time.monotonic()
            bucket.delete(rest[start : start + _CHUNK])
        return spared
    finally:
        bucket.delete([notice])


def _marks(bucket: Bucket) -> dict[str, float]:
    return {entry.path: entry.changed for entry in bucket.entries("marks/")}


def _leftovers(bucket: Bucket) -> tuple[dict[str, float], dict[str, float]]:
    """(work folders, part uploads) that there are, each with its last change (epoch seconds)."""
    work: dict[str, float] = {}
    for entry in bucket.entries("work/"):
        folder = "/".join(entry.path.split("/")[:2])
        work[folder] = max(entry.changed, work.get(folder, 0.0))
    uploads: dict[str, float] = {}
    for path, _, begun in bucket.uploads():
        if path.startswith(("objects/", "work/")):
            uploads[f"uploads/{path}"] = max(begun, uploads.get(f"uploads/{path}", 0.0))
    return work, uploads


def _sweep(
    bucket: Bucket,
    old: Collection[str],
    marks: Mapping[str, float],
    now: float,
    in_use_s: float,
) -> int:
    """Removes leftovers and what only this machinery reads; returns the bytes of the leftovers."""
    freed, paths = 0, []
    for folder in old:
        for entry in bucket.entries(f"{folder}/"):
            freed += entry.bytes
            paths.append(entry.path)
    for path, upload, _ in bucket.uploads():
        if f"uploads/{path}" in old:
            bucket.abort(path, upload)
    paths += [mark for mark, changed in marks.items() if now - changed >= in_use_s]
    for kind in ("gc/", "probe/"):
        paths += [entry.path for entry in bucket.entries(kind) if now - entry.changed >= max(in_use_s, NOTICE_S)]
    bucket.delete(paths)
    return freed
