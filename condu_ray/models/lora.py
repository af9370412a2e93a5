"""LoRA adapters whose start leaves θ⁰ exactly as it is: W + B A / sqrt(rank), A⁰ from a seed, B⁰ = 0.

Our reconstruction: the released ConDU code draws both factors at random, so that its "pretrained" model with adapters
is not CLIP. Linear layers and 1x1 convolutions are adapted, a weight that several layers share once; ΔW is linear in B,
so fusing B is fusing weights in a fixed basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from condu_ray.errors import ModelError

Factors = dict[str, NDArray[np.float32]]
"""`<layer>.lora_A` f32[rank, in] and `<layer>.lora_B` f32[out, rank]."""


@dataclass(frozen=True)
class Adapters:
    """Which layers are adapted, and the start of their factors."""

    layers: tuple[str, ...]
    rank: int
    start: Factors

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.rank)


def plan_adapters(
    model: nn.Module,
    rank: int,
    targets: Literal["mlp", "linear"],
    seed: int,
    towers: Literal["both", "image"] = "both",
) -> Adapters:
    """Chooses the layers and draws A⁰ ~ N(0, 1/in); raises ModelError where nothing can be adapted."""
    layers = _layers(model, targets, towers)
    if not layers:
        raise ModelError("the model has no linear layer to adapt", "use --method condu for this model")
    # RandomState's stream is frozen for ever by NumPy's policy: a store's A⁰ can be drawn again by any later release.
    random = np.random.RandomState(seed)
    start: Factors = {}
    for name, layer in layers.items():
        outputs, inputs = layer.get_parameter("weight").shape[:2]
        start[f"{name}.lora_A"] = (random.standard_normal((rank, inputs)) / math.sqrt(inputs)).astype(np.float32)
        start[f"{name}.lora_B"] = np.zeros((outputs, rank), np.float32)
    return Adapters(tuple(layers), rank, start)


def _layers(model: nn.Module, targets: str, towers: str) -> dict[str, nn.Module]:
    linear = {name: layer for name, layer in model.named_modules() if _is_linear(layer)}
    image = [name for name in linear if name.startswith("visual.")]
    text = [name for name in linear if not name.startswith("visual.")] if towers == "both" else []
    if targets == "mlp":
        image, text = _mlp(image), _mlp(text)
    chosen = {id(linear[name].get_parameter("weight")): name for name in reversed([*image, *text])}
    return {name: layer for name, layer in linear.items() if name in chosen.values()}


def _mlp(names: list[str]) -> list[str]:
    return [name for name in names if ".mlp." in name] or names


def _is_linear(layer: nn.Module) -> bool:
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    return pointwise or isinstance(layer, nn.Linear)


class _Adapted(nn.Module):
    """Parametrization of a weight: W -> W + scale · B A."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * (self.lora_B @ self.lora_A)).view_as(weight).to(weight.dtype)


def inject(model: nn.Module, adapters: Adapters, factors: Factors) -> dict[str, nn.Parameter]:
    """Adds adapters to `model` (in place), starting at `factors`; returns them by factor name."""
    owners: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        owners.setdefault(id(layer._parameters.get("weight")), []).append(layer)
    parameters: dict[str, nn.Parameter] = {}
    for name in adapters.layers:
        weight = model.get_parameter(f"{name}.weight")
        a, b = (torch.tensor(factors[f"{name}.lora_{side}"], device=weight.device) for side in "AB")
        adapted = _Adapted(a, b, adapters.scale)
        for layer in owners[id(weight)]:
            parametrize.register_parametrization(layer, "weight", adapted)
        parameters[f"{name}.lora_A"] = adapted.lora_A
        parameters[f"{name}.lora_B"] = adapted.lora_B
    return parameters


def merged_weights(
    model: nn.Module, adapters: Adapters, factors: Mapping[str, NDArray[np.float32]]
) -> dict[str, Tensor]:
    """The adapted layers' weights with B A / sqrt(rank) added, by parameter name; `model` is not touched."""
    merged: dict[str, Tensor] = {}
    for name in adapters.layers:
        weight = model.get_parameter(f"{name}.weight").detach()
        a, b = (torch.tensor(factors[f"{name}.lora_{side}"], device=weight.device) for side in "AB")
        change = (adapters.scale * (b @ a)).view_as(weight)
        merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged
