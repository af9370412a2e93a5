"""The pictures that the package makes: the same each time, balanced, whole, and apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from condu_ray.benchmark import drawing
from condu_ray.benchmark.worlds import TEST_PICTURES, TRAIN_PICTURES, WORLDS, World, write_world, write_worlds
from condu_ray.data import open_task

NAMES = [world.name for world in WORLDS]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_worlds(tmp_path_factory.mktemp("worlds"))


def test_five_worlds_of_six_to_ten_classes_with_their_own_prompts() -> None:
    assert len(WORLDS) == len(set(NAMES)) == 5
    assert all(6 <= len(set(world.classes)) == len(world.classes) <= 10 for world in WORLDS)
    assert all("{c}" in template for world in WORLDS for template in world.templates)
    assert len({world.templates for world in WORLDS}) == 5


@pytest.mark.parametrize("world", WORLDS, ids=NAMES)
def test_the_same_seed_draws_the_same_and_another_seed_does_not(world: World) -> None:
    name = world.classes[-1]
    drawn = [np.stack(list(world.pictures(name, 3, seed))) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_files_have_the_same_bytes_each_time(worlds: dict[str, Path], tmp_path: Path) -> None:
    world = WORLDS[NAMES.index("metal")]
    write_world(world, 0, tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == len(world.classes) * (world.train_per_class + world.test_per_class) + 2
    assert all((worlds["metal"] / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


@pytest.mark.parametrize("world", WORLDS, ids=NAMES)
def test_opens_as_a_task_with_balanced_classes(worlds: dict[str, Path], world: World) -> None:
    task = open_task(world.name, str(worlds[world.name]))
    assert tuple(task.classes) == world.classes
    assert tuple(task.templates) == world.templates
    assert set(Counter(task.train.labels.tolist()).values()) == {world.train_per_class}
    assert set(Counter(task.test.labels.tolist()).values()) == {world.test_per_class}
    assert 150 <= len(task.train) <= TRAIN_PICTURES
    assert 90 <= len(task.test) <= TEST_PICTURES
    assert not task.split_made
    assert not task.skipped


@pytest.mark.parametrize("name", NAMES)
def test_no_picture_twice(worlds: dict[str, Path], name: str) -> None:
    digests = Counter(hashlib.sha256(path.read_bytes()).hexdigest() for path in worlds[name].rglob("*.png"))
    assert max(digests.values()) == 1


def test_a_world_that_is_there_is_left_alone(worlds: dict[str, Path]) -> None:
    first = next(worlds["land"].rglob("*.png"))
    written = first.stat().st_mtime_ns
    assert write_worlds(worlds["land"].parent) == worlds
    assert first.stat().st_mtime_ns == written


def test_pictures_are_colour_and_64_pixels_wide(worlds: dict[str, Path]) -> None:
    for folder in worlds.values():
        with Image.open(next(folder.rglob("*.png"))) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_digits_are_the_real_ones(worlds: dict[str, Path]) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    with Image.open(worlds["digits"] / "train" / "seven" / "0.png") as picture:
        small = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), float)
    away = np.abs(found.images * (255 / 16) - small).mean(axis=(1, 2))
    assert found.target[away.argmin()] == 7
    assert away.min() < 12


@pytest.mark.parametrize("draw", [drawing.texture, drawing.metal, drawing.land])
def test_an_unknown_class_is_named(draw) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="gadget"):
        draw(np.random.default_rng(0), "gadget")
