from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.errors import DataError
from condu_ray.voting.prototypes import FeatureSums, Prototypes, held_out_indices, make_prototypes


def units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def test_a_prototype_is_the_unit_mean_of_image_mean_and_text_mean() -> None:
    sums = FeatureSums.zero(2, 2).add(np.array([[1, 0], [0.6, 0.8]], np.float32), np.array([0, 0]))
    made = make_prototypes(sums, np.array([[0, 0.6], [0.3, 0.4]], np.float32), np.zeros((0, 2), np.float32))
    # class 0: image mean (0.8, 0.4), with the text mean (0.4, 0.5); class 1 has no picture, so its text mean alone
    np.testing.assert_allclose(made.unit, [[0.4 / 0.41**0.5, 0.5 / 0.41**0.5], [0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(made.image_mean, [[0.8, 0.4], [0, 0]], atol=1e-7)
    assert made.counts.tolist() == [2, 0]


def test_adding_leaves_the_sums_before_as_they_were() -> None:
    before = FeatureSums.zero(1, 2)
    before.add(np.ones((3, 2), np.float32), np.zeros(3, np.int64))
    assert before.counts.tolist() == [0] and not before.sums.any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 40))
def test_parts_add_up_to_the_same_prototypes_in_any_order(seed: int, parts: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels = units(rng, count, 8), rng.integers(0, 3, count)
    worker = rng.integers(0, parts, count)
    whole = FeatureSums.zero(3, 8).add(features, labels)
    merged = FeatureSums.zero(3, 8)
    for part in rng.permutation(parts):
        merged = merged.add(features[worker == part], labels[worker == part])
    assert merged.counts.tolist() == whole.counts.tolist()
    np.testing.assert_allclose(merged.sums, whole.sums, atol=1e-13)


def test_prototypes_survive_the_store() -> None:
    rng = np.random.default_rng(0)
    sums = FeatureSums.zero(3, 4).add(units(rng, 9, 4), rng.integers(0, 3, 9))
    made = make_prototypes(sums, units(rng, 3, 4), units(rng, 5, 4))
    again = Prototypes.from_arrays(made.arrays())
    assert sorted(made.arrays()) == ["counts", "held_out", "image_mean", "text_mean", "unit"]
    for name, values in made.arrays().items():
        np.testing.assert_array_equal(values, again.arrays()[name])
        assert values.dtype == (np.int64 if name == "counts" else np.float32)


def test_sums_and_texts_of_other_classes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3, 4\).*\(2, 4\).*same class list"):
        make_prototypes(FeatureSums.zero(3, 4), np.zeros((2, 4), np.float32), np.zeros((0, 4), np.float32))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 2**31), st.integers(1, 64))
def test_held_out_pictures_come_in_turns_from_large_enough_classes(sizes: list[int], seed: int, count: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    indices = held_out_indices(labels, seed, count)
    np.testing.assert_array_equal(indices, held_out_indices(labels, seed, count))
    assert indices.dtype == np.int64 and (np.diff(indices) > 0).all()
    assert len(indices) == min(count, sum(size // 5 for size in sizes))
    taken = np.bincount(labels[indices], minlength=len(sizes))
    for size, own in zip(sizes, taken, strict=True):
        assert own <= size // 5
        assert own >= min(size // 5, taken.max() - 1), "a class was passed over in its turn"


def test_another_seed_holds_out_other_pictures() -> None:
    labels = np.repeat(np.arange(4), 100)
    assert held_out_indices(labels, 0).tolist() != held_out_indices(labels, 1).tolist()
