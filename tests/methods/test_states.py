"""What systems keep of their tasks: every state survives a store, refuses rubbish, and forgets one task alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from condu_ray.config import SessionConfig
from condu_ray.errors import FusionError
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.reconstruct import fidelity
from condu_ray.methods import registry
from condu_ray.methods.protocol import TaskState
from condu_ray.methods.states import PROBE_COUNT, FusedState, SeparateState

Settings = Callable[..., SessionConfig]

LAYOUT = Layout.of({"weight": np.zeros((6, 50), np.float32), "bias": np.zeros(70, np.float32)})

KINDS: dict[str, dict[str, Any]] = {
    "condu": {"method": "condu"},
    "condu l1": {"method": "condu", "fusion__granularity": "l1"},
    "lora": {"method": "condu-lora"},
    "lora exact": {"method": "condu-lora", "lora__mode": "exact"},
    "finetune": {"method": "finetune"},
    "sequential": {"method": "sequential"},
    "wise-ft": {"method": "wise-ft"},
    "zero-shot": {"method": "zero-shot"},
}
KEEPS_DELTAS = [kind for kind in KINDS if kind not in ("sequential", "wise-ft", "zero-shot")]
TRAINS = [kind for kind in KINDS if kind != "zero-shot"]


class System:
    """One kind of state: how it starts, and how it comes back from a store."""

    def __init__(self, config: SessionConfig) -> None:
        self._method, self._config = registry.get(config.method), config

    def empty(self) -> TaskState:
        return self._method.empty(LAYOUT, self._config)

    def stored(self, state: TaskState) -> TaskState:
        """As it comes back: meta through JSON, arrays read-only, among objects that are not its own."""
        objects = {name: {key: each.copy() for key, each in arrays.items()} for name, arrays in state.objects().items()}
        for arrays in objects.values():
            for array in arrays.values():
                array.flags.writeable = False
        return self._method.load(LAYOUT, self._config, json.loads(json.dumps(state.meta())), objects)

    def loaded(self, meta: dict[str, Any], objects: Any) -> TaskState:
        return self._method.load(LAYOUT, self._config, meta, objects)


@pytest.fixture
def system(kind: str, settings: Settings) -> System:
    return System(settings(**KINDS[kind]))


def delta(number: int) -> np.ndarray:
    """A delta in layout order; padding is zero."""
    random = np.random.default_rng(number)
    draw = {entry.name: random.standard_normal(entry.shape).astype(np.float32) for entry in LAYOUT.entries}
    return LAYOUT.flatten(draw)


def same(one: TaskState, other: TaskState) -> bool:
    """Whether two states keep the same, to the bit."""
    return one.tasks == other.tasks and one.meta() == other.meta() and written(one) == written(other)


def written(state: TaskState) -> dict[tuple[str, str], tuple[str, bytes]]:
    """(object, array) -> (dtype, bytes)."""
    return {
        (name, key): (str(array.dtype), array.tobytes())
        for name, arrays in state.objects().items()
        for key, array in arrays.items()
    }


def answers(state: TaskState) -> dict[str, bytes | None]:
    found = {task: state.delta(task) for task in state.tasks}
    return {task: None if each is None else each.tobytes() for task, each in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_stand_in_the_order_learned_and_states_never_change(system: System) -> None:
    first = system.empty().add("b", delta(1))
    before, meta = answers(first), first.meta()
    second = first.add("a", delta(2))
    assert second.tasks == ("b", "a")
    assert first.tasks == ("b",)
    assert answers(first) == before
    assert first.meta() == meta


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_a_state_comes_back_from_a_store_and_goes_on_the_same(system: System, tasks: int) -> None:
    state = system.empty()
    for number in range(tasks):
        state = state.add(f"task{number}", delta(number))
    back = system.stored(state)
    assert same(back, state)
    assert answers(back) == answers(state)
    assert same(back.add("later", delta(9)), state.add("later", delta(9)))
    if tasks:
        assert same(back.forget("task0"), state.forget("task0"))
        forgotten = state.forget("task0")
        assert same(system.stored(forgotten), forgotten)
        assert same(system.stored(forgotten).add("task0", delta(5)), forgotten.add("task0", delta(5)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_name_never_stands_for_other_bytes(system: System) -> None:
    """A store writes an object once: learning, forgetting and learning again must not reuse a name."""
    state, seen = system.empty(), dict[tuple[str, str], tuple[str, bytes]]()
    steps = ["+a", "+b", "-a", "+a", "-b", "-a", "+b"]
    for number, (way, task) in enumerate(steps):
        state = state.add(task, delta(number)) if way == "+" else state.forget(task)
        for name, body in written(state).items():
            assert seen.setdefault(name, body) == body, (steps[: number + 1], name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_taken_is_refused(system: System) -> None:
    state = system.empty().add("cats", delta(0))
    with pytest.raises(FusionError, match=r"task 'cats' is in the (fused )?state already"):
        state.add("cats", delta(1))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_task_is_refused_and_the_nearest_offered(system: System) -> None:
    state = system.empty().add("flowers", delta(0))
    for ask in (state.delta, state.forget):
        with pytest.raises(FusionError, match=r"task 'flower' is not in the .*did you mean flowers\?"):
            ask("flower")


@pytest.mark.parametrize("kind", TRAINS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_delta_that_is_not_finite_is_refused(system: System, bad: float) -> None:
    spoilt = delta(0)
    spoilt[7] = bad
    state = system.empty().add("good", delta(1))
    before = answers(state)
    with pytest.raises(FusionError, match=r"(finite|NaN)"):
        state.add("bad", spoilt)
    assert answers(state) == before


@pytest.mark.parametrize("kind", TRAINS)
def test_a_delta_of_another_layout_is_refused(system: System) -> None:
    with pytest.raises(FusionError, match="layout"):
        system.empty().add("short", delta(0)[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_leaves_the_others_bit_for_bit(system: System) -> None:
    state = system.empty()
    for number, task in enumerate("abc"):
        state = state.add(task, delta(number))
    left = state.forget("b")
    assert left.tasks == ("a", "c")
    assert answers(left) == {task: each for task, each in answers(state).items() if task != "b"}


@pytest.mark.parametrize("kind", KEEPS_DELTAS)
def test_a_single_task_keeps_its_own_delta(system: System, kind: str) -> None:
    found = system.empty().add("only", delta(3)).delta("only")
    assert found.dtype == np.float32
    if kind == "lora exact":
        assert np.array_equal(found, delta(3).astype(np.float16).astype(np.float32))
    else:
        np.testing.assert_allclose(found, delta(3), rtol=1e-6)


@pytest.mark.parametrize("kind", ["finetune", "lora exact"])
def test_separate_deltas_do_not_touch_each_other(system: System, kind: str) -> None:
    state = system.empty()
    for number in range(3):
        state = state.add(str(number), delta(number))
    half = kind == "lora exact"
    for number in range(3):
        kept = delta(number).astype(np.float16) if half else delta(number)
        assert np.array_equal(state.delta(str(number)), kept)
    stored = {array.dtype for arrays in state.objects().values() for array in arrays.values()}
    assert stored == {np.dtype(np.float16 if half else np.float32)}


@pytest.mark.filterwarnings("error")
def test_a_delta_beyond_half_precision_is_refused_not_made_infinite() -> None:
    large = delta(0)
    large[3] = 70_000
    with pytest.raises(FusionError, match="task big: its delta exceeds half precision"):
        SeparateState(LAYOUT, half=True).add("big", large)
    assert SeparateState(LAYOUT).add("big", large).delta("big")[3] == 70_000


@pytest.mark.parametrize("kind", ["sequential"])
def test_one_model_answers_all_tasks_with_what_came_last(system: System) -> None:
    state = system.empty().add("a", delta(0)).add("b", delta(1))
    assert np.array_equal(state.delta("a"), delta(1))
    assert len(state.objects()) == 1
    assert np.array_equal(state.forget("b").delta("a"), delta(1)), "what b did to the model cannot be taken out"
    nothing = state.forget("b").forget("a")
    assert nothing.objects() == {}
    assert np.array_equal(system.stored(nothing).add("c", delta(2)).delta("c"), delta(2))


@pytest.mark.parametrize("kind", ["wise-ft"])
def test_one_model_is_averaged_with_the_one_before(system: System) -> None:
    """The base model is the first of them: after two tasks it has a quarter, as the first task has."""
    state = system.empty().add("a", delta(0))
    np.testing.assert_allclose(state.delta("a"), delta(0) / 2, rtol=1e-6)
    state = system.stored(state).add("b", delta(1))
    np.testing.assert_allclose(state.delta("a"), delta(0) / 4 + delta(1) / 2, rtol=1e-5, atol=1e-6)
    assert len(state.objects()) == 1


@pytest.mark.parametrize("kind", ["zero-shot"])
def test_zero_shot_keeps_names_alone(system: System) -> None:
    state = system.empty().add("a", delta(0))
    assert state.delta("a") is None
    assert state.objects() == {}


@pytest.mark.parametrize("kind", ["condu", "condu l1", "lora"])
def test_fidelity_is_told_without_the_deltas(system: System) -> None:
    """From the kept sample, which holds every coordinate of so small a model, after a store as before."""
    state = system.empty()
    for number in range(3):
        state = state.add(str(number), delta(number))
    back = system.stored(state)
    assert isinstance(state, FusedState)
    assert isinstance(back, FusedState)
    for number in range(3):
        exact = fidelity(state.fused, str(number), delta(number))
        for found in (state.fidelity(str(number)), back.fidelity(str(number))):
            assert found.relative_l2 == pytest.approx(exact.relative_l2, rel=1e-6)
            assert found.cosine == pytest.approx(exact.cosine, rel=1e-6)
            assert found.bits_alive == pytest.approx(exact.bits_alive)
        assert 0 < exact.relative_l2 < 1.5
    assert len(state.probes["0"]) == LAYOUT.parameters < PROBE_COUNT


def test_fidelity_of_a_large_model_is_a_sample_of_fixed_size() -> None:
    wide = Layout.of({"weight": np.zeros((500, 400), np.float32)})
    random = np.random.default_rng(0)
    deltas = [random.standard_normal(wide.total).astype(np.float32) for _ in range(2)]
    state = registry.get("condu").empty(wide, SessionConfig(method="condu")).add("a", deltas[0]).add("b", deltas[1])
    assert isinstance(state, FusedState)
    assert {len(probe) for probe in state.probes.values()} == {PROBE_COUNT}
    exact = fidelity(state.fused, "a", deltas[0])
    assert state.fidelity("a").relative_l2 == pytest.approx(exact.relative_l2, abs=0.02)


@pytest.mark.parametrize("kind", TRAINS)
def test_a_missing_object_is_named(system: System) -> None:
    state = system.empty().add("a", delta(0))
    for missing in state.objects():
        objects = {name: arrays for name, arrays in state.objects().items() if name != missing}
        with pytest.raises(FusionError, match=rf"{missing.partition('-')[0]}-.*(missing|needed)"):
            system.loaded(state.meta(), objects)
