"""What each calibration recovers and what it cannot; the transport map against POT."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import ot
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from condu_ray.errors import TrainingError
from condu_ray.memory.calibration import (
    MODES,
    Affine,
    Calibration,
    Mode,
    best_mode,
    distances,
    fit,
    measure,
    regression,
    transport,
)
from condu_ray.memory.gaussians import Gaussians, shrunk
from condu_ray.memory.moments import covariance, distance, root, roots

Array = NDArray[np.float64]
WIDTH = 12
seeds = st.integers(0, 2**32 - 1)


def positive(random: np.random.Generator, width: int = WIDTH) -> Array:
    """A symmetric positive definite matrix with a condition of a few hundred at most."""
    turned = rotation(random, width)
    return np.asarray((turned * random.uniform(0.1, 3.0, width)) @ turned.T)


def rotation(random: np.random.Generator, width: int = WIDTH) -> Array:
    found, upper = np.linalg.qr(random.standard_normal((width, width)))
    turned = found * np.sign(np.diag(upper))
    turned[:, 0] *= np.linalg.det(turned)
    return np.asarray(turned)


def pictures(random: np.random.Generator, count: int, width: int = WIDTH, classes: int = 4) -> tuple[Array, NDArray]:
    labels = np.arange(count) % classes
    means = 2 * random.standard_normal((classes, width))
    return means[labels] + random.standard_normal((count, width)) @ root(positive(random, width)), labels


def moved(calibration: Calibration, covariance: Array) -> Array:
    """That of a class, or its diagonal, under the encoder after."""
    old = Gaussians(np.array([2]), np.zeros((1, len(covariance))), covariance[None])
    return np.asarray(calibration.gaussians(old).scatter[0])


@given(seeds)
def test_the_transport_pushes_one_covariance_to_the_other_and_is_symmetric_and_positive(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, two = positive(random), positive(random)
    found = transport(one, two)
    np.testing.assert_allclose(found @ one @ found.T, two, atol=1e-9)
    np.testing.assert_array_equal(found, found.T)
    assert np.linalg.eigvalsh(found)[0] > 0


@given(seeds)
def test_transport_and_distance_are_those_of_pot(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, two = positive(random), positive(random)
    mean_one, mean_two = random.standard_normal((2, WIDTH))
    theirs, shift = ot.gaussian.bures_wasserstein_mapping(mean_one, mean_two, one, two)
    found = transport(one, two)
    np.testing.assert_allclose(found, theirs, atol=1e-8)
    np.testing.assert_allclose(mean_two - found @ mean_one, np.ravel(shift), atol=1e-8)
    expected = float(ot.gaussian.bures_wasserstein_distance(mean_one, mean_two, one, two))
    assert distance(mean_one, one, mean_two, two) == pytest.approx(expected, abs=1e-6)


@given(seeds)
def test_equal_covariances_are_left_alone_also_once_shrunk(seed: int) -> None:
    random = np.random.default_rng(seed)
    one = positive(random)
    np.testing.assert_allclose(transport(one, one), np.eye(WIDTH), atol=1e-9)
    few = covariance(random.standard_normal((4, WIDTH)))
    np.testing.assert_allclose(
        transport(shrunk(few, "convex", 0.01), shrunk(few, "convex", 0.01)), np.eye(WIDTH), atol=1e-9
    )
    before, labels = pictures(random, 60)
    for mode in MODES:
        unmoved = fit(mode, before, before, labels)
        np.testing.assert_allclose(unmoved.features(before[0]), before[0], atol=1e-9)
        np.testing.assert_allclose(moved(unmoved, one), one, atol=1e-9)
    shifted = fit("ot", before, before + 1.5, labels)
    np.testing.assert_allclose(
        shifted.features(before[0]), fit("mean", before, before + 1.5, labels).features(before[0])
    )


@given(seeds)
def test_the_way_back_undoes_the_way_there(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, two = positive(random), positive(random)
    np.testing.assert_allclose(transport(two, one) @ transport(one, two), np.eye(WIDTH), atol=1e-8)


@given(seeds)
def test_of_covariances_with_common_axes_the_transport_scales_those(seed: int) -> None:
    random = np.random.default_rng(seed)
    turned, (a, b) = rotation(random), random.uniform(0.1, 3.0, (2, WIDTH))
    found = transport((turned * a) @ turned.T, (turned * b) @ turned.T)
    np.testing.assert_allclose(found, (turned * np.sqrt(b / a)) @ turned.T, atol=1e-9)
    one = positive(random)
    np.testing.assert_allclose(transport(one, 4 * one), 2 * np.eye(WIDTH), atol=1e-8)


@given(seeds)
def test_the_transport_turns_with_the_space(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, two, turned = positive(random), positive(random), rotation(random)
    there = transport(turned @ one @ turned.T, turned @ two @ turned.T)
    np.testing.assert_allclose(there, turned @ transport(one, two) @ turned.T, atol=1e-8)


@given(seeds)
def test_a_symmetric_positive_drift_is_recovered(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, drift = positive(random), positive(random)
    np.testing.assert_allclose(transport(one, drift @ one @ drift), drift, atol=1e-7)


@given(seeds)
def test_another_map_with_the_same_push_forward_costs_more(seed: int) -> None:
    random = np.random.default_rng(seed)
    one, two = positive(random), positive(random)
    other = root(two) @ roots(one)[1]
    np.testing.assert_allclose(other @ one @ other.T, two, atol=1e-9)

    def cost(matrix: Array) -> float:  # E ‖Az - z‖² for z of covariance `one`
        return float(np.trace((matrix - np.eye(WIDTH)) @ one @ (matrix - np.eye(WIDTH)).T))

    assert cost(transport(one, two)) < cost(other)


def test_a_rotation_is_not_recovered_by_transport_but_by_regression() -> None:
    """A limit: the two distributions are all that `ot` compares."""
    random = np.random.default_rng(0)
    one, turned = positive(random), rotation(random)
    found = transport(one, turned @ one @ turned.T)
    np.testing.assert_allclose(found @ one @ found.T, turned @ one @ turned.T, atol=1e-9)
    assert np.linalg.norm(found - turned, 2) > 1
    before, labels = pictures(random, 400)
    after = before @ turned.T
    drift = measure(before, after, labels, seed=0, shrinkage=0.0)
    assert drift.residuals["linear"] < 1e-9 < 0.3 < drift.residuals["ot"]
    # Old classes elsewhere are made worse by it than by leaving them where they are or nearly so.
    old = 2 * random.standard_normal((50, WIDTH))
    errors = {mode: np.linalg.norm(fit(mode, before, after, labels).features(old) - old @ turned.T) for mode in MODES}
    assert errors["linear"] < 0.1 * errors["none"] and errors["ot"] > 0.7 * errors["none"]


@given(seeds, st.floats(0, 1))
def test_part_of_the_way_is_that_part_of_the_distance(seed: int, strength: float) -> None:
    random = np.random.default_rng(seed)
    mean_one, mean_two = random.standard_normal((2, WIDTH))
    one, two = positive(random), positive(random)
    matrix = transport(one, two)
    part = Affine(matrix, mean_two - matrix @ mean_one).partly(strength)
    whole = distance(mean_one, one, mean_two, two)
    gone = distance(mean_one, one, part.features(mean_one), moved(part, one))
    assert gone == pytest.approx(strength * whole, abs=1e-6)


@given(seeds)
def test_regression_recovers_every_affine_drift(seed: int) -> None:
    random = np.random.default_rng(seed)
    before, labels = pictures(random, 10 * WIDTH)
    drift, shift = random.standard_normal((WIDTH, WIDTH)), random.standard_normal(WIDTH)
    found = fit("linear", before, before @ drift.T + shift, labels, shrinkage=0.0)
    np.testing.assert_allclose(found.features(before[:3]), before[:3] @ drift.T + shift, atol=1e-8)
    np.testing.assert_allclose(regression(before, before @ drift.T, 0.0), drift, atol=1e-8)


@given(seeds, st.floats(0, 100))
def test_regression_without_drift_is_the_identity_whatever_the_ridge(seed: int, ridge: float) -> None:
    before, _ = pictures(np.random.default_rng(seed), 40)
    np.testing.assert_allclose(regression(before, before, ridge), np.eye(WIDTH), atol=1e-9)
    np.testing.assert_allclose(regression(before, 3 * before, 1e12), np.eye(WIDTH), atol=1e-9)


@given(seeds)
def test_the_best_symmetric_map_solves_its_equation(seed: int) -> None:
    random = np.random.default_rng(seed)
    before, after = random.standard_normal((2, 40, WIDTH))
    found = regression(before, after, 0.1, only_symmetric=True)
    one, two = before - before.mean(axis=0), after - after.mean(axis=0)
    own, cross = one.T @ one, two.T @ one
    pull = 0.1 * np.trace(own) / WIDTH * np.eye(WIDTH)
    np.testing.assert_allclose(found, found.T)
    told = found @ (own + pull)
    np.testing.assert_allclose(told + told.T, cross + cross.T + 2 * pull, atol=1e-8)


def test_regression_of_few_pictures_moves_only_what_they_span() -> None:
    random = np.random.default_rng(1)
    before, drift = random.standard_normal((5, WIDTH)), random.standard_normal((WIDTH, WIDTH))
    after = before @ drift.T
    centred = before - before.mean(0)
    for ridge in (0.0, 1e-9):
        found = regression(before, after, ridge)
        np.testing.assert_allclose(centred @ found.T, after - after.mean(0), atol=1e-5)
        beyond = np.linalg.svd(centred)[2][4:]
        np.testing.assert_allclose(beyond @ found.T, beyond, atol=1e-5)


@given(seeds)
def test_an_affine_map_moves_moments_as_it_moves_pictures(seed: int) -> None:
    random = np.random.default_rng(seed)
    before, labels = pictures(random, 50)
    found = fit("linear", before, random.standard_normal((50, WIDTH)), labels)
    after = found.features(before)
    np.testing.assert_allclose(found.features(before.mean(0)), after.mean(0), atol=1e-8)
    np.testing.assert_allclose(moved(found, covariance(before)), covariance(after), atol=1e-8)
    diagonal = np.diag(moved(found, np.diag(np.arange(1.0, WIDTH + 1))))
    np.testing.assert_allclose(moved(found, np.arange(1.0, WIDTH + 1)), diagonal, atol=1e-9)


@given(seeds, st.sampled_from(["mean", "sdc", "ot", "linear"]))
def test_a_translation_is_recovered_by_every_mode(seed: int, mode: Mode) -> None:
    random = np.random.default_rng(seed)
    before, labels = pictures(random, 60)
    shift, elsewhere = random.standard_normal(WIDTH), 5 * random.standard_normal(WIDTH)
    found = fit(mode, before, before + shift, labels)
    np.testing.assert_allclose(found.features(elsewhere), elsewhere + shift, atol=1e-8)
    half = fit(mode, before, before + shift, labels, strength=0.5)
    np.testing.assert_allclose(half.features(elsewhere), elsewhere + shift / 2, atol=1e-8)


def test_semantic_drift_is_that_of_the_nearest_pictures() -> None:
    random = np.random.default_rng(2)
    before = np.concatenate([random.standard_normal((50, 4)), 100 + random.standard_normal((50, 4))])
    drift = np.repeat([[1.0], [-1.0]], 50, axis=0) * np.ones((100, 4))
    found = fit("sdc", before, before + drift, np.repeat([0, 1], 50))
    np.testing.assert_allclose(found.features(np.full(4, 3.0)), np.full(4, 4.0))
    np.testing.assert_allclose(found.features(np.full(4, 1e6)), np.full(4, 1e6 - 1))  # far from all: the nearest


def test_shrinking_keeps_the_trace_and_makes_few_pictures_enough() -> None:
    random = np.random.default_rng(3)
    few = [covariance(random.standard_normal((5, 16))) for _ in range(2)]
    assert np.linalg.cond(few[0]) > 1e12
    with pytest.raises(TrainingError, match=r"shrinkage"):
        transport(*few)
    bounds = {0.1: 100, 0.001: 10_000}
    for share, bound in bounds.items():
        one, two = (shrunk(each, "convex", share) for each in few)
        assert np.trace(one) == pytest.approx(np.trace(few[0]))
        assert np.linalg.cond(one) < bound * 16
        found = transport(one, two)
        np.testing.assert_allclose(found @ one @ found, two, atol=1e-9)


def test_statistics_that_are_not_finite_are_refused() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        roots(np.full((3, 3), np.nan))


def test_variances_that_are_0_are_refused() -> None:
    before, labels = np.random.default_rng(4).standard_normal((5, WIDTH)), np.arange(5) % 2
    before[:, 0] = 1
    with pytest.raises(TrainingError, match=r"some variances of features are 0.*learn more pictures a task"):
        fit("ot", before, before + 1, labels, diagonal=True, shrinkage=0)


@pytest.mark.parametrize("diagonal", [True, False])
def test_one_picture_a_class_is_moved_by_what_lies_around_the_common_mean(diagonal: bool) -> None:
    random = np.random.default_rng(4)
    before = random.standard_normal((5, WIDTH))
    after = before + 1 + 0.1 * random.standard_normal((5, WIDTH))
    labels = np.arange(5)
    found = fit("ot", before, after, labels, diagonal=diagonal)
    pooled = fit("ot", before, after, labels, kind="pooled", diagonal=diagonal)
    np.testing.assert_array_equal(found.features(before), pooled.features(before))


@pytest.mark.parametrize(("count", "classes"), [(5, 5), (8, 2)], ids=["one", "few"])
def test_a_mode_that_cannot_be_fitted_is_measured_as_no_better_than_none(count: int, classes: int) -> None:
    random = np.random.default_rng(8)
    before, labels = random.standard_normal((count, WIDTH)), np.arange(count) % classes
    after = before + 1 + 0.1 * random.standard_normal(before.shape)
    with pytest.raises(TrainingError, match="has no inverse"):
        fit("ot", before, after, labels, shrinkage=0)
    found = measure(before, after, labels, seed=0, shrinkage=0)
    assert found.residuals["ot"] == found.residuals["none"] == 1
    assert found.residuals["mean"] < 0.1 and best_mode(found) != "ot"
    assert found.shift + found.symmetric + found.rotation + found.rest == pytest.approx(1)
    assert abs(found.symmetric) < 0.1


def test_features_that_are_not_finite_are_not_measured() -> None:
    before = np.random.default_rng(8).standard_normal((20, WIDTH))
    with pytest.raises(TrainingError, match="not finite"):
        measure(before, np.where(before > 1, np.nan, before), np.arange(20) % 2, seed=0)


def test_variances_alone_are_scaled_apart() -> None:
    random = np.random.default_rng(4)
    before, labels = pictures(random, 200)
    scale = random.uniform(0.5, 2, WIDTH)
    found = fit("ot", before, before * scale, labels, shrinkage=0.0, diagonal=True)
    assert isinstance(found, Affine)
    np.testing.assert_allclose(found.matrix, np.diag(scale), atol=1e-9)


def test_the_classes_that_are_there_now_do_not_bend_the_map_within_classes() -> None:
    """How far the current classes lie apart changed, and nothing else."""
    random = np.random.default_rng(5)
    noise, labels = random.standard_normal((400, 6)), np.arange(400) % 4
    means = 3 * random.standard_normal((4, 6))
    before, after = noise + means[labels], noise + 3 * means[labels]
    within, pooled = (fit("ot", before, after, labels, kind=kind) for kind in ("within", "pooled"))
    old = np.eye(6)
    assert np.abs(moved(within, old) - old).max() < 1e-6 < 0.5 < np.abs(moved(pooled, old) - old).max()


def _sheared(random: np.random.Generator) -> Array:
    return np.asarray(np.eye(24) + 0.3 * random.standard_normal((24, 24)) / np.sqrt(24))


@pytest.mark.parametrize(
    ("drift_of", "exact"),
    [
        (lambda random: np.eye(24), {"mean", "sdc", "ot", "linear"}),
        (lambda random: positive(random, 24), {"ot", "linear"}),
        (_sheared, {"linear"}),
        (lambda random: rotation(random, 24), {"linear"}),
    ],
    ids=["translation", "symmetric", "any linear", "rotation"],
)
def test_what_calibrated_gaussians_of_old_classes_miss(
    drift_of: Callable[[np.random.Generator], Array], exact: set[str]
) -> None:
    """Ten old and ten new classes that drift alike, told from the new ones: who is close to the truth."""
    random = np.random.default_rng(6)
    drift, shift = drift_of(random), random.standard_normal(24)
    spread = root(positive(random, 24))
    means = random.standard_normal((20, 24))
    labels = np.arange(2000) % 10
    before = means[labels] + random.standard_normal((2000, 24)) @ spread
    after = before @ drift.T + shift
    missed: dict[Mode, float] = {}
    for mode in MODES:
        found = fit(mode, before, after, labels)
        missed[mode] = float(
            np.mean(
                [
                    distance(
                        found.features(mean),
                        moved(found, spread @ spread),
                        drift @ mean + shift,
                        drift @ spread @ spread @ drift.T,
                    )
                    for mean in means[10:]
                ]
            )
        )
    good = {mode for mode in MODES if missed[mode] < 0.1 * missed["none"]}
    assert good == exact, missed


def test_the_drift_is_told_apart_and_the_best_mode_follows() -> None:
    random = np.random.default_rng(7)
    before, labels = pictures(random, 600)
    drifts = {
        "shift": before + 2.0,
        "symmetric": (before - before.mean(0)) @ positive(random).T + before.mean(0),
        "rotation": before @ _turn(WIDTH, 0.4).T,
    }
    found = {name: measure(before, after, labels, seed=0, shrinkage=1e-6) for name, after in drifts.items()}
    assert found["shift"].shift == pytest.approx(1)
    assert best_mode(found["shift"]) in ("mean", "sdc", "ot", "linear")
    assert found["symmetric"].symmetric > 0.9 and found["symmetric"].rotation < 0.01
    assert found["symmetric"].residuals["ot"] < 0.05
    # A turn by 0.4 also looks like a symmetric shrinking by cos 0.4: that part is told first.
    assert found["rotation"].rotation > 0.4 and best_mode(found["rotation"]) == "linear"
    for each in found.values():
        assert each.shift + each.symmetric + each.rotation + each.rest == pytest.approx(1)
    still = measure(before, before, labels, seed=0)
    assert still.relative == 0 and best_mode(still) == "none"


def _turn(width: int, angle: float) -> Array:
    turned = np.eye(width)
    for first in range(0, width, 2):
        turned[first : first + 2, first : first + 2] = [
            [np.cos(angle), -np.sin(angle)],
            [np.sin(angle), np.cos(angle)],
        ]
    return turned


def test_calibrated_pictures_are_nearer_to_those_of_the_encoder_after() -> None:
    random = np.random.default_rng(8)
    before, labels = pictures(random, 300)
    after = before @ positive(random).T + 1
    for mode in ("mean", "ot", "linear"):
        apart, left = distances(fit(mode, before, after, labels), before, after)
        assert left < apart
