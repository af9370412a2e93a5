"""LoRA adapters whose start leaves θ⁰ exactly as it is: W + B A / sqrt(rank), A⁰ from a seed, B⁰ = 0.

Our reconstruction: the released ConDU code draws both factors at random, so that its "pretrained" model with adapters
is not CLIP. Linear layers and 1x1 convolutions are adapted, a weight that several layers share once; ΔW is linear in B,
so fusing B is fusing weights in a fixed basis. `attention` adapts keys and values alone: of a projection that holds
queries, keys and values in this order the last two thirds of its rows, with one A for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from condu_ray.errors import ModelError
from condu_ray.models.towers import Towers, in_towers

Factors = dict[str, NDArray[np.float32]]
"""`<layer>.lora_A` f32[rank, in] and `<layer>.lora_B` f32[out, rank], out: how many of the last rows are adapted."""

Targets = Literal["mlp", "linear", "attention"]


@dataclass(frozen=True)
class Adapters:
    """Which layers are adapted, and the start of their factors."""

    layers: tuple[str, ...]
    rank: int
    start: Factors
    _placed: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.rank)

    def placed(self, name: str, device: torch.device) -> Tensor:
        """A factor of the start on a device: one tensor for all experts, which then go through it together."""
        if (name, device) not in self._placed:
            self._placed[name, device] = torch.as_tensor(self.start[name], device=device)
        return self._placed[name, device]


def plan_adapters(
    model: nn.Module,
    rank: int,
    targets: Targets,
    seed: int,
    towers: Towers = "both",
) -> Adapters:
    """Chooses the layers and draws A⁰ ~ N(0, 1/in); raises ModelError where nothing can be adapted.

    attention: keys and values; `linear` for a tower that has no attention.
    """
    layers = _layers(model, targets, towers)
    if not layers:
        raise ModelError("the model has no linear layer to adapt", "use --method condu for this model")
    # RandomState's stream is frozen for ever by NumPy's policy: a store's A⁰ can be drawn again by any later release.
    random = np.random.RandomState(seed)
    start: Factors = {}
    for name, layer in layers.items():
        outputs, inputs = layer.get_parameter(_matrix_of(layer)).shape[:2]
        if targets == "attention" and _holds_queries(name, outputs, inputs):
            outputs = 2 * outputs // 3
        start[f"{name}.lora_A"] = (random.standard_normal((rank, inputs)) / math.sqrt(inputs)).astype(np.float32)
        start[f"{name}.lora_B"] = np.zeros((outputs, rank), np.float32)
    return Adapters(tuple(layers), rank, start)


def _layers(model: nn.Module, targets: str, towers: Towers) -> dict[str, nn.Module]:
    linear = {name: layer for name, layer in model.named_modules() if _is_linear(layer) and in_towers(name, towers)}
    if targets == "attention":
        found = _attention(model, linear, towers)
        if found:
            return found
    image = [name for name in linear if name.startswith("visual.")]
    text = [name for name in linear if not name.startswith("visual.")]
    if targets == "mlp":
        image, text = _mlp(image), _mlp(text)
    chosen = {id(linear[name].get_parameter("weight")): name for name in reversed([*image, *text])}
    return {name: layer for name, layer in linear.items() if name in chosen.values()}


def _attention(model: nn.Module, linear: Mapping[str, nn.Module], towers: Towers) -> dict[str, nn.Module]:
    """Modules whose projection holds keys and values, and layers that are one of them alone, by name."""
    fused = {name: layer for name, layer in model.named_modules() if _matrix_of(layer) == "in_proj_weight"}
    alone = {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in ("qkv", "k_proj", "v_proj")}
    found = {name: layer for name, layer in model.named_modules() if name in fused or name in alone}
    return {name: layer for name, layer in found.items() if in_towers(name, towers)}


def _holds_queries(name: str, outputs: int, inputs: int) -> bool:
    return name.rpartition(".")[2] not in ("k_proj", "v_proj") and outputs == 3 * inputs


def _matrix_of(layer: nn.Module) -> str:
    """Name of the layer's parameter that is adapted."""
    return "weight" if layer._parameters.get("in_proj_weight") is None else "in_proj_weight"


