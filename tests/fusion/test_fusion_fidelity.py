"""Reconstruction into a given array, and how much of a delta is left: exactly, and estimated from a kept sample."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from condu_ray.config import Granularity
from condu_ray.errors import FusionError
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import Fidelity, fidelity, fidelity_at, probe_coordinates, reconstruct
from condu_ray.fusion.state import FusionState
from condu_ray.fusion.unify import unify

LAYOUT = Layout.of(
    {"a": np.zeros((500, 130), np.float32), "b": np.zeros(99, np.float32), "c": np.zeros((3, 4001), np.float32)}
)
GRANULARITIES: tuple[Granularity, ...] = ("l1", "tensor_mean", "tensor", "row")


def delta(seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return LAYOUT.flatten({e.name: rng.standard_normal(e.shape) * rng.uniform(0.01, 0.1) for e in LAYOUT.entries})


@pytest.fixture(scope="module", params=GRANULARITIES)
def state(request: pytest.FixtureRequest) -> FusionState:
    found = FusionState.empty(LAYOUT, request.param)
    for seed in range(4):
        found = unify(found, f"t{seed}", delta(seed))
    return found


def test_reconstruct_writes_into_the_array_given(state: FusionState) -> None:
    out = np.full(LAYOUT.total, np.nan, np.float32)
    assert reconstruct(state, "t1", out) is out
    assert np.array_equal(out.view(np.uint32), reconstruct(state, "t1").view(np.uint32))
    assert not np.any(np.signbit(out[~state.mask("t1")]))
    with pytest.raises(FusionError, match="out is float64"):
        reconstruct(state, "t1", out.astype(np.float64))


def test_fidelity_is_the_textbook_distance(state: FusionState) -> None:
    for seed in range(4):
        own, restored = delta(seed).astype(np.float64), reconstruct(state, f"t{seed}").astype(np.float64)
        found = fidelity(state, f"t{seed}", delta(seed))
        assert found.relative_l2 == pytest.approx(np.linalg.norm(restored - own) / np.linalg.norm(own))
        assert found.cosine == pytest.approx(restored @ own / np.linalg.norm(own) / np.linalg.norm(restored))
        assert found.bits_alive == pytest.approx(state.mask(f"t{seed}").sum() / np.count_nonzero(own))
        assert 0 < found.bits_alive < 1


def test_a_lone_task_and_a_zero_task_lose_nothing() -> None:
    lone = unify(FusionState.empty(LAYOUT, "row"), "lone", delta(0))
    assert fidelity(lone, "lone", delta(0)) == Fidelity(0.0, 1.0, 1.0)
    with pytest.warns(UserWarning, match="zero everywhere"):
        both = unify(lone, "zero", np.zeros(LAYOUT.total, np.float32))
    assert fidelity(both, "zero", np.zeros(LAYOUT.total)) == Fidelity(0.0, 1.0, 1.0)


def test_an_overruled_task_has_lost_everything() -> None:
    strong = unify(FusionState.empty(LAYOUT, "l1"), "strong", delta(0))
    with pytest.warns(UserWarning, match="'weak'"):
        both = unify(strong, "weak", delta(0) * np.float32(-0.5))
    assert fidelity(both, "weak", delta(0) * np.float32(-0.5)) == Fidelity(1.0, 0.0, 0.0)


def test_probes_are_distinct_parameters_and_the_same_for_every_task() -> None:
    probes = probe_coordinates(LAYOUT, 5000, seed=3)
    parameters = np.concatenate([np.arange(e.offset, e.stop) for e in LAYOUT.entries])
    assert probes.dtype == np.int64
    assert len(probes) == 5000
    assert np.all(np.diff(probes) > 0)
    assert np.isin(probes, parameters).all()
    assert np.array_equal(probes, probe_coordinates(LAYOUT, 5000, seed=3))
    assert not np.array_equal(probes, probe_coordinates(LAYOUT, 5000, seed=4))
    assert np.array_equal(probe_coordinates(LAYOUT, 10**6), parameters)


def test_probes_never_change_between_releases() -> None:
    assert probe_coordinates(LAYOUT, 8, seed=0).tolist() == [2212, 16174, 27183, 34082, 38599, 56942, 63159, 68800]


def test_all_probes_give_the_fidelity_itself(state: FusionState) -> None:
    everywhere = probe_coordinates(LAYOUT, LAYOUT.parameters)
    exact, found = fidelity(state, "t0", delta(0)), fidelity_at(state, "t0", everywhere, delta(0)[everywhere])
    assert found.relative_l2 == pytest.approx(exact.relative_l2)
    assert found.cosine == pytest.approx(exact.cosine)
    assert found.bits_alive == exact.bits_alive


def test_some_probes_give_a_good_estimate(state: FusionState) -> None:
    probes = probe_coordinates(LAYOUT, 20_000)
    exact, found = fidelity(state, "t2", delta(2)), fidelity_at(state, "t2", probes, delta(2)[probes])
    assert found.relative_l2 == pytest.approx(exact.relative_l2, abs=0.02)
    assert found.bits_alive == pytest.approx(exact.bits_alive, abs=0.01)


def test_lengths_that_differ_are_refused(state: FusionState) -> None:
    with pytest.raises(FusionError, match=r"\[3\] values for \[4\] coordinates"):
        fidelity_at(state, "t0", np.arange(4), np.zeros(3, np.float32))
    with pytest.raises(FusionError, match="'t0' has shape"):
        fidelity(state, "t0", np.zeros(5, np.float32))
