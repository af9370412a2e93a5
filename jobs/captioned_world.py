"""A generated world of captioned pictures for pretraining: shapes, counts, places, textures, digits, letters, signs.

Nothing here comes from a data set. Every class is a caption made of words ("red striped" from "red" and "striped"); a
fifth of the combinations is held out of training, so that a model can be asked for combinations that it never saw.
The same seed gives the same pictures.

    python jobs/captioned_world.py --out SHEET.png        draws a few pictures of every family, to look at
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage
from scipy.interpolate import CubicSpline

SIDE, FINE = 64, 128

Field = NDArray[np.float64]
Colour = tuple[int, int, int]
Point = tuple[float, float]

# hue range in turns, saturation, value
HUES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-0.025, 0.02), (0.75, 1), (0.6, 1)),
    "orange": ((0.06, 0.095), (0.8, 1), (0.85, 1)),
    "yellow": ((0.135, 0.17), (0.7, 1), (0.85, 1)),
    "green": ((0.26, 0.42), (0.5, 1), (0.35, 0.9)),
    "blue": ((0.55, 0.67), (0.6, 1), (0.45, 1)),
    "purple": ((0.73, 0.81), (0.5, 1), (0.4, 0.85)),
    "pink": ((0.87, 0.96), (0.3, 0.6), (0.9, 1)),
    "brown": ((0.04, 0.1), (0.5, 0.8), (0.3, 0.5)),
    "black": ((0, 1), (0, 0.2), (0, 0.12)),
    "white": ((0, 1), (0, 0.04), (0.93, 1)),
    "gray": ((0, 1), (0, 0.08), (0.4, 0.65)),
}
COLOURS = tuple(HUES)
SHAPES = (
    *("circle", "square", "triangle", "star", "cross", "heart", "ring", "crescent", "arrow", "pentagon", "hexagon"),
    *("diamond", "rectangle", "oval", "line", "spiral"),
)
COUNTED = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
NUMBERS = ("two", "three", "four", "five", "six")
PLACES = ("left", "right", "top", "bottom", "center")
PATTERNS = (
    *("striped", "banded", "chequered", "dotted", "zigzagged", "wavy", "grid", "brick", "woven", "cracked"),
    *("bubbly", "crosshatched", "crystalline", "blotchy", "cobwebbed", "marbled", "grainy", "bumpy", "braided"),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SPEEDS = tuple(f"speed limit {speed} km/h" for speed in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130))
ARROWS = (
    *("ahead only", "turn left ahead", "turn right ahead", "keep left", "keep right", "roundabout mandatory"),
    *("go straight or right", "go straight or left"),
)
SIGNS = (*SPEEDS, *ARROWS, "stop", "yield", "no entry", "priority road", "general danger", "no vehicles allowed")
SIGNS += ("end of all restrictions", "traffic lights ahead", "no overtaking")


@dataclass(frozen=True)
class Class:
    """One class: its family, its caption (for a prompt template), and the words whose vectors add up to its meaning."""

    family: str
    caption: str
    words: tuple[str, ...]
    held_out: bool


def _class(family: str, caption: str, *words: str) -> Class:
    chance = int.from_bytes(hashlib.sha256(f"{family}/{caption}".encode()).digest()[:4], "big") % 5
    return Class(family, caption, words, len(words) > 1 and chance == 0)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


CLASSES: tuple[Class, ...] = (
    *(_class("shapes", f"{colour} {shape}", colour, shape) for colour in COLOURS for shape in SHAPES),
    *(_class("counts", f"{number} {_plural(shape)}", number, shape) for number in NUMBERS for shape in COUNTED),
    *(_class("places", f"{shape} at the {place}", shape, place) for shape in COUNTED for place in PLACES),
    *(_class("textures", f"{colour} {pattern}", colour, pattern) for colour in COLOURS for pattern in PATTERNS),
    *(_class("patterns", pattern, pattern) for pattern in PATTERNS),
    *(_class("digits", digit, digit) for digit in DIGITS),
    *(_class("letters", f"{colour} letter {x}", colour, f"letter {x}") for colour in COLOURS for x in LETTERS),
    *(_class("signs", sign, sign) for sign in SIGNS),
)
FAMILIES = tuple(dict.fromkeys(one.family for one in CLASSES))
WORDS = tuple(sorted({word for one in CLASSES for word in one.words}))


def draw(what: Class, rng: Generator) -> NDArray[np.uint8]:
    """One picture u8[64, 64, 3]; all that the caption does not name varies."""
    if what.family == "shapes":
        colour = _colour(rng, what.words[0])
        image = _canvas(rng, away_from=colour)
        _shape(rng, image, what.words[1], colour, rng.uniform(26, 50), None)
    elif what.family == "counts":
        image = _several(rng, NUMBERS.index(what.words[0]) + 2, what.words[1])
    elif what.family == "places":
        image = _placed(rng, *what.words)
    elif what.family == "textures":
        image = _texture(rng, what.words[1], what.words[0])
    elif what.family == "patterns":
        image = _texture(rng, what.words[0], None)
    elif what.family == "digits":
        image = _digit(rng, DIGITS.index(what.words[0]))
    elif what.family == "letters":
        colour = _colour(rng, what.words[0])
        image = _canvas(rng, away_from=colour)
        letter = what.words[1][-1]
        _write(rng, image, letter if rng.random() < 0.7 else letter.lower(), colour)
    else:
        image = _sign(rng, what.words[0])
    return _finished(rng, image)


# ---- colours and grounds


def _colour(rng: Generator, name: str | None = None) -> Colour:
    hue, saturation, value = HUES[name if name is not None else COLOURS[rng.integers(len(COLOURS))]]
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def _other(rng: Generator, colour: Colour, least: float = 150) -> Colour:
    while math.dist(other := _colour(rng), colour) < least:
        pass
    return other


def _image(pixels: Field) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _blend(first: Colour, second: Colour, level: Field) -> Field:
    return np.asarray((1 - level[..., None]) * np.array(first, float) + level[..., None] * np.array(second, float))


def _clouds(rng: Generator, cells: int, side: int = FINE) -> Field:
    coarse = Image.fromarray(rng.random((cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), float).clip(0, 1)


def _canvas(rng: Generator, away_from: Colour | None = None) -> Image.Image:
    """A plain or cloudy ground, far from a colour where one is given."""
    first, second = (_other(rng, away_from, 110) if away_from else _colour(rng) for _ in range(2))
    return _image(_blend(first, second, rng.uniform(0, 0.4) * _clouds(rng, int(rng.integers(1, 5)))))


def _contrast(rng: Generator, image: Image.Image) -> Colour:
    return _other(rng, image.resize((1, 1)).getpixel((0, 0)))  # type: ignore[arg-type]


# ---- shapes


def _ring(count: int, *radii: float) -> list[Point]:
    turns = [2 * math.pi * k / count - math.pi / 2 for k in range(count)]
    return [(radii[k % len(radii)] * math.cos(t), radii[k % len(radii)] * math.sin(t)) for k, t in enumerate(turns)]


def _box(width: float, height: float) -> list[Point]:
    return [(-width, -height), (width, -height), (width, height), (-width, height)]


def _heart() -> list[Point]:
    steps = np.linspace(0, 2 * math.pi, 40)
    y = 13 * np.cos(steps) - 5 * np.cos(2 * steps) - 2 * np.cos(3 * steps) - np.cos(4 * steps)
    return [(float(a), float(b)) for a, b in zip(np.sin(steps) ** 3, -y / 16, strict=True)]


_BAR = 0.32
_CROSS = [(-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR)]
POLYGONS: dict[str, list[Point]] = {
    "circle": _ring(48, 1),
    "square": _box(0.8, 0.8),
    "triangle": _ring(3, 1),
    "star": _ring(10, 1, 0.42),
    "cross": [*_CROSS, *((-x, -y) for x, y in _CROSS)],
    "heart": _heart(),
    "arrow": [(1, 0), (0.15, -0.75), (0.15, -0.28), (-1, -0.28), (-1, 0.28), (0.15, 0.28), (0.15, 0.75)],
    "pentagon": _ring(5, 1),
    "hexagon": _ring(6, 1),
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
    "rectangle": _box(1, 0.5),
    "oval": [(x, 0.55 * y) for x, y in _ring(48, 1)],
    "line": _box(1, 0.07),
}


def _shape(
    rng: Generator, image: Image.Image, kind: str, colour: Colour, size: float, centre: Point | None, turn: float = 0.4
) -> None:
    """Paints one shape; where centre is None anywhere that it fits."""
    if centre is None:
        x, y = rng.uniform(size, FINE - size, 2)
        centre = (float(x), float(y))
    angle = rng.uniform(-turn, turn)
    if kind == "arrow" or kind == "line":
        angle = rng.uniform(0, 2 * math.pi)

    def place(points: list[Point], scale: float = 1.0, shift: float = 0.0) -> list[Point]:
        cos, sin = scale * size * math.cos(angle), scale * size * math.sin(angle)
        return [(centre[0] + x * cos - y * sin + shift * size, centre[1] + x * sin + y * cos) for x, y in points]

    pen = ImageDraw.Draw(image)
    if kind == "spiral":
        steps = np.linspace(0.15, 1, 60)
        turns = steps * rng.uniform(2.2, 3.4) * 2 * math.pi
        path = [(float(r * math.cos(t)), float(r * math.sin(t))) for r, t in zip(steps, turns, strict=True)]
        pen.line(place(path), fill=colour, width=max(3, round(size / 8)), joint="curve")
    elif kind in ("ring", "crescent"):
        mask = Image.new("L", image.size, 0)
        cut = ImageDraw.Draw(mask)
        cut.polygon(place(POLYGONS["circle"]), fill=255)
        inner, shift = (rng.uniform(0.45, 0.68), 0.0) if kind == "ring" else (0.85, rng.choice((-0.45, 0.45)))
        cut.polygon(place(POLYGONS["circle"], inner, shift), fill=0)
        image.paste(Image.new("RGB", image.size, colour), (0, 0), mask)
    else:
        pen.polygon(place(POLYGONS[kind]), fill=colour)


def _several(rng: Generator, count: int, kind: str) -> Image.Image:
    image = _canvas(rng)
    colour, size = _contrast(rng, image), rng.uniform(11, 16)
    cells = rng.permutation(9)[:count]
    for cell in cells:
        x, y = (22 + 42 * int(v) + rng.uniform(-4, 4) for v in divmod(int(cell), 3))
        _shape(rng, image, kind, colour, size, (x, y))
    return image


def _placed(rng: Generator, kind: str, place: str) -> Image.Image:
    image = _canvas(rng)
    size = rng.uniform(14, 24)
    near, far, middle = size + rng.uniform(0, 8), FINE - size - rng.uniform(0, 8), FINE / 2 + rng.normal(0, 5)
    free = rng.uniform(45, 83)
    centres = {"left": (near, free), "right": (far, free), "top": (free, near), "bottom": (free, far)}
    centre = centres.get(place, (middle, middle))
    _shape(rng, image, kind, _contrast(rng, image), size, centre)
    return image


# ---- textures


def _soft(values: Field, sharp: float) -> Field:
    return np.asarray(1 / (1 + np.exp(-np.clip(sharp * values, -30, 30))))


def _cells(rng: Generator, count: int, x: Field, y: Field) -> tuple[Field, Field, NDArray[np.int64]]:
    """Distances to the nearest and the second of some random points, and which is the nearest."""
    points = rng.uniform(-8, SIDE + 8, (count, 2))
    away = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    order = np.argsort(away, axis=-1)[..., :2]
    both = np.take_along_axis(away, order, -1)
    return both[..., 0], both[..., 1], order[..., 0]


def _level(rng: Generator, kind: str) -> Field:
    """The pattern as f64[64, 64] in 0..1."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    angle = rng.uniform(-0.35, 0.35) + (math.pi / 2 if rng.random() < 0.5 else 0)
    bend = rng.uniform(0, 5)
    wx, wy = x + bend * (_clouds(rng, 3, SIDE) - 0.5), y + bend * (_clouds(rng, 3, SIDE) - 0.5)
    u = wx * math.cos(angle) - wy * math.sin(angle) + rng.uniform(0, 99)
    v = wx * math.sin(angle) + wy * math.cos(angle) + rng.uniform(0, 99)
    step = rng.uniform(7, 18)
    hard = rng.uniform(2, 8)
    wave = 2 * math.pi / step
    if kind == "striped":
        return _soft(np.sin(wave * u), hard)
    if kind == "banded":
        tones = rng.random(64)
        width = rng.uniform(6, 15)
        place = u / width
        first = np.floor(place).astype(int)
        here, there = tones[first % 64], tones[(first + 1) % 64]
        return np.asarray(here + (there - here) * _soft(place % 1 - 0.9, 25))
    if kind == "chequered":
        return _soft(np.sin(wave / 2 * u) * np.sin(wave / 2 * v), 3 * hard)
    if kind == "dotted":
        shift = (np.floor(v / step) % 2) * step / 2 * (rng.random() < 0.5)
        away = np.hypot((u + shift) % step - step / 2, v % step - step / 2)
        return _soft(step * rng.uniform(0.2, 0.38) - away, 1.5)
    if kind == "zigzagged":
        return _soft(np.sin(wave * v + 2 * math.pi * np.abs((u / (1.6 * step)) % 1 - 0.5) * rng.uniform(1, 2)), hard)
    if kind == "wavy":
        return _soft(np.sin(wave * v + rng.uniform(1.5, 3) * np.sin(wave / 2.2 * u)), hard)
    if kind == "grid":
        width = rng.uniform(0.12, 0.25)
        return np.asarray(((u / step % 1 < width) | (v / step % 1 < width)).astype(float))
    if kind == "brick":
        row = np.floor(v / (0.7 * step))
        gap = rng.uniform(0.08, 0.16)
        along = u / (1.5 * step) + 0.5 * (row % 2)
        joint = (v / (0.7 * step) % 1 < 1.6 * gap) | (along % 1 < gap)
        tone = rng.random(211)[(row * 17 + np.floor(along) * 7).astype(int) % 211]
        return np.where(joint, 1.0, 0.35 * tone)
    if kind == "woven":
        over = (np.floor(u / step) + np.floor(v / step)) % 2
        rise, run = np.abs(np.sin(math.pi * u / step)), np.abs(np.sin(math.pi * v / step))
        return np.asarray(np.where(over > 0, rise, 0.75 * run) ** 0.7)
    if kind == "cracked":
        rough_x, rough_y = wx + 3 * _clouds(rng, 12, SIDE), wy + 3 * _clouds(rng, 12, SIDE)
        near, second, _ = _cells(rng, int(rng.integers(6, 22)), rough_x, rough_y)
        return np.asarray(np.maximum(_soft(rng.uniform(0.7, 1.6) - (second - near), 3), 0.25 * _clouds(rng, 20, SIDE)))
    if kind == "bubbly":
        level = np.zeros_like(x)
        for _ in range(int(rng.integers(15, 50))):
            cx, cy, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(2.5, 10)
            away = np.hypot(x - cx, y - cy) / r
            shine = np.exp(-(((x - cx + 0.35 * r) ** 2 + (y - cy + 0.35 * r) ** 2) / (0.25 * r) ** 2))
            level = np.where(away < 1, 0.15 + 0.5 * away**4 + 0.8 * shine, level)
        return np.asarray(np.clip(level, 0, 1))
    if kind == "crosshatched":
        thin, tilt = rng.uniform(4, 9), rng.uniform(0.6, 1.2)
        a = np.sin(2 * math.pi / thin * (u + tilt * v) + 2 * _clouds(rng, 6, SIDE))
        b = np.sin(2 * math.pi / thin * (u - tilt * v) + 2 * _clouds(rng, 6, SIDE))
        return np.asarray(np.maximum(_soft(a - 0.6, 6), _soft(b - 0.6, 6)))
    if kind == "crystalline":
        near, second, which = _cells(rng, int(rng.integers(8, 40)), x, y)
        slope = rng.uniform(-1, 1, (40, 3))[which % 40]
        facet = 0.5 + 0.45 * slope[..., 2] + 0.02 * (slope[..., 0] * (x - 32) + slope[..., 1] * (y - 32))
        return np.asarray(np.clip(facet + 0.5 * _soft(0.8 - (second - near), 4), 0, 1))
    if kind == "blotchy":
        noise = ndimage.gaussian_filter(rng.normal(0, 1, (SIDE, SIDE)), rng.uniform(2, 5), mode="wrap")
        return _soft(noise / noise.std() - rng.uniform(0, 0.8), rng.uniform(2, 6))
    if kind == "cobwebbed":
        cx, cy = rng.uniform(10, 54, 2)
        turn = np.arctan2(y - cy, x - cx) + 0.15 * _clouds(rng, 4, SIDE)
        away, spokes = np.hypot(x - cx, y - cy), int(rng.integers(8, 16))
        spoke = np.abs(((turn * spokes / (2 * math.pi)) % 1) - 0.5) * away * 2 * math.pi / spokes
        sag = away * (1 - 0.12 * np.abs(np.sin(turn * spokes / 2)))
        ring = np.abs((sag / rng.uniform(4, 8)) % 1 - 0.5) * 5
        return np.asarray(np.maximum(_soft(0.7 - spoke, 3), 0.8 * _soft(0.6 - ring, 4)))
    if kind == "marbled":
        flow = 0.7 * _clouds(rng, 3, SIDE) + 0.35 * _clouds(rng, 8, SIDE) + 0.15 * _clouds(rng, 16, SIDE)
        return np.asarray(np.abs(np.sin(wave / 4 * u + 2 * math.pi * flow)) ** rng.uniform(0.4, 1.5))
    if kind == "grainy":
        noise = ndimage.gaussian_filter(rng.normal(0, 1, (SIDE, SIDE)), rng.uniform(0.3, 0.9))
        return np.asarray(np.clip(0.5 + 0.25 * noise / noise.std(), 0, 1))
    if kind == "bumpy":
        hills = ndimage.gaussian_filter(rng.normal(0, 1, (SIDE, SIDE)), rng.uniform(1.8, 4), mode="wrap")
        light = ndimage.sobel(hills, 0) + ndimage.sobel(hills, 1)
        return np.asarray(np.clip(0.5 + 0.3 * light / light.std(), 0, 1))
    if kind == "braided":
        lane = u / (1.6 * step)
        strand = np.sin(wave / 1.3 * v + math.pi * np.floor(2 * lane)) + 1.6 * np.cos(2 * math.pi * lane)
        return np.asarray(np.abs(np.sin(1.6 * strand)) * (0.55 + 0.45 * np.abs(np.sin(2 * math.pi * lane))))
    raise ValueError(f"no texture is called {kind}")


