"""The algebra as a library: docs/fusion.md's example on plain state dicts, and EMR-Merging's formula at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_fusion_properties import Case, bits, given_cases, learn, masks

from condu_ray.errors import FusionError
from condu_ray.fusion import FusionState, Layout, add_to, load, objects, reconstruct, unify, unify_at_once

pytestmark = pytest.mark.filterwarnings("ignore::condu_ray.fusion.unify.EmptyTrigger")
DOCS = Path(__file__).parents[2] / "docs" / "fusion.md"


@pytest.mark.skipif(not DOCS.is_file(), reason="the docs stand in a checkout")
def test_the_example_runs_without_ray_and_open_clip() -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 1
    code = examples[0] + "\nassert {n: e.shape for n, e in expert.items()} == {'weight': (8, 16), 'bias': (8,)}"
    code += "\nimport sys\nassert not {'ray', 'open_clip', 'mlflow', 'numba'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Fidelity(" in done.stdout


@given_cases()
def test_at_once_is_the_published_formula(case: Case) -> None:
    """EMR-Merging: sign of the sum, largest magnitude of that sign, mask where the signs agree, norms kept."""
    deltas = np.array(case.deltas)
    state = unify_at_once(case.layout, case.granularity, {f"t{i}": delta for i, delta in enumerate(case.deltas)})
    sign = np.where(deltas.sum(axis=0, dtype=np.float64) > 0, 1, -1)
    u = sign * np.where(deltas * sign > 0, np.abs(deltas), 0).max(axis=0)
    assert np.array_equal(state.u, u.astype(np.float32))
    assert np.array_equal(masks(state), deltas * u > 0)
    for position, delta in enumerate(case.deltas):
        if case.granularity == "l1" and (deltas[position] * u > 0).any():
            own = np.abs(delta).sum(dtype=np.float64) / np.abs(u * (deltas[position] * u > 0)).sum(dtype=np.float64)
            np.testing.assert_allclose(state.tasks[position].rescalers, own, rtol=1e-6)


@given_cases(most=2)
def test_up_to_two_tasks_at_once_is_one_after_the_other(case: Case) -> None:
    state = unify_at_once(case.layout, case.granularity, {f"t{i}": delta for i, delta in enumerate(case.deltas)})
    turn = learn(case)[-1]
    assert np.array_equal(bits(state.u), bits(turn.u))
    for name in turn.names:
        assert np.array_equal(bits(reconstruct(state, name)), bits(reconstruct(turn, name)))
    back = load(case.layout, case.granularity, objects(state))
    more = case.deltas[0] * np.float32(0.5)
    assert np.array_equal(bits(unify(back, "more", more).u), bits(unify(turn, "more", more).u))


def test_what_cannot_be_unified_at_once_is_refused() -> None:
    layout = Layout.of({"w": np.zeros((8, 8), np.float32)})
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "no delta"),
        ({"a": np.ones(3)}, "'a' has shape"),
        ({"a": np.ones(64), "b": np.full(64, np.nan)}, "tensor 'w' is not finite"),
    ]
    for deltas, message in refused:
        with pytest.raises(FusionError, match=message):
            unify_at_once(layout, "row", deltas)


@given_cases(fewest=2, most=4)
def test_the_base_model_becomes_the_expert_in_place(case: Case) -> None:
    state: FusionState = learn(case)[-1]
    start = np.random.default_rng(0).standard_normal(case.layout.total).astype(np.float32)
    for name in state.names:
        expert = start.copy()
        add_to(state, name, expert)
        assert np.array_equal(bits(expert), bits(start + reconstruct(state, name)))
    with pytest.raises(FusionError, match="out is float64"):
        add_to(state, "t0", start.astype(np.float64))
