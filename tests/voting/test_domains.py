"""Domains: what a task keeps is enough to tell it from others, and from none of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from condu_ray.errors import DataError
from condu_ray.voting.domains import (
    TEMPERATURES,
    Calibration,
    Discriminant,
    Domain,
    calibrate,
    evidence,
    make_domain,
    probabilities,
    strangeness,
)

WIDTH, CLASSES = 12, 3


def pictures(place: float, count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Domain features around `place`, with channels of very different size, some of them always the same."""
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=count)
    centers = place + np.random.default_rng(int(1000 + place * 10)).normal(size=(CLASSES, WIDTH))
    scale = np.geomspace(1e-2, 1e2, WIDTH)
    scale[5] = 0
    return ((centers[labels] + random.normal(size=(count, WIDTH))) * scale).astype(np.float32), labels


def domain(place: float, seed: int = 0, count: int = 120) -> Domain:
    features, labels = pictures(place, count, seed)
    return make_domain(features, labels, CLASSES, *pictures(place, 40, seed + 1000))


def known(domains: Sequence[Domain]) -> Calibration:
    found = calibrate(domains)
    assert found is not None
    return found


NOTHING = np.empty((0, WIDTH), np.float32), np.empty(0, np.int64)
NEAR_AND_FAR = [domain(0.0), domain(3.0), domain(9.0)]


def test_a_picture_is_nearest_to_its_own_domain() -> None:
    discriminant = Discriminant(NEAR_AND_FAR)
    for task, place in enumerate((0.0, 3.0, 9.0)):
        distances = discriminant.distances(pictures(place, 50, 7)[0]).tasks
        assert (distances.argmin(axis=1) == task).mean() > 0.95


def test_distances_are_those_of_the_shared_covariance() -> None:
    """Against the textbook formula in the natural units, on features whose covariance needs no shrinkage to invert."""
    from condu_ray.voting.domains import SHRINKAGE

    random = np.random.default_rng(3)
    parts = [(random.normal(i, 1, (60, 4)).astype(np.float32), random.integers(2, size=60)) for i in range(2)]
    discriminant = Discriminant([make_domain(x, y, 2, x[:0], y[:0]) for x, y in parts])
    means = np.concatenate([[x[y == c].mean(0) for c in range(2)] for x, y in parts]).astype(np.float64)
    within = sum((x - means[2 * i + y]).T @ (x - means[2 * i + y]) for i, (x, y) in enumerate(parts)) / (120 - 4)
    shrunk = (1 - SHRINKAGE) * within + SHRINKAGE * np.diag(np.diag(within))
    asked = random.normal(size=(5, 4))
    away = asked[:, None] - means
    expected = np.einsum("bkw,wv,bkv->bk", away, np.linalg.inv(shrunk), away).reshape(5, 2, 2)
    found = discriminant.distances(asked)  # correlations are kept in half
    np.testing.assert_allclose(found.tasks, expected.min(axis=2), rtol=2e-3)
    np.testing.assert_allclose(np.stack(found.classes, axis=1), expected, rtol=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)))
def test_tasks_may_come_in_any_order(order: list[int]) -> None:
    features, _ = pictures(3.0, 20, 8)
    found = Discriminant(NEAR_AND_FAR).distances(features)
    shuffled = Discriminant([NEAR_AND_FAR[task] for task in order]).distances(features)
    np.testing.assert_allclose(shuffled.tasks, found.tasks[:, order], rtol=1e-8)
    np.testing.assert_allclose(shuffled.classes, [found.classes[task] for task in order], rtol=1e-8)
    np.testing.assert_allclose(shuffled.relative, found.relative, rtol=1e-6, atol=1e-6)


def test_the_units_of_a_channel_do_not_matter() -> None:
    scale = np.geomspace(0.1, 10, WIDTH).astype(np.float32)
    (x, y), (asked, _) = pictures(0.0, 100, 1), pictures(0.0, 10, 2)
    plain = Discriminant([make_domain(x, y, CLASSES, x[:0], y[:0])]).distances(asked).tasks
    scaled = Discriminant([make_domain(x * scale, y, CLASSES, x[:0], y[:0])]).distances(asked * scale).tasks
    np.testing.assert_allclose(scaled, plain, rtol=0.02)


def test_probabilities_sum_to_one_and_sharpen_as_the_temperature_falls() -> None:
    distances = Discriminant(NEAR_AND_FAR).distances(pictures(0.0, 30, 9)[0]).tasks
    cool, warm = (probabilities(distances, Calibration(t, 0.0, 1.0)) for t in (5.0, 50.0))
    np.testing.assert_allclose(cool.sum(axis=1), 1)
    np.testing.assert_allclose(warm.sum(axis=1), 1)
    assert (cool.max(axis=1) >= warm.max(axis=1)).all()


def test_pictures_of_no_domain_are_strange_and_those_of_one_are_not() -> None:
    calibration = known(NEAR_AND_FAR)
    discriminant = Discriminant(NEAR_AND_FAR)
    strange = np.concatenate([pictures(place, 50, 11)[0] for place in (-40.0, 30.0)])
    usual = np.concatenate([pictures(place, 50, 12)[0] for place in (0.0, 3.0, 9.0)])
    assert np.median(strangeness(discriminant.distances(strange).relative, calibration)) > 0.5
    assert np.median(strangeness(discriminant.distances(usual).relative, calibration)) < 0.5


def test_a_single_domain_knows_its_own_pictures() -> None:
    alone = [domain(0.0)]
    relative = Discriminant(alone).distances(pictures(0.0, 200, 13)[0]).relative
    assert (strangeness(relative, known(alone)) < 0.5).mean() > 0.9


