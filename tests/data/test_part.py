"""A part of a set's classes as a task of its own."""

from __future__ import annotations

import pytest

from condu_ray.data import open_task
from condu_ray.data.part import ordered
from condu_ray.errors import DataError

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


@pytest.fixture
def folder(make, tmp_path):
    return make.image_folder(tmp_path / "animals", CLASSES)


def test_the_parts_hold_every_class_once_and_in_order(folder):
    parts = [open_task("t", f"{folder}#{number}/3") for number in (1, 2, 3)]
    assert [part.classes for part in parts] == [("ant", "bee"), ("cat", "dog"), ("elk", "fox", "gnu")]
    assert [len(part.train) + len(part.test) for part in parts] == [10, 10, 15]
    for part in parts:
        for picture, label in zip(part.train.pictures, part.train.labels, strict=True):
            assert f"/{part.classes[label]}/" in picture.path
    assert len({part.fingerprint for part in parts}) == 3


def test_one_part_is_the_whole(folder):
    assert open_task("t", f"{folder}#1/1").fingerprint == open_task("t", folder).fingerprint


def test_members_without_a_label_count_in_the_whole_set(make, tmp_path):
    """Nobody knows of which class they are: in a part of the set they would be a larger share than in the set."""
    names = [f"class {number}" for number in range(10)]
    make.write(tmp_path / "classnames.txt", "\n".join(names).encode())
    files = make.pairs([number % 10 for number in range(100)])
    for number in range(4):
        del files[f"s{number}.cls"]
    make.write(tmp_path / "train" / "0.tar", make.tar_bytes(files))
    task = open_task("t", f"{tmp_path}#1/5")
    assert len(task.train) + len(task.test) == 18 and len(task.skipped) == 4
    for number in range(4, 7):
        del files[f"s{number}.cls"]
    make.write(tmp_path / "train" / "0.tar", make.tar_bytes(files))
    with pytest.raises(DataError, match="7 of 100 pictures .* cannot be used"):
        open_task("t", f"{tmp_path}#1/5")


@pytest.mark.parametrize("part", ["#0/2", "#3/2", "#1/4", "#1/0"])
def test_a_part_that_is_not_there_is_refused(folder, part):
    with pytest.raises(DataError, match="there is no part"):
        open_task("t", f"{folder}{part}")


def test_a_folder_of_that_name_is_meant_where_there_is_one(make, tmp_path):
    folder = make.image_folder(tmp_path / "animals#1" / "3", CLASSES)
    assert open_task("t", folder).classes == CLASSES


@pytest.mark.parametrize(
    ("classes", "lines", "places"),
    [
        (("1", "10", "2", "0"), "10 2 0 1", [1, 2, 3, 0]),  # names, though they could be places
        (("1", "10", "2", "3"), "0 3 2 1", [0, 3, 2, 1]),  # 0 is no name
        (("red_fox", "Café", "owl"), "owl cafe\u0301 RED_FOX", [2, 1, 0]),
        (("fox", "owl", "elk"), "2 fox 1", [2, 0, 1]),
    ],
)
def test_an_order_file_holds_names_or_else_places(make, tmp_path, classes, lines, places):
    file = make.write(tmp_path / "order.txt", lines.replace(" ", "\n").encode())
    assert ordered(classes, str(file)) == places


@pytest.mark.parametrize("lines", ["1 2 11", "1 2", "1 2 2 10", "0 1 3"])
def test_what_is_no_order_of_the_classes_is_refused(make, tmp_path, lines):
    file = make.write(tmp_path / "order.txt", lines.replace(" ", "\n").encode())
    with pytest.raises(DataError, match="is not an order of 3 classes"):
        ordered(("1", "2", "10"), str(file))