def _mlp(names: list[str]) -> list[str]:
    return [name for name in names if ".mlp." in name] or names


def _is_linear(layer: nn.Module) -> bool:
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    return pointwise or isinstance(layer, nn.Linear)


class _Adapted(nn.Module):
    """Parametrization of a weight: W -> W + scale · B A, of its last rows where B has fewer."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + _as_weight(self.scale * (self.lora_B @ self.lora_A), weight).to(weight.dtype)


def _as_weight(change: Tensor, weight: Tensor) -> Tensor:
    """f32[out, in] in the shape of the weight, zeros above where it has more rows."""
    above = len(weight) - len(change)
    return (functional.pad(change, (0, 0, above, 0)) if above else change).view_as(weight)


def inject(model: nn.Module, adapters: Adapters, factors: Factors) -> dict[str, nn.Parameter]:
    """Adds adapters to `model` (in place), starting at `factors`; returns them by factor name."""
    owners = _owners(model, adapters.layers)
    parameters: dict[str, nn.Parameter] = {}
    for name in adapters.layers:
        matrix = _matrix_of(model.get_submodule(name))
        weight = model.get_parameter(f"{name}.{matrix}")
        a, b = (torch.tensor(factors[f"{name}.lora_{side}"], device=weight.device) for side in "AB")
        adapted = _Adapted(a, b, adapters.scale)
        for layer in owners[name]:
            parametrize.register_parametrization(layer, matrix, adapted)
        parameters[f"{name}.lora_A"] = adapted.lora_A
        parameters[f"{name}.lora_B"] = adapted.lora_B
    return parameters


def merged_weights(
    model: nn.Module, adapters: Adapters, factors: Mapping[str, NDArray[np.float32]]
) -> dict[str, Tensor]:
    """The adapted layers' weights with B A / sqrt(rank) added, by parameter name; `model` is not touched."""
    merged: dict[str, Tensor] = {}
    for name in adapters.layers:
        parameter = f"{name}.{_matrix_of(model.get_submodule(name))}"
        weight = model.get_parameter(parameter).detach()
        a, b = (torch.tensor(factors[f"{name}.lora_{side}"], device=weight.device) for side in "AB")
        merged[parameter] = (weight.float() + _as_weight(adapters.scale * (b @ a), weight)).to(weight.dtype)
    return merged


@dataclass(frozen=True, eq=False)
class LowRank:
    """One expert's adapters beside θ⁰: as many bytes as its factors, and several experts run in one pass (`in_rows`).

    factors: layer -> (A f32[rank, in], B f32[out, rank], times the scale). merged: layer -> weight, for the smaller
    layers. What belongs to this expert alone takes no more than its factors would.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    merged: Mapping[str, Tensor]


def can_run_in_rows(model: nn.Module, adapters: Adapters, ask: Callable[[int], object]) -> bool:
    """Whether every adapted layer is called as a module, plainly, with the rows of a batch in its first dimension.

    Some attention reads the weights of its projections without calling them, some layers see a table of positions
    instead of pictures, some standardise their weights first. ask: passes so many pictures and texts through.
    """
    users = [layer for owners in _owners(model, adapters.layers).values() for layer in owners]
    if any(type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward) for layer in users):
        return False
    lengths: dict[int, list[list[int]]] = {rows: [[] for _ in users] for rows in (2, 3)}
    for rows, seen in lengths.items():
        handles = [
            layer.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(len(given[0])))
            for layer, kept in zip(users, seen, strict=True)
        ]
        try:
            ask(rows)
        finally:
            for handle in handles:
                handle.remove()
    pairs = list(zip(lengths[2], lengths[3], strict=True))
    return all(two and [3 * each for each in two] == [2 * each for each in three] for two, three in pairs)


def low_rank(model: nn.Module, adapters: Adapters, factors: Mapping[str, NDArray[np.float32]]) -> LowRank:
    """The expert with these factors. Arrays of `factors` are used in place where they lie on the model's device."""
    small = _worth_merging(model, adapters, factors)
    merged = merged_weights(model, Adapters(tuple(small), adapters.rank, adapters.start), factors)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in adapters.layers:
        if name not in small:
            device, of_a = model.get_parameter(f"{name}.weight").device, f"{name}.lora_A"
            shared = factors[of_a] is adapters.start[of_a]
            a = adapters.placed(of_a, device) if shared else torch.as_tensor(factors[of_a], device=device)
            pairs[name] = (a, adapters.scale * torch.as_tensor(factors[f"{name}.lora_B"], device=device))
    return LowRank(pairs, {name.removesuffix(".weight"): weight for name, weight in merged.items()})


