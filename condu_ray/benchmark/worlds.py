"""Five small image classification tasks of different domains, made without a network: handwritten digits that are real
(scikit-learn's), and four that are drawn. The same seed gives the same bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from condu_ray.benchmark import drawing
from condu_ray.benchmark.drawing import SIDE, Pixels
from condu_ray.data.cache import fill
from condu_ray.data.listing import CLASS_FILE, TEMPLATE_FILE

TRAIN_PICTURES, TEST_PICTURES = 200, 100  # a task, at most; shared out evenly among its classes


@dataclass(frozen=True)
class World:
    """A task: its class names in label order, the sentences they are put into, and what pictures a class has.

    pictures: (class name, how many, seed) -> that many different pictures.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    pictures: Callable[[str, int, int], Iterator[Pixels]]

    @property
    def train_per_class(self) -> int:
        return TRAIN_PICTURES // len(self.classes)

    @property
    def test_per_class(self) -> int:
        return TEST_PICTURES // len(self.classes)


SEED = 0


def write_worlds(folder: Path) -> dict[str, Path]:
    """Writes every world as FOLDER/NAME/{train,test}/CLASS/N.png with class names and templates.

    Returns name -> folder. A world that is there is left as it is; one that was interrupted is made anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {world.name: fill(folder / world.name, partial(write_world, world, SEED)) for world in WORLDS}


def write_world(world: World, seed: int, folder: Path) -> None:
    """Writes one world into a folder that exists."""
    for name in world.classes:
        places = [folder / "train" / name / f"{number}.png" for number in range(world.train_per_class)]
        places += [folder / "test" / name / f"{number}.png" for number in range(world.test_per_class)]
        for place, pixels in zip(places, world.pictures(name, len(places), seed), strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place, compress_level=1)
    for file, lines in ((CLASS_FILE, world.classes), (TEMPLATE_FILE, world.templates)):
        (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _drawn(draw: Callable[[Generator, str], Pixels], name: str, count: int, seed: int) -> Iterator[Pixels]:
    for number in range(count):
        yield draw(np.random.default_rng([seed, zlib.crc32(name.encode()), number]), name)


def _digits(name: str, count: int, seed: int) -> Iterator[Pixels]:
    """Real digits, 8 by 8 and 17 shades, enlarged."""
    from sklearn.datasets import load_digits

    found = load_digits()
    own = np.unique(found.images[found.target == DIGITS.index(name)], axis=0)
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(own))
    for number in order[:count]:
        small = Image.fromarray((own[number] * (255 / 16)).astype(np.uint8))
        yield np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"))


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

WORLDS = (
    World(
        "textures",
        ("striped", "chequered", "dotted", "wavy", "zigzag", "brick", "grainy", "marbled"),
        ("a photo of a {c} texture.", "a {c} pattern.", "a {c} surface."),
        partial(_drawn, drawing.texture),
    ),
    World(
        "shapes",
        ("circle", "square", "triangle", "star", "cross", "heart", "ring", "crescent", "arrow"),
        ("a drawing of a {c}.", "a coloured {c}.", "a picture of the shape of a {c}."),
        partial(_drawn, drawing.shape),
    ),
    World(
        "digits",
        DIGITS,
        ("a photo of the number {c}.", "a handwritten {c}.", "the digit {c}."),
        _digits,
    ),
    World(
        "land",
        ("forest", "farmland", "city", "river", "lake", "beach", "desert", "highway"),
        ("a satellite photo of a {c}.", "an aerial view of a {c}.", "a {c} seen from above."),
        partial(_drawn, drawing.land),
    ),
    World(
        "metal",
        ("clean surface", "scratch", "hole", "dent", "stain", "crack"),
        ("a photo of metal with a {c}.", "a metal part, {c}.", "inspection picture: {c}."),
        partial(_drawn, drawing.metal),
    ),
)
