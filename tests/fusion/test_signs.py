"""Sign triggers: any order gives the same bits, each row keeps its L1 norm, what is stored comes back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_fusion_properties import Case, cases

from condu_ray.errors import FusionError
from condu_ray.fusion import signs, signs_stored, triggers
from condu_ray.fusion.groups import group_of, groups_of_tensors
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import Fidelity
from condu_ray.fusion.signs import SignState

SIGNED: Any = ("l1", "tensor", "row")
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def _all(case: Case, order: NDArray[np.int64] | None = None) -> SignState:
    state = SignState.empty(case.layout, case.granularity)
    for place in np.arange(len(case.deltas)) if order is None else order:
        state = signs.unify(state, f"task{place}", case.deltas[place])
    return state


def _there(layout: Layout) -> NDArray[np.int64]:
    """Coordinates that are parameters, not padding."""
    return np.concatenate([np.arange(entry.offset, entry.stop) for entry in layout.entries])


def _formula(case: Case, task: int) -> NDArray[np.float64]:
    """The docstring's formulas in float64, without the fixed point; values of the parameters alone."""
    there = _there(case.layout)
    group = group_of(case.layout, case.granularity, there)
    total, count = np.zeros(len(there)), np.zeros(group.max() + 1)
    means = []
    for delta in case.deltas:
        mean = np.bincount(group, np.abs(delta[there]).astype(np.float64)) / np.bincount(group)
        means.append(mean)
        total += np.divide(np.abs(delta[there]), mean[group], out=np.zeros(len(there)), where=mean[group] > 0)
        count += mean > 0
    value = means[task][group] * total / np.maximum(count, 1)[group]
    return np.where(case.deltas[task][there] > 0, value, -value)


@given(cases(of=SIGNED), st.randoms())
@quick
def test_the_order_of_tasks_changes_no_bit(case: Case, random: Any) -> None:
    order = list(range(len(case.deltas)))
    random.shuffle(order)
    first, other = _all(case), _all(case, np.array(order))
    assert np.array_equal(first.magnitudes, other.magnitudes)
    for name in first.names:
        assert signs.reconstruct(first, name).tobytes() == signs.reconstruct(other, name).tobytes()


@given(cases(of=SIGNED))
@quick
def test_it_is_the_formula_to_the_fixed_point(case: Case) -> None:
    state, there = _all(case), _there(case.layout)
    for task in range(len(case.deltas)):
        wanted = _formula(case, task)
        scale = np.abs(case.deltas[task]).max() or 1.0
        found = signs.reconstruct(state, f"task{task}")[there]
        # A summand is rounded to 1 / 65536 and cut at 255 times its row's mean, which these deltas do not reach often.
        cut = any(np.abs(d[there]).max(initial=0) > 200 * np.abs(d[there]).mean() for d in case.deltas)
        if not cut:
            assert np.allclose(found, wanted, rtol=6e-4, atol=scale * 1e-4), "rescalers have 11 bits"


@given(cases(kinds=("heavy",), of=("row",), most=8))
@quick
def test_every_row_keeps_its_l1_norm_whatever_is_learned_later(case: Case) -> None:
    state, there = _all(case), _there(case.layout)
    group = group_of(case.layout, "row", there)
    for task, delta in enumerate(case.deltas):
        was = np.bincount(group, np.abs(delta[there]).astype(np.float64))
        now = np.bincount(group, np.abs(signs.reconstruct(state, f"task{task}")[there]).astype(np.float64))
        assert np.allclose(now, was, rtol=2e-3, atol=0), "to the fixed point: a mean is 65,536 units"


@given(cases(of=SIGNED, most=1))
@quick
def test_a_single_task_comes_back_and_a_row_of_zeros_is_exact(case: Case) -> None:
    state, delta, there = _all(case), case.deltas[0], _there(case.layout)
    found = signs.reconstruct(state, "task0")
    group = group_of(case.layout, case.granularity, there)
    mean = (np.bincount(group, np.abs(delta[there])) / np.bincount(group))[group]
    inside = np.abs(delta[there]) < 250 * mean
    assert (
        np.abs(found[there] - delta[there])[inside] <= 2e-5 * mean[inside] + 5e-4 * np.abs(delta[there][inside])
    ).all()
    assert not found[there][mean == 0].any()
    assert not np.delete(found, there).any(), "padding stays 0"
    assert not np.signbit(found[found == 0]).any(), "no -0.0"


