"""LoRA adapters whose start leaves θ⁰ exactly as it is: W + B A / sqrt(rank), A⁰ from a seed, B⁰ = 0.

Our reconstruction: the released ConDU code draws both factors at random, so that its "pretrained" model with adapters is
not CLIP. Linear layers and 1x1 convolutions are adapted; ΔW is linear in B, so fusing B is fusing weights in a fixed basis.
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


def plan_adapters(model: nn.Module, rank: int, targets: Literal["mlp", "linear"], seed: int) -> Adapters:
    """Chooses the layers of both towers and draws A⁰ ~ N(0, 1/in); raises ModelError where nothing can be adapted."""
    layers = _layers(model, targets)
    if not layers:
        raise ModelError("the model has no linear layer to adapt", "use --method condu for this model")
    # RandomState's stream is frozen for ever by NumPy's policy: a store's A⁰ can be drawn again by any later release.
    random = np.random.RandomState(seed)
    start: Factors = {}
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape[:2]
        start[f"{name}.lora_A"] = (random.standard_normal((rank, inputs)) / math.sqrt(inputs)).astype(np.float32)
        start[f"{name}.lora_B"] = np.zeros((outputs, rank), np.float32)
    return Adapters(tuple(layers), rank, start)


def _layers(model: nn.Module, targets: str) -> dict[str, nn.Linear | nn.Conv2d]:
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _pointwise(m)}
    if targets == "linear":
        return linear  # type: ignore[return-value]
    towers: dict[bool, dict[str, nn.Module]] = {True: {}, False: {}}
    for name, layer in linear.items():
        towers[name.startswith("visual.")][name] = layer
    chosen: dict[str, nn.Module] = {}
    for tower in towers.values():
        chosen.update({n: m for n, m in tower.items() if ".mlp." in n} or tower)
    return {n: chosen[n] for n in linear if n in chosen}  # type: ignore[misc]


def _pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


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
    parameters: dict[str, nn.Parameter] = {}
    for name in adapters.layers:
        layer = model.get_submodule(name)
        device = layer.weight.device
        a, b = (torch.tensor(factors[f"{name}.lora_{side}"], device=device) for side in "AB")
        adapted = _Adapted(a, b, adapters.scale)
        parametrize.register_parametrization(layer, "weight", adapted)
        parameters[f"{name}.lora_A"] = adapted.lora_A
        parameters[f"{name}.lora_B"] = adapted.lora_B
    return parameters


def merged_weights(model: nn.Module, adapters: Adapters, factors: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """The adapted layers' weights with B A / sqrt(rank) added, by parameter name; `model` is not touched."""
    merged: dict[str, Tensor] = {}
    for name in adapters.layers:
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr, operator]
        a, b = (torch.tensor(factors[f"{name}.lora_{side}"], device=weight.device) for side in "AB")
        change = (adapters.scale * (b @ a)).view_as(weight)
        merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged
