"""Class statistics: what is fitted and joined, what shrinkage keeps, and what draws depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.errors import DataError
from condu_ray.memory.gaussians import RIDGE, Gaussians, Sampler

WIDTH = 6
KINDS = pytest.mark.parametrize("covariance", ["full", "diagonal"])


def drawn(seed: int, count: int = 60, classes: int = 3) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    turn = random.standard_normal((WIDTH, WIDTH))
    return random.standard_normal((count, WIDTH)) @ turn + 3, random.integers(0, classes, count)


def same(one: Gaussians, other: Gaussians) -> None:
    assert np.array_equal(one.counts, other.counts)
    np.testing.assert_allclose(one.means, other.means, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(one.scatter, other.scatter, atol=1e-9, rtol=1e-12)


@KINDS
def test_they_are_the_sample_statistics_of_each_class(covariance: Any) -> None:
    features, labels = drawn(0)
    found = Gaussians.fit(features, labels, 4, covariance)
    assert found.counts.tolist() == [*np.bincount(labels), 0]
    for label in range(3):
        own = features[labels == label]
        np.testing.assert_allclose(found.means[label], own.mean(axis=0))
        expected = np.cov(own.T) + RIDGE * np.eye(WIDTH)
        np.testing.assert_allclose(found.covariance(label), np.diag(expected) if found.diagonal else expected)
    assert np.isfinite(found.covariance(3)).all()


@KINDS
@pytest.mark.parametrize(("shrinkage", "factor"), [("none", 1.0), ("convex", 1.0), ("rapf", 2.0)])
def test_shrinkage_keeps_the_trace_or_doubles_it(covariance: Any, shrinkage: Any, factor: float) -> None:
    features, labels = drawn(1)
    found = Gaussians.fit(features, labels, 3, covariance)

    def trace(values: Any) -> float:
        return float(values.sum() if values.ndim == 1 else np.trace(values))

    assert trace(found.covariance(0, shrinkage)) == pytest.approx(factor * trace(found.covariance(0)))


@given(seed=st.integers(0, 10_000), pictures=st.integers(1, 5))
def test_a_shrunk_covariance_of_few_pictures_is_positive_definite(seed: int, pictures: int) -> None:
    features, _ = drawn(seed, count=pictures)
    found = Gaussians.fit(features, np.zeros(pictures, np.int64), 1)
    for shrinkage in ("none", "convex", "rapf"):
        assert np.linalg.eigvalsh(found.covariance(0, shrinkage)).min() > 0


@KINDS
def test_an_affine_map_moves_the_statistics_as_it_moves_the_features(covariance: Any) -> None:
    features, labels = drawn(2)
    random = np.random.default_rng(3)
    matrix = random.standard_normal((WIDTH, WIDTH))
    if covariance == "diagonal":
        matrix = np.diag(np.diag(matrix))
    offset = random.standard_normal(WIDTH)
    moved = Gaussians.fit(features, labels, 3, covariance).moved(matrix, offset)
    same(moved, Gaussians.fit(features @ matrix.T + offset, labels, 3, covariance))


@KINDS
def test_draws_have_the_moments_they_are_drawn_from(covariance: Any) -> None:
    features, labels = drawn(4)
    found = Gaussians.fit(features, labels, 3, covariance)
    draws = Sampler(found, "convex", 0.1).draw(1, 100_000, [0])
    expected = found.covariance(1, "convex", 0.1)
    expected = np.diag(expected) if expected.ndim == 1 else expected
    np.testing.assert_allclose(draws.mean(axis=0), found.means[1], atol=0.1)
    np.testing.assert_allclose(np.cov(draws.T), expected, atol=0.02 * np.trace(expected))


def test_draws_are_named_by_key_and_class() -> None:
    found = Gaussians.fit(*drawn(5), 3)
    key = [0, 1, 2, 3]
    first = Sampler(found, "none", 0.1).draw(0, 4, key)
    again = Sampler(found, "none", 0.1)
    again.draw(1, 9, [0, 1, 0, 0])
    assert np.array_equal(again.draw(0, 4, key), first)
    others = [again.draw(0, 4, [*key[:place], 9, *key[place + 1 :]]) for place in range(len(key))]
    others.append(again.draw(1, 4, key) - np.float32(found.means[1] - found.means[0]))
    assert not any(np.allclose(first, other) for other in others)


def test_classes_of_several_tasks_stand_side_by_side() -> None:
    one, two = Gaussians.fit(*drawn(5), 3), Gaussians.fit(*drawn(6), 4)
    both = Gaussians.joined([one, two])
    assert np.array_equal(both.covariance(2), one.covariance(2))
    assert np.array_equal(both.covariance(4), two.covariance(1))
    assert both.counts.tolist() == [*one.counts, *two.counts]


def test_a_class_without_pictures_cannot_be_drawn_from() -> None:
    with pytest.raises(DataError, match="class 3 has no pictures"):
        Sampler(Gaussians.fit(*drawn(0), 4), "none", 0.1).draw(3, 1, [0])


@KINDS
def test_they_come_back_from_arrays(covariance: Any) -> None:
    found = Gaussians.fit(*drawn(6), 3, covariance)
    arrays = found.arrays()
    assert {name: values.dtype.name for name, values in arrays.items()} == {
        "counts": "int64",
        "means": "float32",
        "scatter": "float32",
    }
    back = Gaussians.from_arrays(arrays)
    np.testing.assert_allclose(back.scatter, found.scatter, rtol=1e-6, atol=1e-5)
