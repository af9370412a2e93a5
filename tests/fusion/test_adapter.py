"""Fusing two adapters: the laws of each basis and weighting, and what hangs on the rank of the adapter before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.errors import FusionError
from condu_ray.fusion.adapter import fuse, positive_qr

WIDTH = 8
RULES = [("qr", "element"), ("qr", "direction"), ("svd", "element"), ("identity", "element"), ("qr", "constant")]
EVERY = pytest.mark.parametrize(("basis", "weights"), RULES)
SEEDS = st.integers(0, 10_000)
BIASES = st.floats(0, 1)


def pair(seed: int, width: int = WIDTH) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    old = random.standard_normal((width, width))
    return old, old + random.standard_normal((width, width)) * random.uniform(0.01, 2)


def orthogonal(seed: int) -> Any:
    return positive_qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0]


def close(one: Any, other: Any, scale: float = 1.0) -> None:
    np.testing.assert_allclose(one, other, atol=1e-9 * scale, rtol=0)


@EVERY
@given(seed=SEEDS, bias=BIASES)
def test_nothing_changed_gives_the_adapter_before(basis: Any, weights: Any, seed: int, bias: float) -> None:
    old, _ = pair(seed)
    assert np.array_equal(fuse(old, old, bias, basis, weights).weight, old)


@EVERY
@given(seed=SEEDS)
def test_a_bias_of_one_gives_the_new_adapter(basis: Any, weights: Any, seed: int) -> None:
    old, new = pair(seed)
    found = fuse(old, new, 1.0, basis, weights)
    close(found.weight, new)
    assert (found.mean_weight, found.whole) == (1.0, 1.0)


@EVERY
@given(seed=SEEDS, bias=BIASES, more=BIASES)
def test_at_least_the_bias_of_the_change_is_taken_over_and_never_more_than_all(
    basis: Any, weights: Any, seed: int, bias: float, more: float
) -> None:
    old, new = pair(seed)
    low, high = sorted((bias, more))
    change = np.linalg.norm(new - old)
    found = fuse(old, new, low, basis, weights)
    moved = np.linalg.norm(found.weight - old)
    assert low * change - 1e-9 <= moved <= change + 1e-9
    assert np.linalg.norm(new - found.weight) <= (1 - low) * change + 1e-9
    assert np.linalg.norm(fuse(old, new, high, basis, weights).weight - old) >= moved - 1e-9


@EVERY
@given(seed=SEEDS, bias=BIASES, scale=st.floats(0.01, 100))
def test_scaling_both_scales_the_result(basis: Any, weights: Any, seed: int, bias: float, scale: float) -> None:
    old, new = pair(seed)
    close(
        fuse(scale * old, scale * new, bias, basis, weights).weight,
        scale * fuse(old, new, bias, basis, weights).weight,
        scale,
    )


@pytest.mark.parametrize(("basis", "weights"), [("qr", "element"), ("qr", "direction"), ("svd", "element")])
@given(seed=SEEDS, bias=BIASES)
def test_a_rotation_of_what_comes_out_turns_the_result(basis: Any, weights: Any, seed: int, bias: float) -> None:
    old, new = pair(seed)
    turn = orthogonal(seed + 1)
    close(fuse(turn @ old, turn @ new, bias, basis, weights).weight, turn @ fuse(old, new, bias, basis, weights).weight)


def test_a_rotation_of_what_goes_in_does_not() -> None:
    old, new = pair(0)
    turn = orthogonal(1)
    for basis, weights in (("qr", "element"), ("qr", "direction"), ("svd", "element")):
        turned = fuse(old @ turn, new @ turn, 0.2, basis, weights).weight  # type: ignore[arg-type]
        assert np.abs(turned - fuse(old, new, 0.2, basis, weights).weight @ turn).max() > 1e-3  # type: ignore[arg-type]
    with_rows = fuse(old @ turn, new @ turn, 0.2, "svd", "direction").weight
    close(with_rows, fuse(old, new, 0.2, "svd", "direction").weight @ turn)


@given(seed=SEEDS, bias=BIASES)
def test_from_the_identity_the_qr_basis_is_no_basis(seed: int, bias: float) -> None:
    _, change = pair(seed)
    one = np.eye(WIDTH)
    for weights in ("element", "direction"):
        qr = fuse(one, one + change, bias, "qr", weights).weight  # type: ignore[arg-type]
        close(qr, fuse(one, one + change, bias, "identity", weights).weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("basis", ["qr", "svd"])
@given(seed=SEEDS)
def test_without_bias_a_change_counts_by_its_size(basis: Any, seed: int) -> None:
    old, new = pair(seed)
    turn = positive_qr(old)[0] if basis == "qr" else np.linalg.svd(old)[0]
    change = turn.T @ (new - old)
    close(turn.T @ (fuse(old, new, 0.0, basis, "element").weight - old), change * np.abs(change) / np.abs(change).max())


@given(seed=SEEDS, place=st.integers(0, WIDTH - 1), bias=BIASES)
def test_a_change_along_one_direction_is_taken_over_whole(seed: int, place: int, bias: float) -> None:
    old, _ = pair(seed)
    row = np.random.default_rng(seed).standard_normal(WIDTH)
    new = old + np.outer(positive_qr(old)[0][:, place], row)
    close(fuse(old, new, bias, "qr", "direction").weight, new)


@given(seed=SEEDS, bias=BIASES)
def test_svd_by_element_is_the_formula_as_published_in_code(seed: int, bias: float) -> None:
    old, new = pair(seed)
    u, sizes, v = np.linalg.svd(old)
    after, before = u.T @ new, np.diag(sizes) @ v
    error = np.abs(after - before)
    share = np.minimum(1, error / error.max() + bias)
    close(fuse(old, new, bias, "svd", "element").weight, u @ (share * after + (1 - share) * before))


@given(seed=SEEDS)
def test_q_does_not_see_an_upper_triangle_on_its_right(seed: int) -> None:
    old, _ = pair(seed)
    random = np.random.default_rng(seed)
    triangle = np.triu(random.standard_normal((WIDTH, WIDTH)), 1) + np.diag(random.uniform(1, 2, WIDTH))
    np.testing.assert_allclose(positive_qr(old @ triangle)[0], positive_qr(old)[0], atol=1e-6)
    q, r = positive_qr(old)
    assert np.diag(r).min() >= 0
    close(q @ r, old)


@pytest.mark.parametrize("bias", [0.05, 0.6])
def test_an_adapter_that_lacks_rank_is_fused_stably(bias: float) -> None:
    random = np.random.default_rng(0)
    old = random.standard_normal((WIDTH, 3)) @ random.standard_normal((3, WIDTH))
    new = old + random.standard_normal((WIDTH, WIDTH))
    found = fuse(old, new, bias, "qr", "element").weight
    for seed in range(5):
        shaken = old + 1e-9 * np.random.default_rng(seed).standard_normal(old.shape)
        assert np.abs(fuse(shaken, new, bias, "qr", "element").weight - found).max() < 1e-6
    turn = orthogonal(3)
    close(fuse(turn @ old, turn @ new, bias, "qr", "element").weight, turn @ found)
    close(fuse(old, new, 1.0, "qr", "element").weight, new)


def test_equal_singular_values_name_no_directions() -> None:
    _, new = pair(0)
    with pytest.raises(FusionError, match="singular values .* all equal"):
        fuse(np.eye(WIDTH), new, 0.5, "svd", "element")


def test_without_a_basis_the_new_adapter_stands() -> None:
    old, new = pair(0)
    assert np.array_equal(fuse(old, new, 0.1, "none", "element").weight, new)


@pytest.mark.parametrize("new", [np.zeros((3, 2)), np.zeros((4, 4)), np.full((3, 3), np.nan)])
def test_what_does_not_fuse_is_refused(new: Any) -> None:
    with pytest.raises(FusionError):
        fuse(np.eye(3), new, 0.5, "qr", "element")
