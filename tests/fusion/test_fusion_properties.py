"""What the unifying step promises for any deltas: random cases, half of them on a grid full of exact ties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from condu_ray.config import Granularity
from condu_ray.fusion import reference
from condu_ray.fusion.forget import forget
from condu_ray.fusion.groups import group_of, spans
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import reconstruct
from condu_ray.fusion.state import FusionState
from condu_ray.fusion.unify import Part, fuse, joined, unify

pytestmark = pytest.mark.filterwarnings("ignore::condu_ray.fusion.unify.EmptyTrigger")

F32 = NDArray[np.float32]
GRANULARITIES: tuple[Granularity, ...] = ("l1", "tensor_mean", "tensor", "row")
SHAPES = [(), (1,), (7,), (64,), (130,), (3, 5), (8, 9), (40, 24), (300, 2), (6, 3, 3, 3), (5, 200), (1, 33)]


@dataclass(frozen=True)
class Case:
    layout: Layout
    granularity: Granularity
    deltas: list[F32]


def values(rng: np.random.Generator, kind: str, size: int) -> F32:
    """grid: small integers times 1/4, half of them 0. heavy: Student t(3) with scales and some zeros, no ties."""
    if kind == "grid":
        return (rng.integers(-3, 4, size) * rng.integers(0, 2, size) / 4).astype(np.float32)
    heavy: F32 = (rng.standard_t(3, size) * np.exp(rng.uniform(-11, -2)) * (rng.random(size) > 0.1)).astype(np.float32)
    return heavy


def build(seed: int, kind: str, tasks: int, granularity: Granularity, tensors: int) -> Case:
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), tensors)]
    layout = Layout.of({f"tensor{i}": np.zeros(shape, np.float32) for i, shape in enumerate(shapes)})
    deltas = []
    for _ in range(tasks):
        parts = {e.name: values(rng, kind, e.size).reshape(e.shape) for e in layout.entries}
        if rng.random() < 0.3:  # a task that leaves a tensor alone
            parts[layout.entries[0].name] *= 0
        deltas.append(layout.flatten(parts))
    return Case(layout, granularity, deltas)


def cases(kinds: tuple[str, ...] = ("grid", "heavy"), most: int = 10, fewest: int = 1, of: Any = GRANULARITIES) -> Any:
    return st.builds(
        build,
        st.integers(0, 2**32 - 1),
        st.sampled_from(kinds),
        st.integers(fewest, most),
        st.sampled_from(of),
        st.integers(1, 5),
    )


def given_cases(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    def decorate(test: Any) -> Any:
        quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
        return quick(given(cases(*args, **kwargs))(test))  # type: ignore[no-untyped-call]

    return decorate


def learn(case: Case) -> list[FusionState]:
    """The states before the first session and after each one."""
    states = [FusionState.empty(case.layout, case.granularity)]
    for number, delta in enumerate(case.deltas):
        states.append(unify(states[-1], f"t{number}", delta))
    return states


def last(layout: Layout, granularity: Granularity, deltas: list[F32]) -> FusionState:
    return learn(Case(layout, granularity, deltas))[-1]


def bits(array: F32) -> NDArray[np.uint32]:
    return np.ascontiguousarray(array).view(np.uint32)


def masks(state: FusionState) -> NDArray[np.bool_]:
    return np.array([state.mask(name) for name in state.names], np.bool_).reshape(len(state.tasks), state.layout.total)


def rescalers(state: FusionState) -> F32:
    return np.array([task.rescalers for task in state.tasks])


def spread(state: FusionState, position: int) -> F32:
    """The task's rescaler at every coordinate (1 on padding)."""
    found = np.ones(state.layout.total, np.float32)
    for entry in state.layout.entries:
        here = np.arange(entry.offset, entry.stop)
        found[here] = state.tasks[position].rescalers[group_of(state.layout, state.granularity, here)]
    return found


def election(before: FusionState, delta: F32) -> NDArray[np.float64]:
    """S * u + d, from the definition."""
    share = np.zeros(before.layout.total)
    for position, name in enumerate(before.names):
        share += np.where(before.mask(name), spread(before, position).astype(np.float64), 0)
    return share * before.u.astype(np.float64) + delta.astype(np.float64)


@given_cases(most=1)
def test_01_one_task_is_kept_exactly(case: Case) -> None:
    state, delta = learn(case)[-1], case.deltas[0]
    assert np.array_equal(state.mask("t0"), delta != 0)
    assert np.array_equal(bits(state.u), bits(delta + np.float32(0)))
    assert np.all(rescalers(state) == 1)
    assert np.array_equal(bits(reconstruct(state, "t0")), bits(delta + np.float32(0)))


