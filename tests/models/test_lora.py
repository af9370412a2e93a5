"""Adapters: they start at θ⁰ exactly, and merged they answer as they did while they were trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from condu_ray.errors import ModelError
from condu_ray.methods import condu_lora
from condu_ray.models.clip import Clip
from condu_ray.models.load import weights_sha256
from condu_ray.models.lora import (
    Adapters,
    Factors,
    can_run_in_rows,
    in_rows,
    inject,
    low_rank,
    merged_weights,
    plan_adapters,
)
from condu_ray.models.towers import in_towers
from condu_ray.sources import from_dotted

TEXTS = ["a photo of a cat.", "a drawing of a dog."]
BOTH = pytest.mark.parametrize("fixture", ["tiny_clip", "conv_clip"])
TARGETS = pytest.mark.parametrize("targets", ["mlp", "linear", "attention"])


@pytest.fixture
def clip(fixture: str, request: pytest.FixtureRequest) -> Clip:
    found: Clip = request.getfixturevalue(fixture)
    return found


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def runs_in_rows(clip: Clip, adapters: Adapters) -> bool:
    def ask(rows: int) -> None:
        with torch.no_grad():
            clip.images(torch.zeros(rows, 3, 32, 32))
            clip.texts(["a"] * rows)

    return can_run_in_rows(clip.model, adapters, ask)


def answers(model: nn.Module, clip: Clip, pixels: Tensor) -> Tensor:
    laid_out = pixels.contiguous(memory_format=torch.channels_last) if clip.channels_last else pixels
    with torch.no_grad():
        images = model.encode_image(laid_out, normalize=True)
        return torch.cat([images, model.encode_text(clip.tokenizer(TEXTS), normalize=True)])


def trained(clip: Clip, adapters: Adapters, pixels: Tensor) -> tuple[nn.Module, Factors]:
    """The adapted model after two steps that change both factors, and the factors."""
    model = copy.deepcopy(clip.model)
    parameters = inject(model, adapters, adapters.start)
    optimiser = torch.optim.SGD(parameters.values(), lr=0.5)
    for _ in range(2):
        optimiser.zero_grad()
        images = model.encode_image(pixels, normalize=True)
        (images[:2] * model.encode_text(clip.tokenizer(TEXTS), normalize=True)).sum().backward()
        optimiser.step()
    return model, {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}


@BOTH
@TARGETS
def test_at_the_start_the_adapted_model_is_the_base_model(clip: Clip, targets: str, pixels: Tensor) -> None:
    adapters = plan_adapters(clip.model, 4, targets, seed=0)
    model = copy.deepcopy(clip.model)
    inject(model, adapters, adapters.start)
    assert torch.equal(answers(model, clip, pixels), answers(clip.model, clip, pixels))
    for name, weight in merged_weights(clip.model, adapters, adapters.start).items():
        assert torch.equal(weight, clip.model.get_parameter(name)), name


@BOTH
@TARGETS
def test_merged_weights_answer_as_the_trained_adapters(clip: Clip, targets: str, pixels: Tensor) -> None:
    adapters = plan_adapters(clip.model, 4, targets, seed=0)
    model, factors = trained(clip, adapters, pixels)
    for name, factor in factors.items():
        assert not np.array_equal(factor, adapters.start[name]), name
    expert = merged_weights(clip.model, adapters, factors)
    found = torch.cat([clip.images(pixels, expert), clip.texts(TEXTS, expert)])
    torch.testing.assert_close(found, answers(model, clip, pixels), atol=1e-5, rtol=0)
    assert not torch.allclose(found, answers(clip.model, clip, pixels), atol=1e-3)
    assert weights_sha256(clip.model) == clip.sha256


def test_merging_adds_the_product_over_the_root_of_the_rank(tiny_clip: Clip) -> None:
    adapters = plan_adapters(tiny_clip.model, 4, "mlp", seed=0)
    name = adapters.layers[0]
    b = np.random.default_rng(0).standard_normal(adapters.start[f"{name}.lora_B"].shape).astype(np.float32)
    merged = merged_weights(tiny_clip.model, adapters, {**adapters.start, f"{name}.lora_B": b})[f"{name}.weight"]
    expected = tiny_clip.model.get_parameter(f"{name}.weight").numpy() + b @ adapters.start[f"{name}.lora_A"] / 2
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_seed_alone_decides_the_start(tiny_clip: Clip) -> None:
    one, same, other = (plan_adapters(tiny_clip.model, 4, "mlp", seed) for seed in (3, 3, 4))
    for name, factor in one.start.items():
        assert factor.dtype == np.float32
        assert np.array_equal(factor, same.start[name])
        assert np.array_equal(factor, other.start[name]) == name.endswith("lora_B"), name
        assert not name.endswith("lora_B") or not factor.any()


def test_the_start_is_the_same_in_every_release(tiny_clip: Clip) -> None:
    """A store holds the seed of A⁰, not A⁰: were it drawn differently, every LoRA expert would be lost."""
    adapters = plan_adapters(tiny_clip.model, 4, "mlp", seed=0)
    name = "visual.transformer.resblocks.0.mlp.c_fc"
    assert adapters.layers[0] == name
    a = adapters.start[f"{name}.lora_A"]
    assert a.shape == (4, 64)
    np.testing.assert_allclose(a[0, :3] * 8, [1.7640524, 0.4001572, 0.978738], rtol=1e-6)
    assert a.std() * 8 == pytest.approx(1, abs=0.1)


def test_attention_means_keys_and_values_and_leaves_queries(tiny_clip: Clip, pixels: Tensor) -> None:
    adapters = plan_adapters(tiny_clip.model, 2, "attention", seed=0, towers="image")
    assert adapters.layers == tuple(f"visual.transformer.resblocks.{block}.attn" for block in (0, 1))
    _, factors = trained(tiny_clip, adapters, pixels)
    for name, weight in merged_weights(tiny_clip.model, adapters, factors).items():
        assert name.endswith(".attn.in_proj_weight")
        change = (weight - tiny_clip.model.get_parameter(name)).abs().amax(1)
        assert (change[:64] == 0).all() and (change[64:] > 0).all()


def test_a_projection_as_a_layer_of_its_own_is_found_by_its_name() -> None:
    block = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
    tower = nn.ModuleDict({"block": block, "timm": nn.ModuleDict({"qkv": nn.Linear(6, 18)})})
    found = plan_adapters(nn.ModuleDict({"visual": tower}), 2, "attention", seed=0, towers="image")
    assert found.layers == ("visual.block.k_proj", "visual.block.v_proj", "visual.timm.qkv")
    assert [len(found.start[f"{name}.lora_B"]) for name in found.layers] == [6, 6, 12]


def test_a_tower_without_attention_has_its_linear_layers_adapted(conv_clip: Clip) -> None:
    attention, linear = (
        plan_adapters(conv_clip.model, 2, targets, 0, "image").layers for targets in ("attention", "linear")
    )
    assert attention == linear


def test_mlp_means_the_mlp_layers_of_both_towers(tiny_clip: Clip) -> None:
    found = plan_adapters(tiny_clip.model, 2, "mlp", seed=0).layers
    expected = {
        f"{tower}transformer.resblocks.{block}.mlp.{layer}"
        for tower in ("visual.", "")
        for block in (0, 1)
        for layer in ("c_fc", "c_proj")
    }
    assert set(found) == expected
    assert len(found) == 8


def test_a_tower_without_blocks_is_adapted_in_its_1x1_convolutions(conv_clip: Clip) -> None:
    found = plan_adapters(conv_clip.model, 2, "mlp", seed=0).layers
    image = {name for name in found if name.startswith("visual.")}
    kernels = {
        name
        for name, layer in conv_clip.model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    }
    assert len(kernels) > 10
    assert image == kernels | {"visual.head.proj"}
    assert {name for name in found if name not in image} == {
        f"transformer.resblocks.{block}.mlp.{layer}" for block in (0, 1) for layer in ("c_fc", "c_proj")
    }


def test_linear_means_every_linear_layer(tiny_clip: Clip) -> None:
    found = plan_adapters(tiny_clip.model, 2, "linear", seed=0).layers
    assert len(found) == 12
    assert sum(name.endswith("attn.out_proj") for name in found) == 4


def test_where_only_the_image_tower_learns_only_it_is_adapted(tiny_clip: Clip) -> None:
    found = plan_adapters(tiny_clip.model, 2, "mlp", 0, towers="image").layers
    assert len(found) == 4
    assert all(name.startswith("visual.") for name in found)


def test_a_weight_that_two_layers_share_is_adapted_once(tiny_clip: Clip, pixels: Tensor) -> None:
    base = copy.deepcopy(tiny_clip.model)
    blocks = base.get_submodule("visual.transformer.resblocks")
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    tied = replace(tiny_clip, model=base)
    adapters = plan_adapters(base, 4, "mlp", seed=0)
    assert len(adapters.layers) == 7
    model, factors = trained(tied, adapters, pixels)
    expert = merged_weights(base, adapters, factors)
    torch.testing.assert_close(
        torch.cat([tied.images(pixels, expert), tied.texts(TEXTS, expert)]),
        answers(model, tied, pixels),
        atol=1e-5,
        rtol=0,
    )


def test_a_model_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer to adapt"):
        plan_adapters(nn.Sequential(nn.Conv2d(3, 4, 3)), 2, "mlp", seed=0)


def moved(clip: Clip, adapters: Adapters, seed: int) -> Factors:
    """Factors of an expert that is far from θ⁰."""
    random = np.random.default_rng(seed)
    return {
        name: factor if name.endswith("A") else random.normal(0, 0.3, factor.shape).astype(np.float32)
        for name, factor in adapters.start.items()
    }


@BOTH
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rank", [2, 16])
def test_experts_in_one_pass_answer_as_one_at_a_time(clip: Clip, pixels: Tensor, shared: bool, rank: int) -> None:
    """Some layers keep their factors, others are merged."""
    adapters = plan_adapters(clip.model, rank, "mlp", seed=0)
    every = [moved(clip, adapters, seed) for seed in range(3)]
    if not shared:
        every[1] = {name: factor + np.float32(0.1) for name, factor in every[1].items()}
    experts = [low_rank(clip.model, adapters, factors) for factors in every]
    assert runs_in_rows(clip, adapters)
    for name in experts[0].factors:  # one tensor, also where it had to be copied to a device
        assert (experts[1].factors[name][0] is experts[0].factors[name][0]) == shared
    rows, sizes = torch.cat([pixels, pixels.flip(0), pixels[:1]]), [3, 3, 1]
    with torch.no_grad():
        found = clip.images_in_rows(rows, list(zip(experts, sizes, strict=True)))
        for part, one, factors in zip(torch.split(rows, sizes), experts, every, strict=True):
            expected = clip.images(part, merged_weights(clip.model, adapters, factors))
            here = found[: len(part)]
            found = found[len(part) :]
            torch.testing.assert_close(here, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(clip.images(part, one), expected, atol=1e-5, rtol=0)
            assert not torch.allclose(here, clip.images(part), atol=1e-2)
        texts = clip.texts(TEXTS, experts[0])
        torch.testing.assert_close(
            texts, clip.texts(TEXTS, merged_weights(clip.model, adapters, every[0])), atol=1e-5, rtol=0
        )
    assert weights_sha256(clip.model) == clip.sha256


@pytest.mark.parametrize("shared", [True, False])
def test_a_convolution_that_takes_steps_takes_them_once(shared: bool) -> None:
    """As the shortcuts of residual networks do."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"visual": nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, padding=1), nn.Conv2d(12, 6, 1))})
    adapters, random = plan_adapters(model, 2, "linear", seed=0), np.random.default_rng(0)
    every = [
        {
            name: start if shared and name.endswith("A") else random.normal(0, 0.3, start.shape).astype(np.float32)
            for name, start in adapters.start.items()
        }
        for _ in range(2)
    ]
    kept = [low_rank(model, adapters, factors) for factors in every]
    assert all(len(expert.factors) == 2 for expert in kept), "nothing is merged"
    rows, tower = torch.randn(4, 8, 7, 7), model["visual"]
    with torch.no_grad(), in_rows(model, [(kept[0], 1), (kept[1], 3)]):
        found = tower(rows)
    for own, part, here in zip(every, rows.split([1, 3]), found.split([1, 3]), strict=True):
        merged = merged_weights(model, adapters, own)
        expected = torch.func.functional_call(tower, {n.removeprefix("visual."): w for n, w in merged.items()}, part)
        torch.testing.assert_close(here, expected, atol=1e-5, rtol=0)


