"""Stratified splits and samples."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condu_ray.data import Picture, Split, sample
from condu_ray.data.split import choose_test
from condu_ray.errors import DataError

NAMES = ["a", "b", "c", "d", "e"]


def digests(count):
    return [hashlib.blake2b(str(number).encode(), digest_size=32).digest() for number in range(count)]


def split_of(labels):
    return Split(tuple(Picture(str(number)) for number in range(len(labels))), np.array(labels))


sizes = st.lists(st.integers(2, 30), min_size=1, max_size=5)


@given(sizes, st.floats(0.01, 0.99), st.integers(0, 3))
@settings(deadline=None, derandomize=True)
def test_each_class_keeps_its_share_and_one_on_each_side(sizes, share, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    test = choose_test(labels, digests(len(labels)), NAMES[: len(sizes)], share, seed)
    for label, size in enumerate(sizes):
        assert test[labels == label].sum() == min(max(1, round(size * share)), size - 1)


@given(sizes, st.randoms(use_true_random=False))
@settings(deadline=None, derandomize=True)
def test_the_order_of_the_pictures_does_not_matter(sizes, random):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    content = digests(len(labels))
    test = choose_test(labels, content, NAMES[: len(sizes)], 0.3, 5)
    order = list(range(len(labels)))
    random.shuffle(order)
    turned = choose_test(labels[order], [content[i] for i in order], NAMES[: len(sizes)], 0.3, 5)
    assert turned.tolist() == test[order].tolist()


def test_another_seed_chooses_others():
    labels = np.zeros(50, np.int64)
    chosen = [choose_test(labels, digests(50), ["a"], 0.2, seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_equal_pictures_stay_on_one_side():
    content = digests(5) * 4
    test = choose_test(np.zeros(20, np.int64), content, ["a"], 0.25, 0)
    sides = {digest: {bool(test[i]) for i in range(20) if content[i] == digest} for digest in content}
    assert all(len(side) == 1 for side in sides.values()) and 4 <= test.sum() <= 8


@pytest.mark.parametrize("seed", range(8))
def test_many_equal_pictures_take_no_more_than_the_share(seed):
    content = digests(1) * 90 + digests(11)[1:]
    test = choose_test(np.zeros(100, np.int64), content, ["a"], 0.2, seed)
    assert not test[:90].any() and 0 < test.sum() <= 6  # of ten others
    content = digests(1) * 60 + digests(41)[1:]
    assert choose_test(np.zeros(100, np.int64), content, ["a"], 0.2, seed).sum() == 20


def test_where_all_pictures_have_many_equals_the_fewest_are_set_aside():
    content = digests(1) * 12 + digests(2)[1:] * 8
    assert choose_test(np.zeros(20, np.int64), content, ["a"], 0.2, 0).tolist() == [False] * 12 + [True] * 8


@given(sizes, st.integers(1, 160), st.integers(0, 3))
@settings(deadline=None, derandomize=True)
def test_a_sample_is_stratified(sizes, count, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    split = split_of(labels)
    got = sample(split, count, seed)
    assert len(got) == min(count, len(split))
    assert got == sample(split, count, seed)
    positions = [int(picture.path) for picture in got.pictures]
    assert positions == sorted(set(positions)) and got.labels.tolist() == labels[positions].tolist()
    if count < len(split):
        taken = np.bincount(got.labels, minlength=len(sizes))
        exact = np.array(sizes) * count / len(split)
        assert (taken <= sizes).all()
        if count >= len(sizes):
            assert taken.min() >= 1
        if exact.min() >= 1:
            assert (np.abs(taken - exact) < 1).all()


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(DataError, match="sample of 0 pictures"):
        sample(split_of([0, 1]), 0, 0)
