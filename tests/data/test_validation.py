"""Validation pictures come from the training pictures; those to test on are not opened."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from condu_ray.data import open_task
from condu_ray.errors import DataError

CLASSES = ["one", "three", "two"]
RUBBISH = b"no picture, and no tar"


def folders(make, root):
    make.image_folder(root / "train", CLASSES, count=10)
    make.image_folder(root / "test", CLASSES, count=4, first=100)
    return root


def damage(folder, pattern):
    found = list(folder.rglob(pattern))
    for path in found:
        path.write_bytes(RUBBISH)
    assert found


def test_the_test_split_of_a_folder_may_be_unreadable(make, tmp_path):
    root = folders(make, tmp_path)
    whole = open_task("t", root)
    damage(root / "test", "*.png")
    with pytest.raises(DataError):
        open_task("t", root)
    task = open_task("t", root, validation=0.2)
    assert np.bincount(task.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(task.test.labels).tolist() == [2, 2, 2]
    assert {*task.train.pictures, *task.test.pictures} == {*whole.train.pictures}
    assert task.fingerprint != whole.fingerprint


def test_the_test_tars_may_be_unreadable(make, tmp_path):
    root = make.tar_folder(tmp_path / "d", CLASSES)
    whole = open_task("t", root)
    damage(root / "test", "0.tar")
    with pytest.raises(DataError):
        open_task("t", root)
    task = open_task("t", root, validation=0.25)
    assert {*task.train.pictures, *task.test.pictures} == {*whole.train.pictures}


def test_the_test_rows_of_a_table_may_lead_nowhere(make, tmp_path):
    make.image_folder(tmp_path / "all", CLASSES, count=6)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name},train" for path in sorted(tmp_path.rglob("*.png"))]
    rows += [f"all/gone{number}.png,{CLASSES[number % 3]},test" for number in range(6)]
    table = make.write(tmp_path / "d.csv", "\n".join(["path,label,split", *rows]).encode())
    with pytest.raises(DataError):
        open_task("t", table)
    task = open_task("t", table, validation=0.5)
    assert (len(task.train), len(task.test)) == (9, 9)


def test_where_the_test_split_is_made_here_it_is_left_out(make, tmp_path):
    root = make.image_folder(tmp_path / "d", CLASSES, count=10)
    whole = open_task("t", root, seed=3)
    task = open_task("t", root, seed=3, validation=0.25)
    assert {*task.train.pictures, *task.test.pictures} == {*whole.train.pictures}
    assert not {*task.test.pictures} & {*whole.test.pictures}
    assert open_task("t", root, seed=3, validation=0.25) == task
    assert open_task("t", root, seed=4, validation=0.25).test != task.test


def test_a_class_with_one_picture_keeps_it(make, tmp_path):
    make.image_folder(tmp_path / "train", CLASSES[:2], count=5)
    make.image_folder(tmp_path / "train", CLASSES[2:], count=1, first=50)
    make.image_folder(tmp_path / "test", CLASSES, count=1, first=100)
    task = open_task("t", tmp_path, validation=0.2)
    assert Counter(task.classes[label] for label in task.train.labels.tolist()) == {"one": 4, "three": 4, "two": 1}
    assert Counter(task.classes[label] for label in task.test.labels.tolist()) == {"one": 1, "three": 1}
