"""The generated world of pretraining: drawn the same every time; what is held out is made of words that are taught."""

from __future__ import annotations

import captioned_world as world
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)  # the first text waits for its fonts
@given(st.sampled_from(world.CLASSES), SEEDS)
def test_a_picture_depends_on_its_class_and_seed_alone(what: world.Class, seed: int) -> None:
    first = world.draw(what, np.random.default_rng(seed))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, world.draw(what, np.random.default_rng(seed)))
    assert not np.array_equal(first, world.draw(what, np.random.default_rng(seed + 1)))


def test_no_two_classes_of_a_family_have_one_caption() -> None:
    captions = [(one.family, one.caption) for one in world.CLASSES]
    assert len(set(captions)) == len(captions)


def test_every_word_of_a_held_out_caption_is_taught_by_others_of_its_family() -> None:
    taught = {(one.family, word) for one in world.CLASSES if not one.held_out for word in one.words}
    held = [one for one in world.CLASSES if one.held_out]
    assert {(one.family, word) for one in held for word in one.words} <= taught
    combined = [one for one in world.CLASSES if len(one.words) > 1]
    assert 0.1 < len(held) / len(combined) < 0.3


@pytest.mark.parametrize("name", world.COLOURS)
def test_what_is_called_a_colour_has_it(name: str) -> None:
    drawn = [world._colour(np.random.default_rng(seed), name) for seed in range(50)]
    rules = {
        "red": lambda r, g, b: r > 2 * max(g, b),
        "orange": lambda r, g, b: r > g > 1.3 * b,
        "yellow": lambda r, g, b: min(r, g) > 1.4 * b,
        "green": lambda r, g, b: g > max(r, b),
        "blue": lambda r, g, b: b > max(r, g),
        "purple": lambda r, g, b: b >= r > g,
        "pink": lambda r, g, b: r > b > g > 80,
        "brown": lambda r, g, b: 130 > r > g > b,
        "black": lambda r, g, b: max(r, g, b) < 40,
        "white": lambda r, g, b: min(r, g, b) > 220,
        "gray": lambda r, g, b: max(r, g, b) - min(r, g, b) < 20,
    }
    assert all(rules[name](*colour) for colour in drawn)
