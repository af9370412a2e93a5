"""Draws single pictures of the generated worlds: shapes, textures, metal surfaces, land from above.

Each function takes a generator and returns one picture u8[SIDE, SIDE, 3]; what it shows varies in place, size, colour
and light, so that a class cannot be told from one pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 64
FINE = 2 * SIDE  # drawn twice as large, for smooth edges

Pixels = NDArray[np.uint8]
Field = NDArray[np.float64]
Colour = tuple[int, int, int]
Point = tuple[float, float]


def shape(rng: Generator, kind: str) -> Pixels:
    """One shape of any colour on a softly shaded background of another, with smaller distractors."""
    ground = _colour(rng)
    image = _picture(_blend(ground, _far_from(rng, ground, 60), 0.7 * _clouds(rng, 3)))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 5))):
        x, y = rng.uniform(0, FINE, 2)
        pen.line([(x, y), (x + rng.normal(0, 25), y + rng.normal(0, 25))], fill=_colour(rng), width=2)
    size, turn = rng.uniform(28, 48), rng.uniform(-0.5, 0.5)
    centre = rng.uniform(size, FINE - size, 2)
    fill = _far_from(rng, ground, 130)
    behind = image.copy()
    pen.polygon([_turned(point, size, turn, centre) for point in OUTLINES[kind]], fill=fill)
    if kind in HOLES:
        scale, shift = HOLES[kind]
        inner = [(scale * x + shift, scale * y) for x, y in OUTLINES["circle"]]
        hole = Image.new("L", (FINE, FINE), 0)
        ImageDraw.Draw(hole).polygon([_turned(point, size, turn, centre) for point in inner], fill=255)
        image.paste(behind, (0, 0), hole)
    return _finished(rng, image, 8)


def texture(rng: Generator, kind: str) -> Pixels:
    """A pattern of two colours over the whole picture, turned and bent a little."""
    y, x = _grid()
    turn = rng.uniform(-0.5, 0.5)
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    x, y = x + rng.uniform(0, 99), y + rng.uniform(0, 99)
    bend = 6 * (_clouds(rng, 3) - 0.5)
    u, v = (x + bend) / (period := rng.uniform(12, 30)), (y + bend) / period
    if kind == "striped":
        level = _soft(np.sin(2 * math.pi * u))
    elif kind == "chequered":
        level = _soft(np.sin(math.pi * u) * np.sin(math.pi * v) * 2)
    elif kind == "dotted":
        level = _soft(np.cos(2 * math.pi * u) + np.cos(2 * math.pi * v) - rng.uniform(0.7, 1.1))
    elif kind == "wavy":
        level = _soft(np.sin(2 * math.pi * (v + 0.35 * np.sin(math.pi * u))))
    elif kind == "zigzag":
        level = _soft(np.sin(2 * math.pi * (v + np.abs(u % 1 - 0.5) * 1.4)))
    elif kind == "brick":
        row = np.floor(v)
        along = (u / 2 + 0.5 * (row % 2)) % 1
        level = ((v % 1 > 0.14) & (along > 0.07)).astype(float)
    elif kind == "grainy":
        level = _smooth(rng.normal(0.5, 1.2, (FINE, FINE)), rng.uniform(1.0, 2.0))
    elif kind == "marbled":
        level = _soft(3 * np.sin(2 * math.pi * (u / 2 + 2.2 * _clouds(rng, 4))), 0.8)
    else:
        raise ValueError(f"no texture is called {kind}")
    first = _colour(rng)
    return _finished(rng, _picture(_blend(first, _far_from(rng, first, 90), level)), 10)


def metal(rng: Generator, kind: str) -> Pixels:
    """A brushed metal surface under uneven light, without a defect or with one."""
    brushed = _smooth(rng.normal(0, 1, (FINE, FINE)), 0.5, along=rng.uniform(8, 20))
    light = rng.uniform(115, 185) + 40 * (_clouds(rng, 2) - 0.5) + rng.uniform(4, 10) * brushed
    tint = 1 + rng.uniform(-0.05, 0.05, 3)
    image = _picture(light[..., None] * tint)
    pen = ImageDraw.Draw(image)
    centre = rng.uniform(34, FINE - 34, 2)
    size = rng.uniform(9, 22)
    if kind == "scratch":
        for _ in range(int(rng.integers(1, 4))):
            angle, length = rng.uniform(0, math.pi), rng.uniform(35, 90)
            reach = length / 2 * np.array([math.cos(angle), math.sin(angle)])
            bright = int(rng.uniform(215, 250))
            start, end = centre - reach + rng.normal(0, 6, 2), centre + reach
            pen.line([tuple(start), tuple(end)], fill=(bright,) * 3, width=int(rng.integers(1, 4)))
    elif kind == "hole":
        pen.polygon(_blob(rng, centre, size, 0.05), fill=(int(rng.uniform(8, 35)),) * 3, outline=(225,) * 3)
    elif kind == "dent":
        y, x = _grid()
        away = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (1.2 * size) ** 2
        angle = rng.uniform(0, 2 * math.pi)
        slope = ((x - centre[0]) * math.cos(angle) + (y - centre[1]) * math.sin(angle)) / size
        image = _picture(np.asarray(image) + (rng.uniform(70, 110) * slope * np.exp(-away))[..., None])
    elif kind == "stain":
        spot = Image.new("L", (FINE, FINE), 0)
        ImageDraw.Draw(spot).polygon(_blob(rng, centre, 1.4 * size, 0.3), fill=int(rng.uniform(120, 190)))
        colour = (int(rng.uniform(95, 150)), int(rng.uniform(55, 85)), int(rng.uniform(15, 50)))
        image.paste(Image.new("RGB", (FINE, FINE), colour), (0, 0), spot.filter(ImageFilter.GaussianBlur(2.5)))
    elif kind == "crack":
        heading, point = rng.uniform(0, 2 * math.pi), centre - rng.normal(0, 12, 2)
        path = [tuple(point)]
        for _ in range(int(rng.integers(9, 16))):
            heading += rng.normal(0, 0.7)
            point = point + rng.uniform(4, 9) * np.array([math.cos(heading), math.sin(heading)])
            path.append(tuple(point))
        pen.line(path, fill=(int(rng.uniform(15, 50)),) * 3, width=int(rng.integers(2, 4)))
    elif kind != "clean surface":
        raise ValueError(f"no defect is called {kind}")
    return _finished(rng, image, 5)


def land(rng: Generator, kind: str) -> Pixels:
    """A patch of land from above."""
    y, x = _grid()
    far = _clouds(rng, 4)
    green, sand, blue = _near(rng, (88, 122, 62)), _near(rng, (205, 180, 132)), _near(rng, (46, 92, 128))
    meadow = _blend(green, _near(rng, (128, 142, 84)), far)
    curve = x * rng.uniform(-0.6, 0.6) + rng.uniform(12, 30) * np.sin(x / rng.uniform(16, 30) + rng.uniform(0, 6))
    aside = y - FINE / 2 - curve + (rng.uniform(-0.3, 0.3) * FINE / 2)
    if kind == "forest":
        crowns = _soft(3 * _smooth(rng.normal(0, 4, (FINE, FINE)), 2.2))
        pixels = _blend(_near(rng, (26, 58, 32)), _near(rng, (72, 106, 56)), crowns)
    elif kind == "farmland":
        pixels = _mosaic(rng, rng.uniform(28, 46), FIELDS)
    elif kind == "city":
        pixels = _mosaic(rng, rng.uniform(11, 17), ROOFS, 3.5)
    elif kind == "river":
        pixels = _blend(meadow, blue, _soft(rng.uniform(6, 13) - np.abs(aside), 0.6))
    elif kind == "beach":
        shore = aside + 14 * (far - 0.5)
        pixels = _blend(sand, blue, _soft(shore, 0.3))
        pixels = _blend(pixels, (236, 240, 238), np.exp(-((shore / 4) ** 2)) * 0.8)
    elif kind == "lake":
        away = np.hypot(x - rng.uniform(44, 84), (y - rng.uniform(44, 84)) * rng.uniform(0.8, 1.4))
        pixels = _blend(meadow, blue, _soft(rng.uniform(26, 40) - away + 26 * (far - 0.5), 0.6))
    elif kind == "desert":
        dunes = np.sin((y + 18 * far + x * rng.uniform(-0.5, 0.5)) / rng.uniform(3.5, 7)) * 0.5 + 0.5
        pixels = _blend(sand, _near(rng, (168, 132, 88)), 0.7 * dunes)
    elif kind == "highway":
        turn = rng.uniform(-0.7, 0.7)
        across = (x - FINE / 2 + rng.uniform(-25, 25)) * math.cos(turn) + (y - FINE / 2) * math.sin(turn)
        along = (y - FINE / 2) * math.cos(turn) - (x - FINE / 2) * math.sin(turn)
        pixels = _blend(meadow, _near(rng, (104, 104, 106)), _soft(rng.uniform(9, 15) - np.abs(across), 1.5))
        dashes = (np.abs(across) < 1.2) & (along % 14 < 8)
        pixels = _blend(pixels, (238, 236, 220), dashes.astype(float))
    else:
        raise ValueError(f"no land is called {kind}")
    return _finished(rng, _picture(pixels), 9)


def _ring(count: int, radii: Sequence[float]) -> list[Point]:
    steps = [(radii[i % len(radii)], 2 * math.pi * i / count - math.pi / 2) for i in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in steps]


def _heart(angle: float) -> Point:
    x = 16 * math.sin(angle) ** 3
    y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return x / 16, -y / 16


# Corners within the unit circle, y downwards.
OUTLINES: dict[str, list[Point]] = {
    "circle": _ring(48, (1.0,)),
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": _ring(3, (1.0,)),
    "star": _ring(10, (1.0, 0.42)),
    "cross": [
        *((-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3)),
        *((0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)),
    ],
    "heart": [_heart(2 * math.pi * i / 48) for i in range(48)],
    "ring": _ring(48, (1.0,)),
    "crescent": _ring(48, (1.0,)),
    "arrow": [(0, -1), (0.75, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.1), (-0.75, -0.1)],
}
FIELDS: tuple[Colour, ...] = ((150, 160, 80), (196, 178, 104), (104, 134, 66), (134, 104, 70))
ROOFS: tuple[Colour, ...] = ((150, 146, 142), (186, 178, 170), (168, 112, 90), (112, 112, 116))
# A round hole cut out: (its radius, its shift).
HOLES: dict[str, tuple[float, float]] = {"ring": (0.58, 0.0), "crescent": (0.85, 0.45)}


def _turned(point: Point, size: float, turn: float, centre: NDArray[np.float64]) -> Point:
    x, y = point
    turned = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    return float(centre[0] + size * turned[0]), float(centre[1] + size * turned[1])


def _blob(rng: Generator, centre: NDArray[np.float64], size: float, rough: float) -> list[Point]:
    """Corners of a round outline with bumps."""
    bumps = rng.normal(0, rough, (2, 4))
    corners = []
    for angle in np.linspace(0, 2 * math.pi, 40, endpoint=False):
        waves = np.arange(2, 6) * angle
        bump = (bumps[0] @ np.sin(waves) + bumps[1] @ np.cos(waves)) / 1.5
        radius = size * max(0.3, 1 + bump)
        corners.append((float(centre[0] + radius * math.cos(angle)), float(centre[1] + radius * math.sin(angle))))
    return corners


def _mosaic(rng: Generator, side: float, colours: Sequence[Colour], gap: float = 1.2) -> Field:
    """Blocks of many colours in a turned grid, with paths between them."""
    y, x = _grid()
    turn = rng.uniform(0, math.pi / 2)
    u = (x * math.cos(turn) - y * math.sin(turn) + 300) / side
    v = (x * math.sin(turn) + y * math.cos(turn) + 300) / (side * rng.uniform(0.6, 1.0))
    palette = np.array([_near(rng, colours[int(rng.integers(len(colours)))]) for _ in range(97)], float)
    blocks = palette[(np.floor(u) * 31 + np.floor(v) * 17).astype(int) % 97]
    path = (u % 1 * side < gap) | (v % 1 * side < gap)
    return _blend(blocks, _near(rng, (120, 112, 100)), path.astype(float))


def _grid() -> tuple[Field, Field]:
    y, x = np.mgrid[0:FINE, 0:FINE].astype(float)
    return y, x


def _clouds(rng: Generator, cells: int) -> Field:
    """Smooth noise in 0..1, about `cells` bumps across."""
    coarse = Image.fromarray(rng.random((cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((FINE, FINE), Image.Resampling.BICUBIC), float).clip(0, 1)


def _smooth(values: Field, radius: float, along: float = 0.0) -> Field:
    """A Gaussian blur, much wider to the side where `along` is given; keeps mean, and about the spread."""
    spread = values.std()
    for axis, width in ((0, radius), (1, along or radius)):
        reach = math.ceil(3 * width)
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
        spectrum = np.fft.rfft(weights / weights.sum(), FINE)
        shape = (-1, 1) if axis == 0 else (1, -1)
        values = np.fft.irfft(np.fft.rfft(values, axis=axis) * spectrum.reshape(shape), FINE, axis=axis)
    mean = float(values.mean())
    return np.asarray(mean + (values - mean) * (spread / max(float(values.std()), 1e-9)) * 0.5)


def _soft(values: Field, sharp: float = 3.0) -> Field:
    """A smooth step from 0 to 1 at zero."""
    return np.asarray(1 / (1 + np.exp(-np.clip(sharp * values, -30, 30))))


def _blend(first: ArrayLike, second: ArrayLike, level: Field) -> Field:
    share: Field = np.clip(level, 0, 1)[..., None]
    return np.asarray((1 - share) * np.asarray(first) + share * np.asarray(second))


def _colour(rng: Generator) -> Colour:
    red, green, blue = (int(value) for value in rng.integers(20, 236, 3))
    return red, green, blue


def _near(rng: Generator, colour: Colour) -> Colour:
    red, green, blue = (int(np.clip(value + rng.normal(0, 11), 0, 255)) for value in colour)
    return red, green, blue


def _far_from(rng: Generator, colour: Colour, least: float) -> Colour:
    while True:
        other = _colour(rng)
        if math.dist(colour, other) >= least:
            return other


def _picture(pixels: Field) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _finished(rng: Generator, image: Image.Image, noise: float) -> Pixels:
    """At its size, under changing light and with a camera's noise."""
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), float)
    lit = small * rng.uniform(0.8, 1.15) + rng.uniform(-12, 12) + rng.normal(0, noise, small.shape)
    return np.clip(lit, 0, 255).astype(np.uint8)