@given(cases(of=SIGNED, most=6, fewest=2), st.data())
@quick
def test_forgetting_a_task_leaves_the_others_as_they_are(case: Case, data: Any) -> None:
    state = _all(case)
    gone = data.draw(st.sampled_from(state.names))
    rest = signs.forget(state, gone)
    assert gone not in rest.names
    for name in rest.names:
        assert signs.reconstruct(rest, name).tobytes() == signs.reconstruct(state, name).tobytes()
    again = signs.unify(rest, gone, case.deltas[0])
    assert again.tasks[-1].uid == state.next_uid, "a number is never used again"


@given(cases(of=SIGNED, most=5), st.data())
@quick
def test_other_rescalers_change_one_task_alone(case: Case, data: Any) -> None:
    """Each group of its reconstruction is multiplied, however the state is stored and whatever is learned later."""
    state, there = _all(case), _there(case.layout)
    changed = data.draw(st.sampled_from(state.names))
    own = state.tasks[state.position(changed)].rescalers
    factors = np.exp2(np.arange(len(own)) % 5 - 2).astype(np.float32)
    other = signs.with_rescalers(state, changed, own * factors)
    assert (other.magnitudes is state.magnitudes, other.next_uid) == (True, state.next_uid)
    for name in state.names:
        was, now = signs.reconstruct(state, name), signs.reconstruct(other, name)
        if name == changed:
            group = group_of(case.layout, case.granularity, there)
            assert np.allclose(now[there], was[there] * factors[group], rtol=1e-6, atol=1e-36)
        else:
            assert now.tobytes() == was.tobytes()
    back = signs.unify(
        signs_stored.load(case.layout, case.granularity, signs_stored.objects(other)), "more", case.deltas[0]
    )
    more = signs.unify(other, "more", case.deltas[0])
    assert signs.reconstruct(back, changed).tobytes() == signs.reconstruct(more, changed).tobytes()
    for own_groups, entry in zip(groups_of_tensors(case.layout, case.granularity), case.layout.entries, strict=True):
        inside = (there >= entry.offset) & (there < entry.stop)
        used = group_of(case.layout, case.granularity, there[inside])
        assert np.array_equal(np.unique(used), np.arange(own_groups.start, own_groups.stop))


def test_rescalers_that_do_not_fit_are_refused() -> None:
    layout = Layout.of({"w": np.zeros((2, 3), np.float32)})
    delta = np.ones(layout.total, np.float32)
    state = signs.unify(SignState.empty(layout, "row"), "one", delta)
    with pytest.raises(FusionError, match=r"'one': rescalers of shape \(3,\), its state has \(2,\)"):
        signs.with_rescalers(state, "one", np.ones(3))
    with pytest.raises(FusionError, match="NaN"):
        signs.with_rescalers(state, "one", np.array([1, np.nan]))
    with pytest.raises(FusionError, match="not in the fused state"):
        signs.with_rescalers(state, "two", np.ones(2))
    masks = triggers.unify(triggers.empty(layout, "row", "mask"), "one", delta)
    with pytest.raises(FusionError, match=r"masks follow from the deltas' norms.*sign triggers"):
        triggers.with_rescalers(masks, "one", np.ones(2))


@given(cases(of=SIGNED, most=6), st.booleans())
@quick
def test_what_is_stored_comes_back_equal(case: Case, drop: bool) -> None:
    state = _all(case)
    if drop and len(state.tasks) > 1:
        state = signs.forget(state, state.names[0])
    back = signs_stored.load(case.layout, case.granularity, signs_stored.objects(state))
    assert json.loads(json.dumps(signs_stored.meta(back))) == signs_stored.meta(state)
    for name in state.names:
        assert signs.reconstruct(back, name).tobytes() == signs.reconstruct(state, name).tobytes()
    more = case.deltas[0] * np.float32(0.5)
    assert np.array_equal(signs.unify(back, "more", more).magnitudes, signs.unify(state, "more", more).magnitudes)


