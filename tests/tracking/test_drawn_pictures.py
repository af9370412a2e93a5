"""The pictures are drawn for any number of tasks, always with the same bytes, and show what they are given."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from condu_ray.tracking import pictures
from condu_ray.tracking.matrix import AccuracyMatrix

ANSWER: dict[str, Any] = {
    "image": "river.png",
    "label": "river",
    "task": "scenes",
    "probability": 0.83,
    "labels": [
        {"label": "river", "task": "scenes", "probability": 0.83},
        {"label": "7", "task": None, "probability": 0.17},
    ],
    "votes": [
        {"task": "scenes", "similarity": 0.71, "weight": 0.8},
        {"task": None, "similarity": None, "weight": 0.2},
    ],
    "label_space": "union",
    "version": 3,
}


def matrix(n: int) -> AccuracyMatrix:
    values = [[90.0 - r + c if c <= r else 20.0 + c / n for c in range(n)] for r in range(n)]
    return AccuracyMatrix([f"task {index}" for index in range(n)], values)


def histories(n: int) -> dict[str, list[tuple[int, float | None]]]:
    return {f"task {task}": [(version, 90.0 - version / n) for version in range(task + 1, n + 1)] for task in range(n)}


def trials(n: int) -> list[tuple[dict[str, Any], float]]:
    """Numbers by size and by magnitude, words, yes and no, and what may be unset."""
    return [
        (
            {
                "vote.k": 1 + place % 4,
                "train.lr": 10.0 ** -(1 + place % 5),
                "vote.union": ("own", "joint")[place % 2],
                "vote.adaptive": place % 3 == 0,
                "vote.base_weight": (None, 0.2)[place % 2],
            },
            float(place),
        )
        for place in range(n)
    ]


DRAW: dict[str, Callable[[Path], None]] = {
    "matrix of 1": lambda path: pictures.draw_matrix(matrix(1), path),
    "matrix of 11": lambda path: pictures.draw_matrix(matrix(11), path),
    "matrix of 100": lambda path: pictures.draw_matrix(matrix(100), path),
    "matrix with holes": lambda path: pictures.draw_matrix(AccuracyMatrix(["a", "b"], [[90, None], [80, 70]]), path),
    "sweep of 1": lambda path: pictures.draw_parallel([({"vote.k": 1}, 50.0)], "Last %", path),
    "sweep of 60": lambda path: pictures.draw_parallel(trials(60), "Last %", path),
    "importance": lambda path: pictures.draw_importance({"vote.k": 0.7, "vote.gap": 0.3}, "Last %", path),
    "importance of nothing": lambda path: pictures.draw_importance({}, "Last %", path),
    "history of none": lambda path: pictures.draw_history({}, path),
    "history of 5": lambda path: pictures.draw_history(histories(5), path),
    "history of 100": lambda path: pictures.draw_history(histories(100), path),
    "history of merged weights": lambda path: pictures.draw_history({f"task {n}": [] for n in range(9)}, path),
    "history with holes": lambda path: pictures.draw_history({"a": [(1, 3.0), (2, None)], "b": []}, path),
    "votes": lambda path: pictures.draw_votes(ANSWER, Image.new("L", (40, 30), 200), path),
    "comparison": lambda path: pictures.draw_comparison({"condu": matrix(5), "sequential": matrix(1)}, path),
    "comparison of 11": lambda path: pictures.draw_comparison({f"method {i}": matrix(3) for i in range(11)}, path),
}


def words(path: Path) -> str:
    """The texts of an SVG picture, one a line, as the drawing library notes them beside its glyphs."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


@pytest.mark.parametrize("name", DRAW)
def test_drawn_with_the_same_bytes_each_time(name: str, tmp_path: Path) -> None:
    DRAW[name](tmp_path / "one.png")
    DRAW[name](tmp_path / "deeper" / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "deeper" / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        assert 300 <= picture.width <= 2400
        assert 200 <= picture.height <= 2400
        extrema = picture.convert("L").getextrema()
    assert extrema[0] < extrema[1]


def test_svg_too_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        pictures.draw_comparison({"condu": matrix(5)}, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_the_matrix_shows_its_numbers_names_and_means(tmp_path: Path) -> None:
    drawn = AccuracyMatrix(["digits", "cost in $ or $"], [[91, None], [83, 72]])
    pictures.draw_matrix(drawn, tmp_path / "matrix.svg")
    lines = words(tmp_path / "matrix.svg").splitlines()
    assert {"91", "83", "72", "–", "digits"} <= set(lines)
    assert any("cost in" in line for line in lines)
    assert "Transfer –   Average –   Last 77.5" in lines


def test_a_hundred_names_are_thinned(tmp_path: Path) -> None:
    pictures.draw_matrix(matrix(100), tmp_path / "matrix.svg")
    named = [line for line in words(tmp_path / "matrix.svg").splitlines() if line.startswith("task ")]
    assert 20 <= len(named) <= 80


def test_the_votes_name_the_base_model(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "river.png")
    pictures.draw_votes(ANSWER, tmp_path / "river.png", tmp_path / "votes.svg")
    lines = words(tmp_path / "votes.svg").splitlines()
    assert {"river (scenes)", "7", "base model", "scenes"} <= set(lines)
    assert "83 %, version 3" in lines


def test_the_votes_show_the_picture_as_the_model_saw_it(tmp_path: Path) -> None:
    """Turned as its camera says, and 16 bits cut to 8."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste("blue", (20, 0, 40, 20))
    lying.save(tmp_path / "turned.png", exif=exif)
    deep = np.full((20, 40), 128 * 257, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name, seen in (
        ("turned", lying.transpose(Image.Transpose.ROTATE_270)),
        ("deep", Image.new("RGB", (40, 20), (128, 128, 128))),
    ):
        pictures.draw_votes(ANSWER, tmp_path / f"{name}.png", tmp_path / f"{name} drawn.png")
        pictures.draw_votes(ANSWER, seen, tmp_path / f"{name} seen.png")
        assert (tmp_path / f"{name} drawn.png").read_bytes() == (tmp_path / f"{name} seen.png").read_bytes(), name


def test_a_name_in_a_script_that_the_font_lacks(tmp_path: Path) -> None:
    pictures.draw_matrix(AccuracyMatrix(["数字"], [[90]]), tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").stat().st_size > 1000
