"""NumPy and machine code are two vehicles of one definition: every array of a state has the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from test_fusion_properties import Case, cases, values

from condu_ray.fusion import kernels, triggers
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.triggers import State

pytestmark = pytest.mark.filterwarnings("ignore::condu_ray.fusion.unify.EmptyTrigger")


@contextmanager
def compiled_from(border: int) -> Iterator[None]:
    before, kernels.COMPILED_FROM = kernels.COMPILED_FROM, border
    try:
        yield
    finally:
        kernels.COMPILED_FROM = before


def learned(case: Case, kind: Any) -> State:
    state = triggers.empty(case.layout, case.granularity, kind)
    for number, delta in enumerate(case.deltas):
        state = triggers.unify(state, f"t{number}", delta)
        state = triggers.with_sizes(state, f"t{number}", delta)
    return state


def restored(state: State) -> dict[str, NDArray[np.float32]]:
    """Every task's reconstruction, and it on top of a vector."""
    found = dict[str, NDArray[np.float32]]()
    for name in state.names:
        found[name], above = triggers.reconstruct(state, name), np.full(state.layout.total, -0.0, np.float32)
        above[1::3] = 0.1
        triggers.add_to(state, name, above)
        found[f"above {name}"] = above
    return found


def same(case: Case, kind: Any) -> None:
    states, vectors = list[State](), list[dict[str, NDArray[np.float32]]]()
    for border in (1 << 62, 0):
        with compiled_from(border):
            states.append(learned(case, kind))
            vectors.append(restored(states[0]))
    numpy, compiled = (triggers.objects(state) for state in states)
    assert numpy.keys() == compiled.keys()
    for name, arrays in numpy.items():
        for key, array in arrays.items():
            assert array.tobytes() == compiled[name][key].tobytes(), f"{name}: {key}"
    for name, vector in vectors[0].items():
        assert vector.tobytes() == vectors[1][name].tobytes(), name


@given(cases(most=19))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_masks(case: Case) -> None:
    same(case, "mask")


@given(cases(most=5, of=("l1", "tensor", "row")))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_signs(case: Case) -> None:
    same(case, "sign")


@pytest.mark.parametrize("granularity", ["l1", "row"])
@pytest.mark.parametrize("kind", ["mask", "sign"])
def test_rows_longer_than_a_tile_and_a_block(granularity: Any, kind: Any) -> None:
    layout = Layout.of({"wide": np.zeros((3, 70_001), np.float32), "rows": np.zeros((301, 301), np.float32)})
    rng = np.random.default_rng(1)
    parts = [{e.name: values(rng, "heavy", e.size).reshape(e.shape) for e in layout.entries} for _ in range(4)]
    same(Case(layout, granularity, [layout.flatten(part) for part in parts]), kind)


def test_a_rescaler_that_rounds_to_zero_still_holds_its_bits() -> None:
    layout = Layout.of({"w": np.zeros((1, 4), np.float32)})
    tiny, huge = np.zeros(layout.total, np.float32), np.zeros(layout.total, np.float32)
    tiny[:2], huge[:2] = [1e-30, 1e-30], [1e20, -1e-31]
    same(Case(layout, "l1", [tiny, huge, -huge, huge]), "mask")