def _texture(rng: Generator, kind: str, colour: str | None) -> Image.Image:
    level = _level(rng, kind)
    if colour is None:
        first = _colour(rng) if rng.random() < 0.5 else _natural(rng)
        second = _other(rng, first, 90) if rng.random() < 0.5 else _shade(first, rng.uniform(0.25, 0.6))
    else:
        first = _colour(rng, colour)
        neutral = [name for name in ("black", "white", "gray") if name != colour]
        while math.dist(second := _colour(rng, neutral[rng.integers(len(neutral))]), first) < 60:
            pass
    if rng.random() < 0.5:
        level = 1 - level
    lit = 1 + rng.uniform(0, 0.5) * (_clouds(rng, 2, SIDE) - 0.5)
    return _image(_blend(first, second, level) * lit[..., None])


def _natural(rng: Generator) -> Colour:
    rgb = colorsys.hsv_to_rgb(rng.uniform(0.02, 0.6), rng.uniform(0, 0.45), rng.uniform(0.3, 0.95))
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def _shade(colour: Colour, share: float) -> Colour:
    return round(colour[0] * share), round(colour[1] * share), round(colour[2] * share)


# ---- digits and letters


# Pen strokes in a unit box, y downwards; a curve goes smoothly through its points.
STROKES: dict[int, tuple[tuple[tuple[Point, ...], ...], ...]] = {
    0: ((((0.5, 0), (0.1, 0.3), (0.1, 0.7), (0.5, 1), (0.9, 0.7), (0.9, 0.3), (0.5, 0)),),),
    1: ((((0.5, 0), (0.5, 0.5), (0.5, 1)),), (((0.25, 0.25), (0.55, 0), (0.55, 0.5), (0.55, 1)),)),
    2: ((((0.1, 0.2), (0.5, 0), (0.85, 0.25), (0.6, 0.6), (0.1, 1)), ((0.1, 1), (0.9, 0.97))),
        (((0.1, 0.2), (0.5, 0), (0.85, 0.3), (0.4, 0.85), (0.15, 0.9), (0.3, 0.75), (0.9, 1)),)),
    3: ((((0.1, 0.1), (0.55, 0), (0.8, 0.22), (0.4, 0.47)), ((0.4, 0.47), (0.9, 0.7), (0.55, 1), (0.1, 0.9))),),
    4: ((((0.3, 0), (0.1, 0.55)), ((0.1, 0.55), (0.9, 0.5)), ((0.75, 0.1), (0.7, 1))),
        (((0.65, 0), (0.1, 0.65)), ((0.1, 0.65), (0.95, 0.65)), ((0.65, 0), (0.65, 1)))),
    5: ((((0.85, 0), (0.2, 0.02)), ((0.2, 0.02), (0.15, 0.45)),
         ((0.15, 0.45), (0.6, 0.4), (0.88, 0.7), (0.5, 1), (0.1, 0.92))),),
    6: ((((0.75, 0), (0.3, 0.3), (0.12, 0.7), (0.5, 1), (0.85, 0.75), (0.55, 0.5), (0.15, 0.7)),),),
    7: ((((0.1, 0.05), (0.9, 0)), ((0.9, 0), (0.6, 0.5), (0.4, 1))),
        (((0.1, 0.05), (0.9, 0)), ((0.9, 0), (0.6, 0.5), (0.4, 1)), ((0.35, 0.5), (0.85, 0.47)))),
    8: ((((0.8, 0.15), (0.5, 0), (0.2, 0.2), (0.5, 0.47), (0.85, 0.75), (0.5, 1), (0.15, 0.78), (0.5, 0.47),
          (0.8, 0.15)),),),
    9: ((((0.85, 0.25), (0.5, 0), (0.15, 0.25), (0.45, 0.5), (0.85, 0.25)), ((0.85, 0.25), (0.8, 0.6), (0.65, 1))),),
}  # fmt: skip