@given(cases(of=SIGNED, most=5))
@quick
def test_values_at_some_coordinates_are_those_of_the_whole(case: Case) -> None:
    state, there = _all(case), _there(case.layout)
    some = there[:: max(1, len(there) // 50)]
    for task, delta in enumerate(case.deltas):
        whole = signs.reconstruct(state, f"task{task}")
        assert signs.values_at(state, f"task{task}", some).tobytes() == whole[some].tobytes()
        found = triggers.fidelity_at(state, f"task{task}", there, delta[there])
        wide = delta[there].astype(np.float64)
        norm = np.linalg.norm(wide)
        if norm:
            assert found.relative_l2 == pytest.approx(np.linalg.norm(wide - whole[there]) / norm, rel=1e-6)
            assert found.bits_alive == 1
        else:
            assert found == Fidelity(0.0, 1.0, 1.0)


def test_one_bit_a_parameter_and_two_bytes_a_row_are_all_that_a_task_adds() -> None:
    layout = Layout.of({"w": np.zeros((64, 768), np.float32)})
    rng = np.random.default_rng(0)
    state = SignState.empty(layout, "row")
    for task in range(3):
        state = signs.unify(state, f"task{task}", rng.normal(size=layout.total).astype(np.float32))
    own = signs_stored.objects(state)["signs-1"]
    small = 8 + 8 + 4 + 8  # which rows have bits, which have two, the power of two, the tensor's levels
    assert sum(array.nbytes for array in own.values()) == layout.total // 8 + 2 * 64 + small


@pytest.mark.parametrize(
    ("delta", "says"),
    [(np.zeros(3, np.float32), "has shape"), (np.full(64, np.nan, np.float32), "NaN"), (np.full(64, 1e30), "w")],
)
def test_what_cannot_be_learned_is_refused(delta: NDArray[Any], says: str) -> None:
    layout = Layout.of({"w": np.zeros((8, 8), np.float32)})
    with pytest.raises(FusionError, match=says):
        signs.unify(SignState.empty(layout, "row"), "task", delta)


def test_names_granularities_and_the_number_of_tasks_are_checked() -> None:
    layout = Layout.of({"w": np.zeros((2, 2), np.float32)})
    with pytest.raises(FusionError, match="tensor_mean"):
        SignState.empty(layout, "tensor_mean")
    delta = np.ones(layout.total, np.float32)
    state = signs.unify(SignState.empty(layout, "row"), "one", delta)
    with pytest.raises(FusionError, match="already"):
        signs.unify(state, "one", delta)
    with pytest.raises(FusionError, match="not in the fused state"):
        signs.reconstruct(state, "two")
    for task in range(1, signs.MOST_TASKS):
        state = signs.unify(state, f"task{task}", 255 * delta)
    assert np.allclose(signs.reconstruct(state, "one")[:2], 1, rtol=1e-4), "256 tasks fit"
    with pytest.raises(FusionError, match="256"):
        signs.unify(state, "one more", delta)


def test_a_state_made_otherwise_is_refused() -> None:
    layout = Layout.of({"w": np.zeros((2, 2), np.float32)})
    stored = signs_stored.objects(signs.unify(SignState.empty(layout, "row"), "one", np.ones(layout.total, np.float32)))
    with pytest.raises(FusionError, match="granularity"):
        signs_stored.load(layout, "tensor", stored)
    del stored["signs-0"]
    with pytest.raises(FusionError, match="signs-0"):
        signs_stored.load(layout, "row", stored)


def test_rescalers_are_rounded_once() -> None:
    """Also where the largest rounds up to a power of two: what is stored is what was in memory."""
    for largest in (1 - 2.0**-12, 1 - 2.0**-13, 1.0, 1 - 2.0**-11):
        once = signs.unhalved(*signs.halves(np.array([largest, 3 * 2.0**-39, 0.0], np.float32)))
        assert once.tobytes() == signs.unhalved(*signs.halves(once)).tobytes()
