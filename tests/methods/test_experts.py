"""From what a state keeps back to a model that answers: an expert is the model that was fine-tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.methods import registry
from condu_ray.methods.experts import Experts, expert_of
from condu_ray.methods.training import Place, Trained, train_task
from condu_ray.models.clip import Clip, Overrides
from condu_ray.models.load import weights_sha256

Settings = Callable[..., SessionConfig]
TEXTS = ["a photo of a red.", "a photo of a blue."]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def fine_tuned(clip: Clip, task: TaskData, config: SessionConfig) -> tuple[Trained, nn.Module]:
    """What training returns, and the very model that was trained."""
    method, kept = registry.get(config.method), list[nn.Module]()
    place = Place(wrap=lambda module: kept.append(module) or module)
    trained = train_task(clip, method, method.layout(clip, config), task, config, place=place)
    return trained, kept[0].get_submodule("model").eval()


def outputs(model: nn.Module, clip: Clip, pixels: Tensor) -> Tensor:
    laid_out = pixels.contiguous(memory_format=torch.channels_last) if clip.channels_last else pixels
    with torch.no_grad():
        images = model.encode_image(laid_out, normalize=True)
        return torch.cat([images, model.encode_text(clip.tokenizer(TEXTS), normalize=True)])


def answers(clip: Clip, expert: Overrides | None, pixels: Tensor) -> Tensor:
    return torch.cat([clip.images(pixels, expert), clip.texts(TEXTS, expert)])


@pytest.mark.parametrize("method", ["condu", "condu-lora"])
def test_an_expert_with_its_own_buffers_is_the_fine_tuned_model(
    conv_clip: Clip, colours: TaskData, settings: Settings, pixels: Tensor, method: str
) -> None:
    config = settings(train__batch_norm="updated", method=method)
    trained, model = fine_tuned(conv_clip, colours, config)
    own = dict(model.named_buffers())
    changed = {name for name in own if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert set(trained.buffers) == changed
    for name, values in trained.buffers.items():
        assert np.array_equal(values, own[name]), name
        assert values.dtype == (np.int64 if name.endswith("num_batches_tracked") else np.float32)
        assert not name.endswith("num_batches_tracked") or values == 4

    layout = registry.get(method).layout(conv_clip, config)
    expert = expert_of(conv_clip, registry.get(method), layout, config, trained.delta, trained.buffers)
    found = answers(conv_clip, expert, pixels)
    torch.testing.assert_close(found, outputs(model, conv_clip, pixels), atol=1e-5, rtol=0)
    without = expert_of(conv_clip, registry.get(method), layout, config, trained.delta, {})
    assert not torch.allclose(found, answers(conv_clip, without, pixels), atol=1e-3), "the buffers matter"
    assert weights_sha256(conv_clip.model) == conv_clip.sha256


def test_a_fused_expert_answers_bit_for_bit_as_a_model_with_its_parameters_and_buffers(
    conv_clip: Clip, colours: TaskData, settings: Settings, pixels: Tensor
) -> None:
    config = settings(train__batch_norm="updated")
    condu = registry.get("condu")
    layout, state, buffers = condu.layout(conv_clip, config), None, {}
    state = condu.empty(layout, config)
    for number, name in enumerate(["first", "second"]):
        trained, _ = fine_tuned(conv_clip, colours, config.model_copy(update={"seed": number}))
        state, buffers[name] = state.add(name, trained.delta), trained.buffers
    experts = Experts(conv_clip, condu, layout, config, state, buffers)
    for name in ("first", "second"):
        model = copy.deepcopy(conv_clip.model)
        delta = layout.views(state.delta(name))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in delta:
                    parameter.copy_(parameter + torch.from_numpy(delta[key].copy()))
            for key, buffer in model.named_buffers():
                if key in buffers[name]:
                    buffer.copy_(torch.from_numpy(np.array(buffers[name][key])))
        assert torch.equal(answers(conv_clip, experts(name), pixels), outputs(model, conv_clip, pixels))
    first, second = (answers(conv_clip, experts(name), pixels) for name in ("first", "second"))
    assert not torch.allclose(first, second, atol=1e-4)


def test_one_model_for_all_tasks_is_made_once_but_for_a_task_with_buffers(
    conv_clip: Clip, colours: TaskData, settings: Settings, pixels: Tensor
) -> None:
    """Stores of earlier releases hold such tasks."""
    config = settings(method="sequential")
    sequential = registry.get("sequential")
    layout = sequential.layout(conv_clip, config)
    trained, _ = fine_tuned(conv_clip, colours, settings(train__batch_norm="updated"))
    state = sequential.empty(layout, config)
    for name in ("first", "second", "third"):
        state = state.add(name, trained.delta)
    experts = Experts(conv_clip, sequential, layout, config, state, {"third": trained.buffers})
    assert experts("first") is experts("second")
    assert torch.equal(
        answers(conv_clip, experts("first"), pixels),
        answers(conv_clip, expert_of(conv_clip, sequential, layout, config, trained.delta, {}), pixels),
    )
    assert torch.equal(
        answers(conv_clip, experts("third"), pixels),
        answers(conv_clip, expert_of(conv_clip, sequential, layout, config, trained.delta, trained.buffers), pixels),
    )
    assert not torch.allclose(*(answers(conv_clip, experts(name), pixels) for name in ("first", "third")), atol=1e-3)

    half = Experts(conv_clip, sequential, layout, config, state, half=True)
    assert half("first") is half("second")
    kinds = {values.dtype for values in half("first").values() if values.dim() > 1}
    assert kinds == {torch.bfloat16}

    condu = registry.get("condu")
    fused = condu.empty(layout, config).add("first", trained.delta).add("second", -trained.delta)
    several = Experts(conv_clip, condu, layout, config.model_copy(update={"method": "condu"}), fused)
    assert not torch.equal(*(answers(conv_clip, several(name), pixels) for name in ("first", "second")))


@pytest.mark.parametrize("method", ["condu", "condu-lora"])
def test_a_tensor_that_two_layers_share_is_trained_and_kept_once(
    tiny_clip: Clip, colours: TaskData, settings: Settings, pixels: Tensor, method: str
) -> None:
    base = copy.deepcopy(tiny_clip.model)
    blocks = base.get_submodule("visual.transformer.resblocks")
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    tied = replace(tiny_clip, model=base)
    config = settings(method=method)
    layout = registry.get(method).layout(tied, config)
    assert sum("mlp.c_fc" in entry.name and entry.name.startswith("visual") for entry in layout.entries) == (
        3 if method == "condu" else 1
    )
    trained, model = fine_tuned(tied, colours, config)
    expert = expert_of(tied, registry.get(method), layout, config, trained.delta, {})
    torch.testing.assert_close(answers(tied, expert, pixels), outputs(model, tied, pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["factors", "exact"])
def test_both_factors_come_back_where_both_are_trained(
    tiny_clip: Clip, colours: TaskData, settings: Settings, pixels: Tensor, mode: str
) -> None:
    config = settings(method="condu-lora", lora__mode=mode)
    lora = registry.get("condu-lora")
    layout = lora.layout(tiny_clip, config)
    trained, model = fine_tuned(tiny_clip, colours, config)
    assert all(change.any() for change in layout.views(trained.delta).values())
    state = lora.empty(layout, config).add("colours", trained.delta)
    experts = Experts(tiny_clip, lora, layout, config, state)
    torch.testing.assert_close(
        answers(tiny_clip, experts("colours"), pixels), outputs(model, tiny_clip, pixels), atol=1e-3, rtol=0
    )


def test_where_nothing_was_trained_the_base_model_answers(tiny_clip: Clip, settings: Settings) -> None:
    config = settings(method="zero-shot")
    method = registry.get("zero-shot")
    layout = method.layout(tiny_clip, config)
    state = method.empty(layout, config).add("colours", np.zeros(layout.total, np.float32))
    assert Experts(tiny_clip, method, layout, config, state)("colours") is None