def _worth_merging(model: nn.Module, adapters: Adapters, factors: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """The smallest layers, as many as may be merged without more memory than all factors: merged they are faster.

    A factor A that is still the common start is shared by all experts, which leaves room.
    """
    sizes = {name: {side: factors[f"{name}.lora_{side}"].size for side in "AB"} for name in adapters.layers}
    shared = {name for name in adapters.layers if factors[f"{name}.lora_A"] is adapters.start[f"{name}.lora_A"]}
    room = sum(sizes[name]["A"] for name in shared)
    weights = {name: model.get_parameter(f"{name}.weight").numel() for name in adapters.layers}
    chosen = []
    for name in sorted(adapters.layers, key=weights.__getitem__):
        room -= weights[name] - sizes[name]["B"] - (0 if name in shared else sizes[name]["A"])
        if room < 0:
            break
        chosen.append(name)
    return chosen


@contextmanager
def in_rows(model: nn.Module, segments: Sequence[tuple[LowRank, int]]) -> Iterator[None]:
    """While the block runs, the first rows of a batch pass through the first expert, and so on; one thread at a time.

    segments: experts with the number of their rows, which together are the batch.
    """
    layers = dict.fromkeys(name for expert, _ in segments for name in (*expert.factors, *expert.merged))
    owners = [(name, layer) for name, users in _owners(model, layers).items() for layer in users]
    try:
        for name, layer in owners:
            layer.forward = _forward(layer, name, segments)
        yield
    finally:
        for _, layer in owners:
            layer.__dict__.pop("forward", None)


def _owners(model: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Module]]:
    """For each layer all that use its weight."""
    by_weight: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        by_weight.setdefault(id(layer._parameters.get(_matrix_of(layer))), []).append(layer)
    layers = {name: model.get_submodule(name) for name in names}
    return {name: by_weight[id(layer._parameters[_matrix_of(layer)])] for name, layer in layers.items()}


def _forward(layer: nn.Module, name: str, segments: Sequence[tuple[LowRank, int]]) -> Callable[[Tensor], Tensor]:
    plain = layer.forward
    bias = layer._parameters["bias"]
    total = sum(rows for _, rows in segments)

    def one(values: Tensor, expert: LowRank) -> Tensor:
        if name in expert.merged:
            return _apply(layer, values, expert.merged[name], bias)
        a, b = expert.factors[name]
        added: Tensor = plain(values) + _again(layer, _apply(layer, values, a, None), b)
        return added

    def forward(values: Tensor) -> Tensor:
        parts = torch.split(values, [rows * (len(values) // total) for _, rows in segments])
        pairs = [expert.factors[name] for expert, _ in segments if name in expert.factors]
        if len(pairs) < len(segments) or len({a.data_ptr() for a, _ in pairs}) > 1:
            done = [one(part, expert) for part, (expert, _) in zip(parts, segments, strict=True)]
            return done[0] if len(done) == 1 else torch.cat(done)
        # All share A: one product for all rows, and one by θ⁰.
        output: Tensor = plain(values)
        inner = _apply(layer, values, pairs[0][0], None)
        sizes = [len(part) for part in parts]
        for own, into, (_, b) in zip(torch.split(inner, sizes), torch.split(output, sizes), pairs, strict=True):
            into += _again(layer, own, b)
        return output

    return forward


def _apply(layer: nn.Module, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(values, weight.reshape(*weight.shape[:2], 1, 1), bias, layer.stride, layer.padding)
    return functional.linear(values, weight, bias)


def _again(layer: nn.Module, inner: Tensor, b: Tensor) -> Tensor:
    """B on what A made of the layer's input: A took the layer's steps over places already."""
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(inner, b.reshape(*b.shape, 1, 1))
    return functional.linear(inner, b)