@given_cases(fewest=2)
def test_02_masks_only_lose_bits(case: Case) -> None:
    states = learn(case)
    for before, after in pairwise(states):
        assert not np.any(masks(after)[:-1] & ~masks(before))


@given_cases()
def test_03_a_set_bit_has_the_sign_of_the_original_delta(case: Case) -> None:
    state = learn(case)[-1]
    for mask, delta in zip(masks(state), case.deltas, strict=True):
        assert np.all(np.sign(state.u[mask]) == np.sign(delta[mask]))
        assert np.all(state.u[mask] != 0)


@given_cases()
def test_04_the_sign_is_elected_by_the_sum(case: Case) -> None:
    states = learn(case)
    for before, after, delta in zip(states, states[1:], case.deltas, strict=False):
        there = after.u != 0
        assert np.array_equal(after.u[there] > 0, election(before, delta)[there] > 0)


@given_cases()
def test_05_the_magnitude_covers_every_value_kept(case: Case) -> None:
    states = learn(case)
    for before, after, delta in zip(states, states[1:], case.deltas, strict=False):
        now = masks(after)
        for position in range(len(before.tasks)):
            assert np.all((np.abs(after.u) >= spread(before, position) * np.abs(before.u))[now[position]])
        assert np.all((np.abs(after.u) >= np.abs(delta))[now[-1]])


@given_cases()
def test_06_the_norm_of_every_reconstruction_is_that_of_the_original(case: Case) -> None:
    state = learn(case)[-1]
    norm = partial(reference.norm, case.layout, case.granularity)
    for name, delta in zip(state.names, case.deltas, strict=True):
        held = norm(state.mask(name).astype(np.float64)) > 0
        restored, original = norm(reconstruct(state, name).astype(np.float64)), norm(delta.astype(np.float64))
        np.testing.assert_allclose(restored[held], original[held], rtol=2e-7)


@given_cases()
def test_07_u_is_zero_exactly_where_no_task_has_a_bit(case: Case) -> None:
    state = learn(case)[-1]
    assert np.array_equal(state.u != 0, masks(state).any(axis=0))


@given_cases()
def test_08_u_is_finite_and_has_no_negative_zero(case: Case) -> None:
    u = learn(case)[-1].u
    assert np.all(np.isfinite(u))
    assert not np.any(np.signbit(u) & (u == 0))


def one_tensor(seed: int, tasks: int, size: int) -> tuple[Layout, list[F32]]:
    rng = np.random.default_rng(seed)
    layout = Layout.of({"only": np.zeros(size, np.float32)})
    return layout, [layout.flatten({"only": values(rng, "heavy", size)}) for _ in range(tasks)]


@pytest.mark.parametrize("seed", range(5))
def test_09_permuted_coordinates_give_permuted_masks(seed: int) -> None:
    layout, deltas = one_tensor(seed, 6, 960)
    order = np.random.default_rng(seed + 100).permutation(960)
    plain, moved = last(layout, "l1", deltas), last(layout, "l1", [delta[order] for delta in deltas])
    assert np.array_equal(masks(plain)[:, order], masks(moved))
    np.testing.assert_allclose(rescalers(moved), rescalers(plain), rtol=2e-7)
    np.testing.assert_allclose(moved.u, plain.u[order], rtol=2e-6)


@given_cases()
def test_10_powers_of_two_scale_exactly(case: Case) -> None:
    plain, scaled = (
        learn(case)[-1],
        last(case.layout, case.granularity, [delta * np.float32(2**-7) for delta in case.deltas]),
    )
    assert np.array_equal(bits(plain.u * np.float32(2**-7)), bits(scaled.u))
    assert np.array_equal(masks(plain), masks(scaled))
    assert np.array_equal(rescalers(plain), rescalers(scaled))


@given_cases(kinds=("heavy",))
def test_10_any_factor_keeps_the_masks(case: Case) -> None:
    plain, scaled = (
        learn(case)[-1],
        last(case.layout, case.granularity, [delta * np.float32(0.3) for delta in case.deltas]),
    )
    assert np.array_equal(masks(plain), masks(scaled))
    np.testing.assert_allclose(rescalers(scaled), rescalers(plain), rtol=1e-5)


