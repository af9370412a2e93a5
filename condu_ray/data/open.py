"""Opens a task's data: finds out what the source is, reads every picture once, checks, splits and fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from condu_ray.data.folder import list_folder
from condu_ray.data.listing import Entry, Listing, Part, check_text
from condu_ray.data.part import split_part
from condu_ray.data.scan import Progress, Seen, scan
from condu_ray.data.split import choose_test
from condu_ray.data.table import list_table
from condu_ray.data.tars import find_tars, list_tars
from condu_ray.data.task import Picture, Sizes, Skipped, Split, TaskData
from condu_ray.data.templates import DEFAULT_TEMPLATES
from condu_ray.data.torchvision_sets import KNOWN, PREFIX, list_torchvision
from condu_ray.data.walk import pictures
from condu_ray.errors import DataError, nearest
from condu_ray.paths import as_path

PICTURE_KINDS = "give a JPEG, PNG, WebP, GIF, BMP or TIFF file"
SKIP_LIMIT = 0.05  # the largest share of pictures that may be left out because they cannot be read


def open_task(
    name: str,
    source: str | Path,
    *,
    seed: int = 0,
    test_share: float = 0.2,
    validation: float | None = None,
    progress: Progress | None = None,
) -> TaskData:
    """Opens an image folder, a webdataset folder, a CSV (path,label[,split]) or a torchvision data set by name.

    source: with #K/N or #FIRST-LAST@ORDER at its end only a part of the class list (data/part.py).
    seed, test_share: which pictures become the test split, where the source has none. validation: this share of the
    training pictures (stratified, seeded; none of a class with one picture) is what `test` holds, and the pictures to
    test on are left out: those of the source's own test split are not even opened. progress: called with (done, total).
    Raises DataError for everything that is wrong with the data; nothing but the cache is written.
    """
    check_text(str(source), f"{name}: the source")
    try:
        place, part = split_part(str(source))
        listing = _list(place, tests=validation is None)
        unlisted = listing.skipped
        if part is not None:
            # They may be of any class, so they count in the whole set, of which a part is some pictures only.
            _check_skipped(place, unlisted, len(listing.entries) + len(unlisted))
            listing, unlisted = part.of(listing, place), []
        seen = scan([entry.picture for entry in listing.entries], progress)
    except OSError as error:
        raise DataError(f"{name}: {error.filename or source} cannot be read ({error.strerror or error})") from error
    kept = [(entry, one) for entry, one in zip(listing.entries, seen, strict=True) if isinstance(one, Seen)]
    unread = [Skipped(e.shown, one) for e, one in zip(listing.entries, seen, strict=True) if isinstance(one, str)]
    _check_skipped(str(source), unlisted + unread, len(listing.entries) + len(unlisted))
    _check_counts(str(source), listing, [entry for entry, _ in kept], tests=validation is None)
    split_made = all(entry.part == "" for entry, _ in kept)
    rows = _rows(kept, listing.classes, test_share, seed) if split_made else [(e, one, e.part) for e, one in kept]
    if validation is not None:
        to_train = [(entry, one) for entry, one, part in rows if part == "train"]
        rows = _rows(to_train, listing.classes, validation, seed, every_class=False)
    # Content order: whatever the files are called, training sees the same pictures in the same order.
    rows.sort(key=lambda row: (row[1].digest, row[0].label, row[0].shown))
    templates = listing.templates or DEFAULT_TEMPLATES
    digests = {part: {one.digest for _, one, of in rows if of == part} for part in ("train", "test")}
    return TaskData(
        name=name,
        source=str(source),
        classes=listing.classes,
        templates=templates,
        train=_split(rows, "train"),
        test=_split(rows, "test"),
        skipped=(*listing.skipped, *unread),
        fingerprint=_fingerprint(listing.classes, templates, ((part, e.label, one.digest) for e, one, part in rows)),
        sizes=Sizes(_spread(one.width for _, one in kept), _spread(one.height for _, one in kept)),
        split_made=split_made,
        leaked=sum(1 for _, one, part in rows if part == "test" and one.digest in digests["train"]),
    )


def classes_of(source: str) -> tuple[str, ...]:
    """The class list of a source, without a look at its pictures. Raises DataError where there is none."""
    place, part = split_part(source)
    listing = _list(place, tests=True)
    return (part.of(listing, place) if part else listing).classes


def open_pictures(paths: Sequence[str | Path], on_skipped: Callable[[Skipped], None] | None = None) -> list[Picture]:
    """Returns the pictures of files and folders (searched to the bottom, sorted), in the order given.

    on_skipped: told of a file in a folder that is no picture; None: it is an error like any file that was named.
    Raises DataError that names the first path that is missing or no picture, a folder without any, and a single path.
    """
    if isinstance(paths, str | Path):  # or its letters would be the paths
        raise DataError(f"{str(paths)!r} is one path", "give a list of paths")
    found: list[Picture] = []
    in_folder: list[bool] = []
    for given in paths:
        path = as_path(given)
        try:
            files = list(pictures(path)) if path.is_dir() else [path]
        except OSError as error:
            raise DataError(f"{error.filename or path} cannot be read ({error.strerror})") from error
        if not path.is_dir() and not path.is_file():
            raise DataError(f"there is no picture {path}", _similar(path))
        if not files:
            raise DataError(f"the folder {path} holds no pictures", "give picture files, or a folder that has some")
        found.extend(Picture(str(file)) for file in files)
        in_folder += [path.is_dir()] * len(files)
    kept, reasons = [], list[str]()
    for picture, one, may_be_skipped in zip(found, scan(found), in_folder, strict=True):
        if not isinstance(one, str):
            kept.append(picture)
        elif on_skipped is not None and may_be_skipped:
            reasons.append(one)
            on_skipped(Skipped(picture.path, one))
        else:
            raise DataError(f"{picture.path} cannot be used ({one})", PICTURE_KINDS)
    if found and not kept:
        first = f"{found[0].path}: {reasons[0]}"
        raise DataError(f"none of the {len(found)} files there can be used ({first})", PICTURE_KINDS)
    return kept


def _list(source: str, tests: bool) -> Listing:
    listing = _list_all(source, tests)
    return listing if tests else replace(listing, entries=[entry for entry in listing.entries if entry.part != "test"])


def _list_all(source: str, tests: bool) -> Listing:
    if source.startswith(PREFIX):
        return list_torchvision(source.removeprefix(PREFIX), tests)
    # Absolute: workers that read the pictures have another working folder.
    path = as_path(source).absolute()
    if path.is_dir():
        splits = find_tars(path)
        return list_tars(path, splits, tests) if splits else list_folder(path, tests)
    if path.is_file() and path.suffix.lower() == ".csv":
        return list_table(path)
    if path.is_file():
        raise DataError(
            f"{source} is neither a folder nor a .csv file", "give a folder of pictures, or a CSV: path,label"
        )
    if source in KNOWN:
        return list_torchvision(source, tests)
    mend = "give a folder of pictures, a webdataset folder, a .csv file, or a torchvision name such as CIFAR10"
    looked = "" if as_path(source).is_absolute() else f" (looked in {Path.cwd()})"  # not beside a --config file
    raise DataError(
        f"there is no data at {source!r}{looked}", f"{mend} ({near})" if (near := _similar(as_path(source))) else mend
    )


def _similar(path: Path) -> str:
    """'did you mean X?' for a name in the same folder or a torchvision name; '' if nothing is close."""
    beside = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    names = beside + (list(KNOWN) if path.parent == Path() else [])
    said = nearest(path.name, names)
    return said if said.startswith("did you mean") else ""


def _check_skipped(source: str, skipped: list[Skipped], total: int) -> None:
    if len(skipped) > SKIP_LIMIT * total:
        first = "; ".join(f"{one.path[-60:]} ({one.reason[:60]})" for one in skipped[:3])
        raise DataError(
            f"{len(skipped)} of {total} pictures in {source} cannot be used, more than {SKIP_LIMIT:.0%}: {first}",
            "repair or remove them",
        )


def _check_counts(source: str, listing: Listing, kept: list[Entry], tests: bool) -> None:
    """Every class must have pictures to learn from."""
    size = len(listing.classes)
    listed = np.bincount([entry.label for entry in listing.entries], minlength=size)
    usable = np.bincount([entry.label for entry in kept], minlength=size)
    to_test = np.bincount([entry.label for entry in kept if entry.part == "test"], minlength=size)
    for label, name in enumerate(listing.classes):
        if not listed[label]:
            raise DataError(
                f"{source}: the class {name!r} has no pictures", "add some or take the class out of the class list"
            )
        if not usable[label]:
            raise DataError(
                f"{source}: none of the {listed[label]} pictures of class {name!r} can be read", "replace them"
            )
        if usable[label] == to_test[label]:
            raise DataError(
                f"{source}: the class {name!r} has {to_test[label]} test pictures, but none to train on",
                "add training pictures or remove the class from the test split",
            )
    if tests and any(entry.part for entry in kept) and not to_test.any():
        raise DataError(f"{source}: no picture of the test split can be used", "replace them, or remove the test split")


_Row = tuple[Entry, Seen, Part]


def _rows(
    kept: list[tuple[Entry, Seen]], classes: Sequence[str], share: float, seed: int, every_class: bool = True
) -> list[_Row]:
    labels = np.array([entry.label for entry, _ in kept], dtype=np.int64)
    test = choose_test(labels, [one.digest for _, one in kept], classes, share, seed, every_class)
    return [(entry, one, "test" if aside else "train") for (entry, one), aside in zip(kept, test.tolist(), strict=True)]


def _split(rows: list[_Row], part: Part) -> Split:
    chosen = [entry for entry, _, of in rows if of == part]
    return Split(tuple(entry.picture for entry in chosen), np.array([entry.label for entry in chosen], dtype=np.int64))


def _fingerprint(classes: Sequence[str], templates: Sequence[str], rows: Iterable[tuple[str, int, bytes]]) -> str:
    total = hashlib.sha256(json.dumps([list(classes), list(templates)]).encode())
    for part, label, digest in sorted(rows):
        total.update(f"\n{part} {label} ".encode() + digest)
    return total.hexdigest()


def _spread(pixels: Iterable[int]) -> tuple[int, int, int]:
    values = np.fromiter(pixels, dtype=np.int64)
    return int(values.min()), int(np.median(values)), int(values.max())
