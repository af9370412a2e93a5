"""The second bit: what rows of zeros leave, and no more; it needs no other task; what is stored comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_fusion_properties import Case, cases

from condu_ray.errors import FusionError
from condu_ray.fusion import signs, signs_stored
from condu_ray.fusion.groups import group_of
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.signs import SignState
from condu_ray.fusion.sizes import lengths

SIGNED: Any = ("l1", "tensor", "row")
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def _with_zeros(case: Case, random: np.random.Generator, share: float = 0.5) -> list[NDArray[np.float32]]:
    """The deltas, each with about this share of its groups set to zero."""
    there = np.concatenate([np.arange(entry.offset, entry.stop) for entry in case.layout.entries])
    group = group_of(case.layout, case.granularity, there)
    found = []
    for delta in case.deltas:
        changed = np.zeros_like(delta)
        changed[there] = np.where((random.random(group.max() + 1) < share)[group], 0, delta[there])
        found.append(changed)
    return found


def _learned(case: Case, deltas: list[NDArray[np.float32]]) -> SignState:
    state = SignState.empty(case.layout, case.granularity)
    for task, delta in enumerate(deltas):
        state = signs.with_sizes(signs.unify(state, f"task{task}", delta), f"task{task}", delta)
    return state


def _example(rows: int = 64, length: int = 256) -> tuple[Layout, NDArray[np.float32]]:
    """A tensor whose second half of rows is zero."""
    layout = Layout.of({"w": np.zeros((rows, length), np.float32)})
    delta = np.random.default_rng(0).normal(size=(rows, length)) * np.geomspace(0.1, 10, rows)[:, None]
    delta[rows // 2 :] = 0
    return layout, delta.astype(np.float32).reshape(-1)


def _error(state: SignState, task: str, delta: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(signs.reconstruct(state, task) - delta) / np.linalg.norm(delta))


@given(cases(of=SIGNED), st.integers(0, 2**32 - 1))
@quick
def test_a_task_never_takes_more_than_a_bit_a_parameter(case: Case, seed: int) -> None:
    state = _learned(case, _with_zeros(case, np.random.default_rng(seed)))
    size = lengths(case.layout, case.granularity)
    assert size.sum() == case.layout.parameters
    for task in state.tasks:
        touched = task.rescalers != 0
        assert size[touched].sum() + size[task.sizes.groups].sum() <= case.layout.parameters
        assert not (task.sizes.groups & ~touched).any(), "a row of zeros needs no bit at all"
        stored = signs_stored.objects(state)[f"signs-{task.uid}"]
        bits = stored["signs"].nbytes + stored["large"].nbytes
        assert bits <= case.layout.parameters // 8 + 2 * len(case.layout.entries), "each tensor from a byte on"


@given(cases(of=SIGNED), st.integers(0, 2**32 - 1), st.booleans())
@quick
def test_what_is_stored_comes_back_equal(case: Case, seed: int, rescaled: bool) -> None:
    state = _learned(case, _with_zeros(case, np.random.default_rng(seed)))
    if rescaled:
        own = state.tasks[0].rescalers
        state = signs.with_rescalers(state, "task0", own * np.random.default_rng(seed).uniform(0.5, 2, own.shape))
    back = signs_stored.load(case.layout, case.granularity, signs_stored.objects(state))
    there = np.concatenate([np.arange(entry.offset, entry.stop) for entry in case.layout.entries])
    for name in state.names:
        whole = signs.reconstruct(state, name)
        assert signs.reconstruct(back, name).tobytes() == whole.tobytes()
        assert signs.reconstruct(state, name, threads=1).tobytes() == whole.tobytes()
        assert signs.values_at(back, name, there).tobytes() == whole[there].tobytes()
        assert not np.delete(whole, there).any(), "padding stays 0"


@given(cases(of=("row", "tensor"), fewest=2), st.integers(0, 2**32 - 1))
@quick
def test_rows_with_a_second_bit_need_no_other_task(case: Case, seed: int) -> None:
    deltas = _with_zeros(case, np.random.default_rng(seed))
    there = np.concatenate([np.arange(entry.offset, entry.stop) for entry in case.layout.entries])
    group = group_of(case.layout, case.granularity, there)
    alone, among = _learned(case, deltas[:1]), _learned(case, deltas)
    second = among.tasks[0].sizes.groups[group]
    first, later = (signs.reconstruct(state, "task0")[there] for state in (alone, among))
    assert np.array_equal(first[second], later[second])


def test_it_is_closer_to_the_delta_than_one_bit_and_other_tasks_magnitudes() -> None:
    layout, delta = _example()
    other = np.random.default_rng(1).normal(size=layout.total).astype(np.float32)
    one = signs.unify(signs.unify(SignState.empty(layout, "row"), "other", other), "own", delta)
    two = signs.with_sizes(one, "own", delta)
    assert two.tasks[-1].sizes.groups.sum() == 32, "the other half of the rows has room for one more bit each"
    assert _error(one, "own", delta) > 0.4 and _error(two, "own", delta) < 0.37
    assert two.tasks[0].sizes.groups.sum() == 0
    assert signs.reconstruct(two, "other").tobytes() == signs.reconstruct(one, "other").tobytes()


def test_the_largest_rows_get_it_where_not_all_can() -> None:
    layout, delta = _example()
    delta = delta.reshape(64, 256).copy()
    delta[32:56] = 1e-3  # eight rows of zeros are left
    delta = delta.reshape(-1)
    state = signs.with_sizes(signs.unify(SignState.empty(layout, "row"), "own", delta), "own", delta)
    assert np.flatnonzero(state.tasks[0].sizes.groups).tolist() == list(range(24, 32))


def test_the_two_levels_are_the_best_two() -> None:
    layout, delta = _example()
    state = signs.with_sizes(signs.unify(SignState.empty(layout, "row"), "own", delta), "own", delta)
    r = state.tasks[0].rescalers[:32, None].astype(np.float64)
    scaled, weight = np.abs(delta.reshape(64, 256)[:32]) / r, np.broadcast_to(r * r, (32, 256))
    least = np.inf
    for border in np.linspace(0.1, 4, 400):
        error = 0.0
        for side in (scaled < border, scaled >= border):
            if side.any():
                level = np.average(scaled[side], weights=weight[side])
                error += float((weight[side] * (scaled[side] - level) ** 2).sum())
        least = min(least, error)
    assert _error(state, "own", delta) ** 2 * float((delta.astype(np.float64) ** 2).sum()) <= 1.001 * least


def test_without_rows_of_zeros_nothing_changes() -> None:
    layout, _ = _example()
    delta = np.random.default_rng(0).normal(size=layout.total).astype(np.float32)
    state = signs.unify(SignState.empty(layout, "row"), "own", delta)
    same = signs.with_sizes(state, "own", delta)
    assert signs.reconstruct(same, "own").tobytes() == signs.reconstruct(state, "own").tobytes()
    assert signs_stored.objects(same)["signs-0"]["large"].size == 0


def test_values_of_equal_size_come_back_exactly() -> None:
    layout, delta = _example()
    delta = np.sign(delta).astype(np.float32) * np.float32(0.25)
    state = signs.with_sizes(signs.unify(SignState.empty(layout, "row"), "own", delta), "own", delta)
    assert np.array_equal(signs.reconstruct(state, "own"), delta)


@pytest.mark.parametrize("array", ["signs", "large", "sized", "rescalers", "levels", "shift"])
def test_objects_that_do_not_fit_are_refused_by_name(array: str) -> None:
    layout, delta = _example()
    state = signs.with_sizes(signs.unify(SignState.empty(layout, "row"), "own", delta), "own", delta)
    stored = signs_stored.objects(state)
    stored["signs-0"][array] = stored["signs-0"][array][:-1]
    with pytest.raises(FusionError, match="signs-0"):
        signs_stored.load(layout, "row", stored)


def test_a_delta_of_another_length_is_refused() -> None:
    layout, delta = _example()
    state = signs.unify(SignState.empty(layout, "row"), "own", delta)
    with pytest.raises(FusionError, match="shape"):
        signs.with_sizes(state, "own", delta[:-1])