@cache
def _fonts() -> tuple[str, ...]:
    """Text fonts that come with matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(str(p) for p in sorted(folder.glob("*.ttf")) if p.stem.startswith(("DejaVuS", "STIXGeneral")))


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _ink(rng: Generator, text: str) -> Image.Image:
    """A printed text as a mask, bent a little."""
    mask = Image.new("L", (FINE, FINE), 0)
    paths = _fonts()
    font = _font(paths[rng.integers(len(paths))], int(rng.integers(60, 112)))
    at = (FINE / 2 + rng.normal(0, 5), FINE / 2 + rng.normal(0, 5))
    ImageDraw.Draw(mask).text(at, text, font=font, fill=255, anchor="mm", stroke_width=int(rng.integers(0, 4)))
    return _bent(rng, mask)


def _pen(rng: Generator, digit: int) -> Image.Image:
    """A digit as a pen writes it, as a mask."""
    variants = STROKES[digit]
    width, height = rng.uniform(34, 68), rng.uniform(72, 100)
    left, top = (FINE - width) / 2 + rng.normal(0, 5), (FINE - height) / 2 + rng.normal(0, 4)
    lean = rng.normal(0.12, 0.2)
    mask, thick = Image.new("L", (FINE, FINE), 0), int(rng.integers(5, 17))
    pen = ImageDraw.Draw(mask)
    for stroke in variants[rng.integers(len(variants))]:
        points = np.array(stroke) + rng.normal(0, 0.035, (len(stroke), 2))
        at = np.linspace(0, len(points) - 1, 30)
        if len(points) > 2:  # a smooth curve: cubic through the points
            points = CubicSpline(np.arange(len(points)), points)(at)
        path = [(left + width * x + lean * height * (0.5 - y), top + height * y) for x, y in points]
        pen.line(path, fill=255, width=thick, joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)
    return _bent(rng, mask)


def _bent(rng: Generator, mask: Image.Image) -> Image.Image:
    """Sheared, turned and warped smoothly."""
    turn, shear, scale = rng.normal(0, 0.1), rng.normal(0, 0.12), rng.uniform(0.9, 1.1, 2)
    y, x = np.mgrid[0:FINE, 0:FINE].astype(float)
    u, v = (x - FINE / 2) * scale[0], (y - FINE / 2) * scale[1]
    bend = rng.uniform(0, 14)
    a = u * math.cos(turn) - v * math.sin(turn) + shear * v + FINE / 2 + bend * (_clouds(rng, 4) - 0.5)
    b = u * math.sin(turn) + v * math.cos(turn) + FINE / 2 + bend * (_clouds(rng, 4) - 0.5)
    return Image.fromarray(ndimage.map_coordinates(np.asarray(mask), [b, a], order=1))


def _write(rng: Generator, image: Image.Image, text: str, colour: Colour) -> None:
    image.paste(Image.new("RGB", image.size, colour), (0, 0), _ink(rng, text))


def _digit(rng: Generator, digit: int) -> Image.Image:
    mask = _pen(rng, digit) if rng.random() < 0.65 else _ink(rng, str(digit))
    style = rng.random()
    if style < 0.5:
        image, colour = Image.new("RGB", (FINE, FINE), (0, 0, 0)), (255, 255, 255)
    elif style < 0.7:
        image, colour = Image.new("RGB", (FINE, FINE), (245, 245, 240)), (25, 25, 30)
    else:
        image = _canvas(rng)
        colour = _contrast(rng, image)
    image.paste(Image.new("RGB", image.size, colour), (0, 0), mask)
    return image


# ---- road signs

WHITE, RED, BLUE, BLACK, YELLOW = (245, 245, 245), (200, 30, 40), (30, 80, 170), (25, 25, 25), (245, 195, 30)


def _arrow(pen: ImageDraw.ImageDraw, path: list[Point], colour: Colour = WHITE, width: int = 13) -> None:
    """A line with a head at its end."""
    pen.line(path, fill=colour, width=width, joint="curve")
    (x0, y0), (x, y) = path[-2], path[-1]
    length = math.hypot(x - x0, y - y0)
    dx, dy = (x - x0) / length, (y - y0) / length
    tip, side = 16.0, 17.0
    head = [(x + dx * tip, y + dy * tip), (x - dy * side, y + dx * side), (x + dy * side, y - dx * side)]
    pen.polygon(head, fill=colour)


def _face(name: str) -> Image.Image:
    """The sign itself, RGBA 128 x 128."""
    face = Image.new("RGBA", (FINE, FINE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(face)
    bold = next(path for path in _fonts() if path.endswith("DejaVuSans-Bold.ttf"))
    whole = (4, 4, 124, 124)
    if name.startswith("speed limit"):
        number = name.split()[2]
        pen.ellipse(whole, fill=WHITE, outline=RED, width=15)
        size = 58 if len(number) < 3 else 42
        pen.text((64, 64), number, font=_font(bold, size), fill=BLACK, anchor="mm")
    elif name in ARROWS:
        pen.ellipse(whole, fill=BLUE, outline=WHITE, width=3)
        paths: dict[str, list[list[Point]]] = {
            "ahead only": [[(64, 100), (64, 42)]],
            "turn left ahead": [[(78, 100), (78, 58), (46, 58)]],
            "turn right ahead": [[(50, 100), (50, 58), (82, 58)]],
            "keep left": [[(88, 40), (46, 82)]],
            "keep right": [[(40, 40), (82, 82)]],
            "go straight or right": [[(50, 100), (50, 42)], [(50, 75), (84, 75)]],
            "go straight or left": [[(78, 100), (78, 42)], [(78, 75), (44, 75)]],
            "roundabout mandatory": [],
        }
        for path in paths[name]:
            _arrow(pen, path)
        if name == "roundabout mandatory":
            for third in range(3):
                start = third * 2.094 + 0.5
                arc = [(64 + 33 * math.cos(start + a), 64 + 33 * math.sin(start + a)) for a in np.linspace(0, 1.3, 8)]
                _arrow(pen, arc, width=9)
    elif name == "stop":
        turns = np.arange(8) * math.pi / 4 + math.pi / 8
        pen.polygon([(64 + 61 * math.cos(t), 64 + 61 * math.sin(t)) for t in turns], fill=RED, outline=WHITE, width=4)
        pen.text((64, 64), "STOP", font=_font(bold, 36), fill=WHITE, anchor="mm")
    elif name == "yield":
        pen.polygon([(4, 14), (124, 14), (64, 120)], fill=WHITE, outline=RED, width=14)
    elif name == "no entry":
        pen.ellipse(whole, fill=RED)
        pen.rectangle((24, 53, 104, 75), fill=WHITE)
    elif name == "priority road":
        pen.polygon([(64, 2), (126, 64), (64, 126), (2, 64)], fill=WHITE)
        pen.polygon([(64, 24), (104, 64), (64, 104), (24, 64)], fill=YELLOW)
    elif name in ("general danger", "traffic lights ahead"):
        pen.polygon([(64, 6), (124, 114), (4, 114)], fill=WHITE, outline=RED, width=14)
        if name == "general danger":
            pen.rectangle((58, 48, 70, 82), fill=BLACK)
            pen.ellipse((57, 88, 71, 102), fill=BLACK)
        else:
            pen.rectangle((53, 46, 75, 102), fill=BLACK)
            for y, light in ((56, (220, 40, 40)), (74, YELLOW), (92, (40, 170, 70))):
                pen.ellipse((57, y - 7, 71, y + 7), fill=light)
    elif name == "no vehicles allowed":
        pen.ellipse(whole, fill=WHITE, outline=RED, width=15)
    elif name == "end of all restrictions":
        pen.ellipse(whole, fill=WHITE, outline=BLACK, width=3)
        for shift in (-16, -8, 0, 8, 16):
            pen.line([(24 + shift, 100 + shift / 2), (96 + shift, 24 + shift / 2)], fill=BLACK, width=4)
    elif name == "no overtaking":
        pen.ellipse(whole, fill=WHITE, outline=RED, width=15)
        for left, colour in ((30, RED), (68, BLACK)):
            pen.rounded_rectangle((left, 56, left + 30, 80), 6, fill=colour)
            pen.rectangle((left + 6, 46, left + 24, 58), fill=colour)
    else:
        raise ValueError(f"no sign is called {name}")
    return face


def _sign(rng: Generator, name: str) -> Image.Image:
    image = _canvas(rng)
    size = int(rng.integers(72, 126))
    face = _face(name).resize((size, int(size * rng.uniform(0.9, 1.1))), Image.Resampling.BILINEAR)
    face = face.rotate(rng.normal(0, 5), Image.Resampling.BILINEAR)
    free = (max(0, FINE - face.width), max(0, FINE - face.height))
    at = (int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1)))
    image.paste(face.convert("RGB"), at, face.getchannel("A"))
    return _image(np.asarray(image, float) * rng.uniform(0.25, 1.1))


# ---- the whole


def _finished(rng: Generator, image: Image.Image) -> NDArray[np.uint8]:
    """At its size, sometimes as blurred as a smaller picture enlarged, with a camera's light and noise."""
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    if rng.random() < 0.3:
        small = image.resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX)
        image = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    elif rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1)))
    pixels = np.asarray(image, float)
    pixels = pixels * rng.uniform(0.85, 1.1) + rng.uniform(-8, 8) + rng.normal(0, rng.uniform(0, 6), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a PNG: one row a family")
    options = parser.parse_args()
    rows = []
    for family in FAMILIES:
        rng = np.random.default_rng(7)
        members = [one for one in CLASSES if one.family == family]
        shown = [members[k] for k in np.linspace(0, len(members) - 1, 16).astype(int)]
        rows.append(np.concatenate([draw(one, rng) for one in shown], axis=1))
    Image.fromarray(np.concatenate(rows)).resize((16 * 96, len(rows) * 96), Image.Resampling.NEAREST).save(options.out)


if __name__ == "__main__":
    main()
