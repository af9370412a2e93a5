"""A task of small coloured pictures, and settings that train it in a few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.task import Picture, Sizes, Split
from condu_ray.sources import from_dotted

Settings = Callable[..., SessionConfig]


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    """Ten pictures of 32 x 32: noisy red ones and noisy blue ones."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    pictures = []
    for number in range(10):
        pixels = random.integers(0, 80, (32, 32, 3), dtype=np.uint8)
        pixels[..., 2 * (number % 2)] += 150
        Image.fromarray(pixels).save(folder / f"{number}.png")
        pictures.append(Picture(str(folder / f"{number}.png")))
    train = Split(tuple(pictures), np.arange(10) % 2)
    sizes = Sizes((32, 32, 32), (32, 32, 32))
    return TaskData(
        name="colours",
        source=str(folder),
        classes=("red", "blue"),
        templates=("a photo of a {c}.", "art of the {c}."),
        train=train,
        test=train.take([0, 1]),
        skipped=(),
        fingerprint="0" * 64,
        sizes=sizes,
        split_made=True,
        leaked=0,
    )


@pytest.fixture
def settings() -> Settings:
    """Settings by dotted name ('.' as '__') over four steps of four pictures."""

    def make(**changes: Any) -> SessionConfig:
        given = {"train.steps": 4, "train.batch_size": 4, "train.lr": 1e-3, "lora.rank": 4}
        return from_dotted({**given, **{name.replace("__", "."): value for name, value in changes.items()}})

    return make
