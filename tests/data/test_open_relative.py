"""What a path means: relative ones are read by processes that stand elsewhere, ~ may be a part of a name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from condu_ray.data import open_pictures, open_task
from condu_ray.data.part import ordered
from condu_ray.errors import DataError


def test_pictures_of_a_relative_folder_have_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        for index in range(3):
            folder = tmp_path / "birds" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + index, 8), colour).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    task = open_task("birds", "./birds")
    assert all(Path(picture.path).is_absolute() for picture in (*task.train.pictures, *task.test.pictures))
    assert task.fingerprint == open_task("birds", tmp_path / "birds").fingerprint


def test_a_path_that_begins_like_a_user_nobody_knows_is_taken_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("~nobody knows.png")
    assert [picture.path for picture in open_pictures(["~nobody knows.png"])] == ["~nobody knows.png"]
    for source in ("~nobody knows", "~nobody knows#1/2"):
        with pytest.raises(DataError, match="there is no data at '~nobody knows'"):
            open_task("birds", source)
    with pytest.raises(DataError, match="there is no class order ~nobody knows"):
        ordered(["a", "b"], "~nobody knows")


def test_a_relative_folder_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"^there is no data at './birds' \(looked in {tmp_path}\): give"):
        open_task("birds", "./birds")
    with pytest.raises(DataError, match="^there is no data at '/no/birds': give"):
        open_task("birds", "/no/birds")


def test_a_single_path_is_not_taken_for_a_list_of_letters(tmp_path: Path) -> None:
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(DataError, match="is one path: give a list of paths"):
            open_pictures(path)  # type: ignore[arg-type]