def test_the_base_model_is_itself_again_after_an_expert_that_fails(tiny_clip: Clip, pixels: Tensor) -> None:
    adapters = plan_adapters(tiny_clip.model, 2, "mlp", seed=0)
    expert = low_rank(tiny_clip.model, adapters, moved(tiny_clip, adapters, 0))
    base = tiny_clip.images(pixels)
    with pytest.raises(RuntimeError):
        tiny_clip.images(pixels[:, :2], expert)
    assert torch.equal(tiny_clip.images(pixels), base)


@pytest.mark.parametrize("rank", [2, 16, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_an_expert_beside_the_base_model_takes_no_more_than_its_factors(
    tiny_clip: Clip, rank: int, shared: bool
) -> None:
    adapters = plan_adapters(tiny_clip.model, rank, "mlp", seed=0)
    factors = adapters.start if shared else {name: factor.copy() for name, factor in adapters.start.items()}
    expert = low_rank(tiny_clip.model, adapters, factors)
    own = [*expert.merged.values(), *(b for _, b in expert.factors.values())]
    own += [] if shared else [a for a, _ in expert.factors.values()]
    assert sum(tensor.nbytes for tensor in own) <= sum(factor.nbytes for factor in factors.values())
    assert set(expert.merged) | set(expert.factors) == set(adapters.layers)
    if shared:
        for name, (a, _) in expert.factors.items():
            assert a.data_ptr() == adapters.start[f"{name}.lora_A"].ctypes.data, "A is copied"


def test_projections_that_attention_reads_itself_cannot_run_in_rows(tiny_clip: Clip) -> None:
    assert not runs_in_rows(tiny_clip, plan_adapters(tiny_clip.model, 2, "linear", seed=0))


class Odd(nn.Module):
    """A tower with a layer that is called in no plain way."""

    def __init__(self, odd: nn.Module, way: str) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"plain": nn.Linear(4, 4), "odd": odd})
        self.way = way

    def forward(self, rows: int) -> Tensor:
        odd, values = self.visual["odd"], self.visual["plain"](torch.ones(rows, 4))
        if self.way == "reads its weight":
            return functional.linear(values, odd.weight, odd.bias)
        if self.way == "sees positions":
            return values + odd(torch.ones(6, 4)).mean(0)
        if self.way == "is not called":
            return values
        found: Tensor = odd(values.repeat(3, 1))  # three windows a picture
        return found