@given_cases(kinds=("heavy",))
def test_11_negated_deltas_negate_u(case: Case) -> None:
    plain, negated = learn(case)[-1], last(case.layout, case.granularity, [-delta for delta in case.deltas])
    assert np.array_equal(plain.u, -negated.u)
    assert np.array_equal(masks(plain), masks(negated))
    assert np.array_equal(rescalers(plain), rescalers(negated))


@given_cases(most=1)
def test_11_an_exact_tie_goes_to_the_negative_value(case: Case) -> None:
    delta = case.deltas[0]
    state = last(case.layout, case.granularity, [delta, -delta])
    assert np.array_equal(state.u, -np.abs(delta))
    assert np.array_equal(state.mask("t0"), delta < 0)
    assert np.array_equal(state.mask("t1"), delta > 0)


@given_cases()
def test_12_a_zero_delta_harms_nobody(case: Case) -> None:
    before = learn(case)[-1]
    after = unify(before, "nothing", np.zeros(case.layout.total, np.float32))
    assert np.array_equal(masks(after)[:-1], masks(before))
    assert not after.mask("nothing").any()
    assert np.all(after.tasks[-1].rescalers == 1)
    assert not after.flips[before.next_uid].any()
    if len(before.tasks) == 1:
        assert np.array_equal(bits(after.u), bits(before.u))


@given_cases(most=1)
def test_13_the_same_delta_again_and_again_stays_exact(case: Case) -> None:
    state = last(case.layout, case.granularity, case.deltas * 9)
    assert np.array_equal(state.u, case.deltas[0])
    assert np.all(rescalers(state) == 1)
    for name in state.names:
        assert np.array_equal(reconstruct(state, name), case.deltas[0])


@given_cases(fewest=2)
def test_14_disjoint_deltas_stay_exact(case: Case) -> None:
    owner = np.random.default_rng(0).integers(0, len(case.deltas), case.layout.total)
    deltas = [np.where(owner == number, delta, np.float32(0)) for number, delta in enumerate(case.deltas)]
    state = last(case.layout, case.granularity, deltas)
    assert np.all(rescalers(state) == 1)
    for name, delta in zip(state.names, deltas, strict=True):
        assert np.array_equal(reconstruct(state, name), delta)


@given_cases(fewest=2, most=2)
def test_15_two_tasks_have_no_order(case: Case) -> None:
    one, other = learn(case)[-1], last(case.layout, case.granularity, case.deltas[::-1])
    assert np.array_equal(bits(one.u), bits(other.u))
    assert np.array_equal(masks(one), masks(other)[::-1])
    assert np.array_equal(rescalers(one), rescalers(other)[::-1])


def test_15_three_tasks_have_an_order() -> None:
    layout, deltas = one_tensor(0, 3, 500)
    one, other = last(layout, "l1", deltas), last(layout, "l1", deltas[::-1])
    assert not np.array_equal(masks(one), masks(other)[::-1])


@given_cases()
def test_16_the_new_bit_is_set_where_the_new_value_has_the_elected_sign(case: Case) -> None:
    state, delta = learn(case)[-1], case.deltas[-1]
    assert np.array_equal(masks(state)[-1], (delta != 0) & (np.sign(delta) == np.sign(state.u)))


@given_cases(fewest=2)
def test_17_births_without_later_flips_are_the_masks(case: Case) -> None:
    states = learn(case)
    end = states[-1]
    for task in end.tasks:
        lost = np.zeros_like(task.birth)
        for uid, plane in end.flips.items():
            if uid > task.uid:
                lost |= plane
        assert np.array_equal(task.birth & ~lost, end.mask_plane(task.name))
    for before, after, delta in zip(states[1:], states[2:], case.deltas[1:], strict=False):
        flipped = np.unpackbits(after.flips[before.next_uid], bitorder="little").astype(bool)
        share = election(before, np.zeros_like(delta))
        assert np.all(np.sign(after.u[flipped]) == -np.sign(before.u[flipped]))
        assert np.all(np.sign(delta[flipped]) == -np.sign(before.u[flipped]))
        assert np.all(np.abs(delta[flipped]) >= np.abs(share[flipped]))


