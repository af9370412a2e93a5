"""Every system that is offered can be had, and follows the protocol."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from condu_ray.catalogue import METHODS, info
from condu_ray.config import SessionConfig
from condu_ray.errors import ConfigError, TrainingError
from condu_ray.fusion.layout import Layout
from condu_ray.methods import registry
from condu_ray.methods.protocol import Method
from condu_ray.models.clip import Clip

Settings = Callable[..., SessionConfig]
EVERY = pytest.mark.parametrize("name", METHODS)
FUNCTIONS = [name for name, each in vars(Method).items() if inspect.isfunction(each) and not name.startswith("_")]


def test_the_protocol_is_what_is_looked_at() -> None:
    assert FUNCTIONS == ["layout", "empty", "load", "prepare", "expert", "adapter", "head"]


@EVERY
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_system_has_every_function_of_the_protocol(name: str, function: str) -> None:
    found = inspect.signature(getattr(registry.get(name), function))
    promised = inspect.signature(getattr(Method, function))
    assert list(found.parameters) == list(promised.parameters)[1:]


@EVERY
def test_every_system_is_told_in_a_line(name: str) -> None:
    found = info(name)
    assert found.name == name
    assert 10 < len(found.summary) < 100
    assert found.source


def test_an_unknown_system_offers_the_nearest() -> None:
    for call in (registry.get, info):
        with pytest.raises(ConfigError, match=r"no method 'condoo': did you mean condu\?"):
            call("condoo")


def test_reading_the_list_imports_no_torch() -> None:
    code = (
        "import sys; from condu_ray.catalogue import METHODS; import condu_ray.methods.registry; assert METHODS; "
        "print([name for name in ('torch', 'ray', 'open_clip', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@EVERY
def test_every_system_has_a_layout_that_a_store_can_hold(name: str, tiny_clip: Clip, settings: Settings) -> None:
    config = settings(method=name)
    method = registry.get(name)
    layout = method.layout(tiny_clip, config)
    assert Layout.from_json(layout.to_json()) == layout
    assert method.empty(layout, config).tasks == ()
    assert method.layout(tiny_clip, settings(method=name, seed=7)) == layout


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if each.trains and not each.on_features])
def test_what_is_prepared_is_the_base_model_and_its_own_copy(name: str, tiny_clip: Clip, settings: Settings) -> None:
    config = settings(method=name)
    method = registry.get(name)
    layout = method.layout(tiny_clip, config)
    model, trained = method.prepare(tiny_clip, layout, config, None)
    assert list(trained) == [entry.name for entry in layout.entries]
    learns = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learns == {id(parameter) for parameter in trained.values()}
    assert learns.isdisjoint(id(parameter) for parameter in tiny_clip.model.parameters())
    nothing = method.expert(tiny_clip, layout, config, np.zeros(layout.total, np.float32))
    for override, tensor in nothing.items():
        assert np.array_equal(tensor, tiny_clip.model.get_parameter(override)), override


def test_zero_shot_trains_nothing(tiny_clip: Clip, settings: Settings) -> None:
    config = settings(method="zero-shot")
    method = registry.get("zero-shot")
    layout = method.layout(tiny_clip, config)
    with pytest.raises(TrainingError, match="zero-shot does not train"):
        method.prepare(tiny_clip, layout, config, None)
    assert method.expert(tiny_clip, layout, config, np.zeros(layout.total, np.float32)) == {}


def test_adapters_come_from_the_seed_that_the_store_fixed_not_from_the_sessions(
    tiny_clip: Clip, settings: Settings
) -> None:
    """Two sessions with another --seed must share A⁰: without it the experts of the first are lost."""
    lora = registry.get("condu-lora")
    one = settings(method="condu-lora", seed=1)
    layout = lora.layout(tiny_clip, one)
    delta = np.random.default_rng(0).standard_normal(layout.total).astype(np.float32)
    found = lora.expert(tiny_clip, layout, one, delta)
    same = lora.expert(tiny_clip, layout, settings(method="condu-lora", seed=2), delta)
    other = lora.expert(tiny_clip, layout, settings(method="condu-lora", seed=1, lora__seed=1), delta)
    assert all(np.array_equal(tensor, same[name]) for name, tensor in found.items())
    assert not any(np.array_equal(tensor, other[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("mode", "sides"), [("shared_a", {"B"}), ("factors", {"A", "B"}), ("exact", {"A", "B"})])
def test_the_lora_mode_decides_which_factors_are_kept(
    tiny_clip: Clip, settings: Settings, mode: str, sides: set[str]
) -> None:
    config = settings(method="condu-lora", lora__mode=mode)
    layout = registry.get("condu-lora").layout(tiny_clip, config)
    assert {entry.name[-1] for entry in layout.entries} == sides
    assert len(layout.entries) == 8 * len(sides)
