"""A source given by a relative path is read by processes that stand elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from condu_ray.data import open_task


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
