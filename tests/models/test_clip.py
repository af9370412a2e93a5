"""θ⁰ and its experts: the features are open_clip's own, and no expert ever writes into θ⁰."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condu_ray.models.clip import Clip, class_embeddings, class_means, expert_overrides
from condu_ray.models.load import weights_sha256

TEXTS = ["a photo of a cat.", "a drawing of a dog.", "art of the sea."]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def delta_of(clip: Clip, scale: float = 0.05) -> dict[str, np.ndarray]:
    """A delta for every parameter, drawn from a fixed seed."""
    random = np.random.default_rng(0)
    return {
        name: np.array(scale * random.standard_normal(tuple(parameter.shape)), np.float32)
        for name, parameter in clip.model.named_parameters()
    }


def moved(clip: Clip, delta: dict[str, np.ndarray]) -> nn.Module:
    """A model of its own whose parameters were set to θ⁰ + delta."""
    model = copy.deepcopy(clip.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter + torch.from_numpy(delta[name]))
    return model


def test_features_are_open_clips_own_and_unit(tiny_clip: Clip, pixels: Tensor) -> None:
    images, texts = tiny_clip.images(pixels), tiny_clip.texts(TEXTS)
    with torch.no_grad():
        assert torch.equal(images, tiny_clip.model.encode_image(pixels, normalize=True))
        assert torch.equal(texts, tiny_clip.model.encode_text(tiny_clip.tokenizer(TEXTS), normalize=True))
    assert torch.allclose(images.norm(dim=1), torch.ones(3))
    assert texts.shape == (3, 32)
    assert not images.requires_grad


def test_more_texts_than_one_batch_keep_their_order(tiny_clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_clip.texts(TEXTS)
    monkeypatch.setattr("condu_ray.models.clip.TEXT_BATCH", 2)
    torch.testing.assert_close(tiny_clip.texts(TEXTS), whole)


def test_the_logit_scale_is_the_exponential_of_the_parameter(tiny_clip: Clip) -> None:
    assert tiny_clip.logit_scale == pytest.approx(1 / 0.07)


def test_class_embeddings_are_the_unit_mean_of_unit_prompts(tiny_clip: Clip) -> None:
    prompts = [["a photo of a cat.", "a drawing of a cat."], ["a photo of a dog."]]
    cats, dogs = (tiny_clip.texts(texts) for texts in prompts)
    mean = (cats[0] + cats[1]) / 2
    torch.testing.assert_close(class_means(tiny_clip, prompts), torch.stack([mean, dogs[0]]))
    torch.testing.assert_close(class_embeddings(tiny_clip, prompts), torch.stack([mean / mean.norm(), dogs[0]]))
    assert mean.norm() < 0.99999  # so that the test tells the two apart


@pytest.mark.parametrize("fixture", ["tiny_clip", "conv_clip"])
def test_an_expert_answers_bit_for_bit_as_a_model_that_holds_its_parameters(
    fixture: str, request: pytest.FixtureRequest, pixels: Tensor
) -> None:
    clip: Clip = request.getfixturevalue(fixture)
    delta = delta_of(clip)
    model = moved(clip, delta)
    expert = expert_overrides(clip, delta)
    before = weights_sha256(clip.model)
    images, texts = clip.images(pixels, expert), clip.texts(TEXTS, expert)
    with torch.no_grad():
        laid_out = pixels.contiguous(memory_format=torch.channels_last) if clip.channels_last else pixels
        assert torch.equal(images, model.encode_image(laid_out, normalize=True))
        assert torch.equal(texts, model.encode_text(clip.tokenizer(TEXTS), normalize=True))
    assert not torch.allclose(images, clip.images(pixels), atol=1e-3)
    assert weights_sha256(clip.model) == before == clip.sha256


def test_an_expert_of_some_tensors_leaves_the_rest_to_the_base_model(tiny_clip: Clip, pixels: Tensor) -> None:
    delta = {name: values for name, values in delta_of(tiny_clip).items() if name.startswith("visual.")}
    expert = expert_overrides(tiny_clip, delta)
    assert torch.equal(tiny_clip.texts(TEXTS, expert), tiny_clip.texts(TEXTS))
    assert not torch.equal(tiny_clip.images(pixels, expert), tiny_clip.images(pixels))
    assert torch.equal(tiny_clip.images(pixels, {}), tiny_clip.images(pixels))


def test_a_tensor_that_two_layers_share_moves_in_both(tiny_clip: Clip, pixels: Tensor) -> None:
    model = copy.deepcopy(tiny_clip.model)
    blocks = model.get_submodule("visual.transformer.resblocks")
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    tied = replace(tiny_clip, model=model)
    delta = delta_of(tied)
    assert "visual.transformer.resblocks.1.mlp.c_fc.weight" not in delta
    with torch.no_grad():
        expected = moved(tied, delta).encode_image(pixels, normalize=True)
    assert torch.equal(tied.images(pixels, expert_overrides(tied, delta)), expected)


def test_half_precision_parameters_are_rounded_once(tiny_clip: Clip) -> None:
    half = replace(tiny_clip, model=copy.deepcopy(tiny_clip.model).to(torch.bfloat16))
    delta = delta_of(tiny_clip)
    own = dict(half.model.named_parameters())
    for name, tensor in expert_overrides(half, delta).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (own[name].float() + torch.from_numpy(delta[name])).to(torch.bfloat16)), name