class Standardised(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return functional.linear(values, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("way", "kind", "runs"),
    [
        ("is called", nn.Linear, True),
        ("is called", Standardised, False),
        ("reads its weight", nn.Linear, False),
        ("sees positions", nn.Linear, False),
        ("is not called", nn.Linear, False),
    ],
)
def test_layers_that_are_not_plainly_called_with_pictures_cannot_run_in_rows(
    way: str, kind: type[nn.Linear], runs: bool
) -> None:
    model = Odd(kind(4, 4), way)
    adapters = plan_adapters(model, 2, "linear", seed=0)
    assert adapters.layers == ("visual.plain", "visual.odd")
    assert can_run_in_rows(model, adapters, model) == runs
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_a_caption_decoder_is_no_tower() -> None:
    """CoCa's: no picture and no class passes through it."""
    towers = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4)) for name in ("visual", "text", "text_decoder")})
    assert plan_adapters(towers, 2, "linear", 0).layers == ("visual.0", "text.0")
    assert [in_towers(name, "both") for name in ("visual.a", "text.b", "text_decoder.c")] == [True, True, False]


def test_experts_of_a_residual_network_answer_by_merged_weights(residual_clip: Clip) -> None:
    """Its attention pool reads the weights of its projections."""
    clip = residual_clip
    asked = from_dotted({"method": "condu-lora", "lora.rank": 2, "lora.targets": "linear"})
    layout = condu_lora.layout(clip, asked)
    assert any("attnpool" in entry.name for entry in layout.entries)
    assert condu_lora.adapter(clip, layout, asked, np.zeros(layout.total, np.float32)) is None
