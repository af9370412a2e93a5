"""Pictures in batches: in order, whatever decodes them, and not many ahead of who asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from condu_ray.data import TaskData, open_task
from condu_ray.data.loading import PictureSet, in_batches
from condu_ray.errors import DataError


@pytest.fixture(scope="module")
def task(picture_tasks: dict[str, Path]) -> TaskData:
    return open_task("colours", picture_tasks["colours"])


def mean_colour(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(picture.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32).reshape(3, 1, 1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 36, 50])
def test_batches_are_in_order_and_the_last_may_be_smaller(task: TaskData, size: int, threads: int) -> None:
    pictures = PictureSet(task.train, mean_colour)
    found = list(in_batches(pictures, size, threads))
    assert [len(labels) for _, labels in found] == [*[size] * (36 // size), *[36 % size] * (36 % size > 0)]
    assert torch.equal(torch.cat([pixels for pixels, _ in found]), torch.stack([pictures[i][0] for i in range(36)]))
    assert torch.cat([labels for _, labels in found]).tolist() == task.train.labels.tolist()


def test_no_pictures_are_no_batches(task: TaskData) -> None:
    assert not list(in_batches(PictureSet(task.train.take([]), mean_colour), 4))


def test_one_batch_is_decoded_ahead_and_no_more(task: TaskData) -> None:
    decoded: list[Any] = []
    batches = in_batches(
        PictureSet(task.train, lambda picture: (decoded.append(picture), mean_colour(picture))[1]), 4, 2
    )
    next(batches)
    assert 4 <= len(decoded) <= 8
    next(batches)
    assert 8 <= len(decoded) <= 12
    batches.close()


def test_a_picture_that_went_away_is_told(picture_tasks: dict[str, Path], tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (40 * number, 0, 90)).save(tmp_path / "train" / label / f"{number}.png")
    task = open_task("two", tmp_path)
    Path(task.train.pictures[1].path).unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        list(in_batches(PictureSet(task.train, mean_colour), 2, 2))
