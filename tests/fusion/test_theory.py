"""The paper's claims on decoupling and unifying again and again, as our reading of them, on random deltas.

Theorem F.3 (our reading): where no vote changes a sign any more, fusing what came back from fusing, again and again,
converges to one set of deltas. Where signs still change with the order, there is no one limit.
Theorem F.5 (our reading): the chance that a session changes an old bit falls towards zero with the number of tasks.
Corollary F.6 (our reading): so does the mean L1 change of an old task's reconstruction, relative to its norm; more
slowly, since the largest magnitude goes on growing.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import reconstruct
from condu_ray.fusion.state import FusionState
from condu_ray.fusion.unify import unify

pytestmark = pytest.mark.filterwarnings("ignore::condu_ray.fusion.unify.EmptyTrigger")

F32 = NDArray[np.float32]
quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def fused(layout: Layout, deltas: list[F32]) -> FusionState:
    state = FusionState.empty(layout, "l1")
    for number, delta in enumerate(deltas):
        state = unify(state, f"t{number}", delta)
    return state


def again(layout: Layout, deltas: list[F32]) -> list[F32]:
    """Every delta as it comes back when all of them are fused."""
    state = fused(layout, deltas)
    return [reconstruct(state, name) for name in state.names]


def distance(one: list[F32], other: list[F32]) -> float:
    """Relative L1 distance."""
    moved = sum(float(np.abs(a - b).sum(dtype=np.float64)) for a, b in zip(one, other, strict=True))
    return moved / sum(float(np.abs(a).sum(dtype=np.float64)) for a in one)


@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
@quick
def test_f3_fusing_what_was_fused_converges(seed: int, tasks: int) -> None:
    """Once each coordinate has one sign (after one round), magnitudes only spread to the largest and then stay."""
    rng = np.random.default_rng(seed)
    layout = Layout.of({"w": np.zeros(2000, np.float32)})
    deltas = [layout.flatten({"w": rng.standard_normal(2000)}) for _ in range(tasks)]
    rounds = [again(layout, deltas)]
    for _ in range(24):
        rounds.append(again(layout, rounds[-1]))
    steps = [distance(one, other) for one, other in pairwise(rounds)]
    for first, last in zip(rounds[0], rounds[-1], strict=True):
        assert np.array_equal(first != 0, last != 0), "no bit is lost after the first round"
    assert steps[-1] < steps[0] / 20
    assert steps[-1] < 1e-3


def test_f3_needs_signs_that_agree() -> None:
    """Deltas that outvote each other by order: the set that comes back depends on it, so there is no one limit."""
    layout = Layout.of({"w": np.zeros(64, np.float32)})
    a, b, c = (layout.flatten({"w": np.full(64, value)}) for value in (1.0, -0.6, -0.6))
    one, other = again(layout, [a, b, c]), again(layout, [b, c, a])
    assert one[0].any()
    assert not other[2].any(), "the same task is kept whole in one order, and outvoted in the other"


@given(st.integers(0, 2**32 - 1))
@quick
def test_f5_and_f6_old_bits_and_values_come_to_rest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = 20_000
    layout = Layout.of({"w": np.zeros(size, np.float32)})
    state = FusionState.empty(layout, "l1")
    changed, moved = list[float](), list[float]()
    for number in range(24):
        before = state
        state = unify(before, f"t{number}", layout.flatten({"w": rng.standard_normal(size)}))
        if number == 0:
            continue
        bits = [(before.mask(name) != state.mask(name)).mean() for name in before.names]
        old = [reconstruct(before, name) for name in before.names]
        changed.append(float(np.mean(bits)))
        moved.append(distance(old, [reconstruct(state, name) for name in before.names]))
    assert np.mean(changed[-4:]) < np.mean(changed[:4]) / 100
    assert changed[-1] < 1e-3
    assert np.mean(moved[-4:]) < np.mean(moved[:4]) / 3
