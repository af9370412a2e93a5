"""Sessions in a row: what is stored and loaded, what is forgotten, what is refused, what is warned of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from condu_ray.config import Granularity
from condu_ray.errors import FusionError
from condu_ray.fusion.forget import forget
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import reconstruct
from condu_ray.fusion.state import FusionState, Objects, load, meta, objects
from condu_ray.fusion.unify import EmptyTrigger, unify

LAYOUT = Layout.of(
    {"weight": np.zeros((30, 11), np.float32), "bias": np.zeros(30, np.float32), "scale": np.zeros((), np.float32)}
)
GRANULARITIES: tuple[Granularity, ...] = ("l1", "tensor_mean", "tensor", "row")


def delta(seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return LAYOUT.flatten({e.name: rng.standard_normal(e.shape) for e in LAYOUT.entries})


def learned(granularity: Granularity, *seeds: int) -> FusionState:
    state = FusionState.empty(LAYOUT, granularity)
    for seed in seeds:
        state = unify(state, f"t{seed}", delta(seed))
    return state


def stored(state: FusionState) -> Objects:
    """A copy as it would come back from a file: read-only."""
    found = {name: {key: array.copy() for key, array in arrays.items()} for name, arrays in objects(state).items()}
    for arrays in found.values():
        for array in arrays.values():
            array.flags.writeable = False
    return found


def same(one: FusionState, other: FusionState) -> None:
    first, second = objects(one), objects(other)
    assert first.keys() == second.keys()
    for name, arrays in first.items():
        for key, array in arrays.items():
            assert array.dtype == second[name][key].dtype
            assert array.tobytes() == second[name][key].tobytes(), f"{name}: {key}"
    whole = slice(0, one.layout.total // 8)
    assert one.planes.masks(whole).tobytes() == other.planes.masks(whole).tobytes()
    assert meta(one) == meta(other)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_going_on_after_a_load_is_as_if_never_stopped(granularity: Granularity) -> None:
    stopped = never = FusionState.empty(LAYOUT, granularity)
    for seed in range(10):
        stopped = load(LAYOUT, granularity, stored(stopped))
        stopped, never = unify(stopped, f"t{seed}", delta(seed)), unify(never, f"t{seed}", delta(seed))
        if seed == 5:
            stopped, never = forget(load(LAYOUT, granularity, stored(stopped)), "t2"), forget(never, "t2")
        same(stopped, never)
    same(load(LAYOUT, granularity, stored(stopped)), never)


def test_a_name_means_the_same_bytes_along_a_lineage() -> None:
    steps: list[Callable[[FusionState], FusionState]] = [
        lambda s: unify(s, "a", delta(1)),
        lambda s: unify(s, "b", delta(2)),
        lambda s: unify(s, "c", delta(3)),
        lambda s: forget(s, "a"),
        lambda s: forget(s, "c"),
        lambda s: unify(s, "a", delta(4)),
        lambda s: forget(s, "b"),
        lambda s: forget(s, "a"),
        lambda s: unify(s, "d", delta(5)),
    ]
    state, seen = FusionState.empty(LAYOUT, "row"), dict[str, dict[str, bytes]]()
    for step in steps:
        state = step(state)
        for name, arrays in objects(state).items():
            held = {key: array.tobytes() for key, array in arrays.items()}
            assert seen.setdefault(name, held) == held, name
        same(load(LAYOUT, "row", stored(state)), state)


def test_what_a_session_stores_is_small_and_named_by_its_uid() -> None:
    first, second = learned("tensor", 0, 1), learned("tensor", 0, 1, 2)
    assert objects(FusionState.empty(LAYOUT, "tensor")) == {}
    assert sorted(objects(second).keys() - objects(first).keys()) == ["birth-2", "flips-2", "rescalers-2", "u-2"]
    assert objects(second)["birth-2"]["birth"].nbytes * 8 == LAYOUT.total
    assert objects(second)["rescalers-2"]["rescalers"].shape == (3, 3)


def test_a_forgotten_task_leaves_its_objects_and_its_uid_is_not_used_again() -> None:
    after = forget(learned("row", 0, 1, 2), "t1")
    assert sorted(objects(after)) == ["birth-0", "birth-2", "flips-1", "flips-2", "rescalers-2-without-1", "u-2"]
    again = unify(after, "t1", delta(1))
    assert [task.uid for task in again.tasks] == [0, 2, 3]
    assert "rescalers-3" in objects(again)
    oldest_gone = forget(after, "t0")
    assert sorted(objects(oldest_gone)) == ["birth-2", "rescalers-2-without-0-1", "u-2"]
    with pytest.raises(FusionError, match="'t7' is not in the fused state"):
        forget(after, "t7")


def test_meta_is_json() -> None:
    state = forget(learned("row", 0, 1), "t0")
    assert json.loads(json.dumps(meta(state))) == {
        "forgotten": [0],
        "granularity": "row",
        "layout": LAYOUT.digest,
        "next_uid": 2,
        "tasks": [{"name": "t1", "uid": 1}],
    }


def test_objects_that_do_not_fit_are_named() -> None:
    state = learned("row", 0, 1)
    other = Layout.of({"weight": np.zeros((30, 11), np.float32)})
    with pytest.raises(FusionError, match="'rescalers-1' was made with layout"):
        load(other, "row", stored(state))
    with pytest.raises(FusionError, match="'rescalers-1' was made with granularity row, not l1"):
        load(LAYOUT, "l1", stored(state))
    for name in objects(state):
        with pytest.raises(FusionError, match=name[:5]):
            load(LAYOUT, "row", {key: arrays for key, arrays in stored(state).items() if key != name})
    short = stored(state)
    short["birth-0"] = {**short["birth-0"], "birth": short["birth-0"]["birth"][:-1]}
    with pytest.raises(FusionError, match=r"'birth-0': birth is uint8\[63\], expected uint8\[64\]"):
        load(LAYOUT, "row", short)
    damaged = stored(state)
    damaged["rescalers-1"] = {**damaged["rescalers-1"], "meta": np.zeros(3, np.uint8)}
    with pytest.raises(FusionError, match="'rescalers-1': its meta cannot be read"):
        load(LAYOUT, "row", damaged)


def refusals() -> list[tuple[str, Any, str]]:
    bad = delta(9)
    bad[LAYOUT.entries[1].offset + 3] = np.nan
    huge = delta(9)
    huge[0] = -np.inf
    return [
        ("t0", delta(1), "'t0' is in the fused state already"),
        ("", delta(1), "needs a name"),
        ("new", delta(1)[:-1], r"shape \(511,\), the layout needs \(512,\)"),
        ("new", delta(1).reshape(2, -1), r"shape \(2, 256\)"),
        ("new", bad, "tensor 'bias' is not finite"),
        ("new", huge, "tensor 'weight' is not finite"),
        ("new", delta(1) * np.float32(1e30), "tensor 'weight' is not finite"),
    ]


@pytest.mark.parametrize(("name", "vector", "message"), refusals())
@pytest.mark.parametrize("granularity", ["l1", "row"])
def test_a_refused_delta_leaves_the_state_as_it_was(
    granularity: Granularity, name: str, vector: Any, message: str
) -> None:
    state = learned(granularity, 0)
    before = stored(state)
    with pytest.raises(FusionError, match=message):
        unify(state, name, vector)
    same(state, load(LAYOUT, granularity, before))


def test_a_session_leaves_the_state_before_it_as_it_was() -> None:
    state = learned("row", 0, 1)
    before = stored(state)
    unify(state, "next", delta(7))
    forget(state, "t0")
    same(state, load(LAYOUT, "row", before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_deltas_are_fused_in_float32(dtype: torch.dtype) -> None:
    half = torch.from_numpy(delta(3)).to(dtype)
    state = unify(learned("row", 0), "half", half)
    assert np.array_equal(state.u, unify(learned("row", 0), "full", half.to(torch.float32).numpy()).u)


def test_a_strided_delta_is_fused_like_its_copy() -> None:
    wide = np.zeros(2 * LAYOUT.total, np.float32)
    wide[::2] = delta(3)
    assert np.array_equal(unify(learned("row", 0), "x", wide[::2]).u, unify(learned("row", 0), "x", delta(3)).u)


def test_a_zero_delta_is_named_in_a_warning() -> None:
    with pytest.warns(EmptyTrigger, match="'nothing' has an empty trigger: its delta is zero everywhere"):
        state = unify(learned("row", 0), "nothing", np.zeros(LAYOUT.total, np.float32))
    assert np.all(state.tasks[1].rescalers == 1)
    assert not reconstruct(state, "nothing").any()


def test_an_outvoted_task_is_named_in_a_warning() -> None:
    strong, weak = delta(0), (delta(0) * np.float32(-0.5))
    with pytest.warns(EmptyTrigger, match="'weak' has an empty trigger: the tasks before it outvoted it everywhere"):
        state = unify(unify(FusionState.empty(LAYOUT, "row"), "strong", strong), "weak", weak)
    assert np.array_equal(reconstruct(state, "strong"), strong)
    assert np.all(state.tasks[1].rescalers == 1)
    with pytest.warns(EmptyTrigger, match="'strong' has an empty trigger: task 'stronger' outvoted") as seen:
        state = unify(state, "stronger", strong * np.float32(-4))
    assert len(seen) == 1  # 'weak' was named before
    assert np.array_equal(reconstruct(state, "stronger"), strong * np.float32(-4))


def test_padding_stays_inert() -> None:
    loud = delta(4)
    loud[LAYOUT.entries[0].stop : LAYOUT.entries[1].offset] = 7
    state = unify(learned("l1", 0), "loud", loud)
    quiet = unify(learned("l1", 0), "loud", delta(4))
    same(state, quiet)
    assert not state.u[LAYOUT.entries[0].stop : LAYOUT.entries[1].offset].any()


def test_underflow_ends_in_no_nan_and_no_negative_zero() -> None:
    tiny = np.full(LAYOUT.total, -1e-45, np.float32)
    state = unify(unify(FusionState.empty(LAYOUT, "l1"), "tiny", tiny), "normal", -delta(1))
    for seed in range(3):
        state = unify(state, f"more{seed}", delta(seed))
    assert np.all(np.isfinite(state.u))
    assert not np.any(np.signbit(state.u) & (state.u == 0))
    assert all(np.all(np.isfinite(reconstruct(state, name))) for name in state.names)


def test_a_task_left_with_next_to_nothing_gets_a_finite_rescaler() -> None:
    layout = Layout.of({"a": np.zeros(2, np.float32)})
    state = FusionState.empty(layout, "l1")
    for name, pair in {"faint": (1e-39, 1), "loud": (1e-39, -5), "after": (1, 1)}.items():
        state = unify(state, name, layout.flatten({"a": np.array(pair)}))
    assert np.array_equal(state.mask("faint")[:2], [True, False])
    assert all(
        np.isfinite(task.rescalers).all() and np.isfinite(reconstruct(state, task.name)).all() for task in state.tasks
    )


def test_unknown_names_are_refused_with_a_hint() -> None:
    with pytest.raises(FusionError, match="granularity 'rows' is unknown: did you mean row"):
        FusionState.empty(LAYOUT, "rows")  # type: ignore[arg-type]
    with pytest.raises(FusionError, match="task 't9' is not in the fused state: known: t0"):
        reconstruct(learned("row", 0), "t9")