@pytest.mark.parametrize("seed", range(5))
def test_18_untouched_coordinates_change_nothing_elsewhere(seed: int) -> None:
    layout, deltas = one_tensor(seed, 5, 700)
    wide = Layout.of({"only": np.zeros(1700, np.float32)})
    places = np.sort(np.random.default_rng(seed).choice(1700, 700, replace=False))
    padded = [np.zeros(wide.total, np.float32) for _ in deltas]
    for target, delta in zip(padded, deltas, strict=True):
        target[places] = delta[:700]
    plain, wider = last(layout, "l1", deltas), last(wide, "l1", padded)
    assert np.array_equal(masks(plain)[:, :700], masks(wider)[:, places])
    np.testing.assert_allclose(wider.u[places], plain.u[:700], rtol=1e-6)
    assert np.count_nonzero(wider.u) == np.count_nonzero(plain.u)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.usefixtures("vehicle")
def test_19_shards_in_any_order_give_the_same_bits(granularity: Granularity) -> None:
    rng = np.random.default_rng(5)
    shapes = {"long": (140_001,), "matrix": (300, 301), "wide": (2, 70_001), "bias": (11,)}
    layout = Layout.of({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    parts = [{e.name: values(rng, "heavy", e.size).reshape(e.shape) for e in layout.entries} for _ in range(3)]
    *first, delta = [layout.flatten(part) for part in parts]
    before = last(layout, granularity, first)
    whole = unify(before, "new", delta)

    pieces = [(span,) for span in spans(layout, granularity, 1)]
    assert len(pieces) > 3
    done: dict[int, Part] = {}
    for index in rng.permutation(len(pieces)):
        done[int(index)] = fuse(before, "new", delta, pieces[index], threads=1)
    joint = joined(before, "new", [done[index] for index in range(len(pieces))])
    every = tuple(spans(layout, granularity, 1))
    threaded = [joined(before, "new", [fuse(before, "new", delta, every, threads=count)]) for count in (1, 3)]
    for several in (joint, *threaded):
        assert np.array_equal(bits(several.u), bits(whole.u))
        assert np.array_equal(masks(several), masks(whole))
        assert np.array_equal(bits(rescalers(several)), bits(rescalers(whole)))
        assert np.array_equal(several.tasks[-1].norms, whole.tasks[-1].norms)
        assert np.array_equal(several.tasks[-1].birth, whole.mask_plane("new"))
    used_up = replace(before, u=before.u.copy())
    assert unify(used_up, "new", delta, out=used_up.u).u is used_up.u
    assert np.array_equal(bits(used_up.u), bits(whole.u))


@given_cases(most=11)
def test_20_the_one_pass_equals_the_dense_formula(case: Case) -> None:
    dense = reference.sessions(case.layout, case.granularity, case.deltas)
    for state, expected in zip(learn(case)[1:], dense, strict=True):
        assert np.array_equal(bits(state.u), bits(expected.u))
        assert np.array_equal(masks(state), expected.masks)
        np.testing.assert_allclose(rescalers(state), expected.rescalers, rtol=1.2e-7)


@pytest.mark.parametrize("tasks", [8, 9, 17])
def test_20_holds_across_borders_of_a_mask_byte(tasks: int) -> None:
    case = build(3, "heavy", tasks, "row", 4)
    expected = reference.sessions(case.layout, "row", case.deltas)[-1]
    state = learn(case)[-1]
    assert np.array_equal(bits(state.u), bits(expected.u))
    assert np.array_equal(masks(state), expected.masks)


@given_cases(fewest=2)
def test_20_carried_norms_are_the_original_ones(case: Case) -> None:
    original = reference.sessions(case.layout, case.granularity, case.deltas)[-1]
    carried = reference.sessions(case.layout, case.granularity, case.deltas, "carried")[-1]
    held = np.array([reference.norm(case.layout, case.granularity, m.astype(np.float64)) > 0 for m in original.masks])
    np.testing.assert_allclose(carried.rescalers[held], original.rescalers[held], rtol=5e-6)


@given_cases(fewest=2)
def test_21_forgetting_leaves_every_other_task_alone(case: Case) -> None:
    state = learn(case)[-1]
    gone = state.names[len(state.names) // 2]
    after = forget(state, gone)
    assert after.names == tuple(name for name in state.names if name != gone)
    for name in after.names:
        assert np.array_equal(bits(reconstruct(state, name)), bits(reconstruct(after, name)))


@given_cases(fewest=2, most=4)
def test_21_after_a_forget_unused_values_of_u_give_way(case: Case) -> None:
    state = learn(case)[-1]
    for name in state.names:
        state = forget(state, name)
    delta = case.deltas[0]
    again = unify(state, "t0", delta)
    assert np.array_equal(reconstruct(again, "t0"), delta)
    assert again.tasks[0].uid == len(case.deltas)
