"""CSV files with the columns path, label and, if wanted, split."""

from __future__ import annotations

import csv
from pathlib import Path

from condu_ray.data.listing import SPLITS, Entry, Listing, Part, check_names, part_of
from condu_ray.data.task import Picture
from condu_ray.errors import DataError, nearest


def list_table(path: Path) -> Listing:
    """Lists a CSV. Paths are relative to it; val rows join train if there are test rows, else they are the test split.

    Labels are class names.
    """
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path} has no rows", "write one row a picture: path,label")
    classes = check_names(sorted({label for _, _, label, _ in rows}), str(path))
    labels = {name: label for label, name in enumerate(classes)}
    given = {SPLITS[split] for *_, split in rows if split in SPLITS}
    named = any(split and SPLITS.get(split) != "train" for *_, split in rows)
    entries = []
    for line, name, label, split in rows:
        part: Part = ""
        if named:
            if split not in SPLITS:
                what = f"the split {split!r}" if split else "an empty split"
                raise DataError(f"{path} line {line} has {what}", nearest(split, SPLITS))
            part = part_of(SPLITS[split], given)
        entries.append(Entry(Picture(str(path.parent / name)), labels[label], part, name))
    if all(entry.part == "test" for entry in entries):
        raise DataError(f"{path} has no row of the split train", "name some, or leave the column split out")
    return Listing(classes, None, entries, [])


def _rows(path: Path) -> list[tuple[int, str, str, str]]:
    """(line number, path, label, split) of each row that is not blank."""
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            columns = [name.strip().casefold() for name in next(csv.reader([header], delimiter=delimiter), [])]
            for column in ("path", "label"):
                if column not in columns:
                    found = ", ".join(columns)[:100]
                    raise DataError(f"{path} has no column {column!r} (found: {found})", "write a header: path,label")
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
                line = reader.line_num + 1
                for column in ("path", "label"):
                    if not row.get(column):
                        raise DataError(f"{path} line {line} has no {column}", "fill it in or remove the row")
                if "\0" in row["path"]:
                    raise DataError(f"{path} line {line} has a path with a zero byte", "correct it or remove the row")
                rows.append((line, row["path"], row["label"], row.get("split", "").casefold()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})", "save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(
            f"{path} is not a CSV file ({error})", "write a header, path,label, and a row a picture"
        ) from error
    return rows
