"""The discriminant that class Gaussians give: as good as the formula on the true statistics, and always the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from condu_ray.memory.discriminant import discriminant
from condu_ray.memory.gaussians import Gaussians, Sampler

WIDTH, CLASSES = 8, 5


def unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), np.float32)


def drawn(seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Classes a third of a deviation apart in many directions, seen through a skewed covariance."""
    random, world = np.random.default_rng(seed), np.random.default_rng(7)
    means, turn = 3 + 0.8 * world.standard_normal((CLASSES, WIDTH)), world.standard_normal((WIDTH, WIDTH)) / 3
    labels = np.arange(400 * CLASSES) % CLASSES
    return (means[labels] + random.standard_normal((len(labels), WIDTH)) @ turn).astype(np.float32), labels


@pytest.fixture(scope="module")
def known() -> Gaussians:
    return Gaussians.fit(*drawn(0), CLASSES)


def scores(of: tuple[NDArray[np.float32], NDArray[np.float32]], features: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(features @ of[0].T + of[1])


@pytest.mark.parametrize("seen", [unit, lambda raw: raw], ids=["unit", "raw"])
def test_it_answers_as_well_as_one_that_saw_the_pictures(known: Gaussians, seen) -> None:  # type: ignore[no-untyped-def]
    found = discriminant(known, Sampler(known, "none", 0.0), seen)
    (features, labels), (test, right) = drawn(0), drawn(1)
    own = Gaussians.fit(seen(features), labels, CLASSES)
    weights = np.linalg.solve(own.scatter.sum(0) / (len(labels) - CLASSES), own.means.T).T
    ideal = (seen(test) @ weights.T - 0.5 * (weights * own.means).sum(1)).argmax(1)
    assert (ideal == right).mean() > 0.8, "the test needs classes that can be told apart"
    assert (scores(found, seen(test)).argmax(1) == right).mean() > (
        ideal == right
    ).mean() - 0.03  # shrinking costs a little


def test_differences_are_those_of_log_densities(known: Gaussians) -> None:
    """Of Gaussians with the shared covariance that it estimates; so the softmax of the scores is their posterior."""
    sampler = Sampler(known, "none", 0.0)
    weights, bias = discriminant(known, sampler, lambda raw: raw)
    drawn_once = [sampler.draw(label, 64, (0,)) for label in range(CLASSES)]
    means = known.means
    samples = [np.concatenate([each, 2 * mean - each]) for each, mean in zip(drawn_once, means, strict=True)]
    within = sum(np.cov(each.T) for each in samples) / CLASSES
    inverse = np.linalg.inv(0.9 * within + 0.1 * np.diag(np.diag(within)))
    asked = drawn(2)[0][:20].astype(np.float64)
    away = asked[:, None] - means
    expected = -0.5 * np.einsum("bcd,de,bce->bc", away, inverse, away)
    found = asked @ weights.T + bias
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=1e-2)


def test_the_same_gaussians_give_the_same_bits(known: Gaussians) -> None:
    one, other = (discriminant(known, Sampler(known, "convex", 0.1), unit) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_class_without_pictures_gets_the_mean_of_the_others(known: Gaussians) -> None:
    features, labels = drawn(0)
    more = Gaussians.fit(features, labels, CLASSES + 1)
    weights, bias = discriminant(more, Sampler(more, "convex", 0.1), unit)
    np.testing.assert_allclose(weights[-1], weights[:-1].mean(axis=0), rtol=1e-4)
    assert bias[-1] == pytest.approx(bias[:-1].mean(), rel=1e-5)


@pytest.mark.parametrize("pictures", [1, 2, 4])
def test_few_pictures_a_class_do_not_drown_other_logits(pictures: int) -> None:
    """Fewer than a feature is wide: scores are no further apart than those of the true covariance, give or take."""
    width, classes, random = 64, 5, np.random.default_rng(3)
    centres = 3 + random.standard_normal((classes, width))
    labels = np.repeat(np.arange(classes), pictures)
    features = (centres[labels] + random.standard_normal((len(labels), width))).astype(np.float32)
    known = Gaussians.fit(features, labels, classes)
    weights, bias = discriminant(known, Sampler(known, "convex", 0.1), lambda raw: raw)
    right = np.arange(200) % classes
    asked = (centres[right] + random.standard_normal((200, width))).astype(np.float32)
    found, ideal = asked @ weights.T + bias, asked @ centres.T - 0.5 * (centres**2).sum(1)
    assert np.ptp(found, axis=1).mean() < 2 * np.ptp(ideal, axis=1).mean()
    assert (found.argmax(1) == right).mean() > 0.9