@pytest.mark.parametrize("tasks", [1, 3])
def test_without_held_out_pictures_nothing_is_calibrated(tasks: int) -> None:
    assert calibrate([make_domain(*pictures(3.0 * task, 50, 1), CLASSES, *NOTHING) for task in range(tasks)]) is None


def test_what_a_store_gives_back_is_the_same_domain() -> None:
    made = domain(0.0)
    again = Domain.from_arrays(made.arrays())
    assert all(np.array_equal(values, again.arrays()[name]) for name, values in made.arrays().items())


def test_classes_without_pictures_attract_nothing() -> None:
    features, labels = pictures(0.0, 60, 1)
    more = make_domain(features, labels, CLASSES + 5, features[:0], labels[:0])
    less = make_domain(features, labels, CLASSES, features[:0], labels[:0])
    asked, _ = pictures(0.0, 10, 2)
    np.testing.assert_array_equal(
        Discriminant([more]).distances(asked).tasks, Discriminant([less]).distances(asked).tasks
    )


def test_fewer_pictures_than_channels_are_enough() -> None:
    tiny = [make_domain(*pictures(place, 4, 1), CLASSES, *NOTHING) for place in (0.0, 20.0)]
    found = Discriminant(tiny).distances(pictures(20.0, 10, 3)[0])
    assert np.isfinite(found.tasks).all() and np.isfinite(found.relative).all()
    assert (found.tasks.argmin(axis=1) == 1).all()


def test_features_that_are_not_finite_are_refused() -> None:
    features, labels = pictures(0.0, 10, 1)
    features[3, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        make_domain(features, labels, CLASSES, features[:0], labels[:0])


def test_a_channel_that_one_task_alone_moves_calibrates_like_the_others() -> None:
    """Left out, its task must leave nothing of it behind."""
    domains = []
    for seed in range(3):
        seen, labels = pictures(4.0 * seed, 120, seed)
        seen[:, -1] = np.random.default_rng(seed).normal(size=len(seen)) if seed == 1 else 0.0
        domains.append(make_domain(seen[:100], labels[:100], 3, seen[100:], labels[100:]))
    found = known(domains)
    assert np.isfinite([found.temperature, found.middle, found.slope]).all() and found.slope > 0
    whole = Discriminant([domains[0], domains[2]]).distances(domains[1].held_out)
    assert np.isfinite(whole.tasks).all()


@pytest.mark.parametrize("far", [(), (6.0,), (0.0, 3.0, 6.0)], ids=["none", "one", "each"])
def test_domains_far_from_each_other_hide_nothing_strange_nearby(far: tuple[float, ...]) -> None:
    """One that moves a channel which is still in all others is hundreds of times as strange to them as they are."""
    domains = []
    for place in (0.0, 3.0, 6.0):
        (seen, labels), (held, own) = pictures(place, 120, 0), pictures(place, 40, 1000)
        for values in (seen, held):
            values[:, 5] = place in far and (place - 4) * (9 + np.random.default_rng(1).normal(size=len(values)))
        domains.append(make_domain(seen, labels, CLASSES, held, own))
    calibration, whole = known(domains), Discriminant(domains)
    usual = np.concatenate([whole.distances(each.held_out).relative for each in domains])
    assert strangeness(usual, calibration).mean() < 0.05
    beyond = float(usual.mean() - 6 * usual.std())
    assert strangeness(np.array([beyond, 10 * beyond, 1e6 * beyond]), calibration).min() > 0.5


def test_evidence_is_half_of_what_the_discriminant_says_of_classes() -> None:
    calibration = known(NEAR_AND_FAR)
    asked, labels = pictures(3.0, 60, 21)
    classes = Discriminant(NEAR_AND_FAR).distances(asked).classes[1]
    told = evidence(classes, calibration)
    assert calibration.within is not None
    np.testing.assert_allclose(np.exp(2 * told).sum(axis=1), 1)
    np.testing.assert_allclose(2 * (told[:, 0] - told[:, 1]), (classes[:, 1] - classes[:, 0]) / calibration.within)
    assert (told.argmax(axis=1) == labels).mean() > 0.9


def test_the_temperature_of_classes_is_the_likeliest_for_pictures_that_were_held_out() -> None:
    found = known(NEAR_AND_FAR).within

    def likelihood(temperature: float) -> float:
        total = 0.0
        for task, place in enumerate((0.0, 3.0, 9.0)):
            features, labels = pictures(place, 40, 1000)
            told = evidence(
                Discriminant(NEAR_AND_FAR).distances(features).classes[task], Calibration(1, 0, 1, temperature)
            )
            total += float(told[np.arange(40), labels].mean())
        return total

    assert found in TEMPERATURES
    assert likelihood(found) == max(likelihood(temperature) for temperature in TEMPERATURES[TEMPERATURES < 200])


def test_a_domain_that_an_older_release_kept_says_nothing_of_classes() -> None:
    arrays = NEAR_AND_FAR[0].arrays()
    del arrays["held_out_labels"]
    old = Domain.from_arrays(arrays)
    assert (old.held_out_labels == -1).all()
    alone = known([old])
    assert alone.within is None
    assert not evidence(Discriminant([old]).distances(pictures(0.0, 5, 3)[0]).classes[0], alone).any()
    assert known([old, NEAR_AND_FAR[1]]).within is not None


def test_evidence_neither_helps_nor_harms_a_class_without_pictures() -> None:
    features, labels = pictures(0.0, 60, 1)
    more = make_domain(features, labels, CLASSES + 1, features[:9], labels[:9])
    told = evidence(Discriminant([more]).distances(features).classes[0], known([more]))
    np.testing.assert_allclose(told[:, -1], told[:, :-1].mean(axis=1))
