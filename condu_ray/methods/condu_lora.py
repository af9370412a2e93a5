"""ConDU with LoRA: the factors' deltas are fused (arXiv 2503.10705, the LoRA variant).

shared_a (our reconstruction, default): A stays at A⁰, only B is trained and fused. factors: A and B, element by
element, as published. exact: no fusion, factors kept in float16 (our baseline).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import nn

from condu_ray.config import LoraConfig, SessionConfig
from condu_ray.fusion import triggers
from condu_ray.fusion.layout import Layout
from condu_ray.methods.protocol import Memory, Stored, TaskState, Vector
from condu_ray.methods.states import FusedState, SeparateState
from condu_ray.models.clip import Clip, Overrides
from condu_ray.models.lora import (
    Adapters,
    Factors,
    LowRank,
    can_run_in_rows,
    inject,
    low_rank,
    merged_weights,
    plan_adapters,
)
from condu_ray.models.towers import Towers


def _adapters(clip: Clip, config: SessionConfig) -> Adapters:
    return _drawn(clip, config.lora, config.train.towers)


@lru_cache(maxsize=2)  # so that all experts of a store share one A⁰
def _drawn(clip: Clip, lora: LoraConfig, towers: Towers) -> Adapters:
    return plan_adapters(clip.model, lora.rank, lora.targets, lora.seed, towers)


@lru_cache(maxsize=2)
def _in_rows(clip: Clip, lora: LoraConfig, towers: Towers) -> bool:
    pixels = clip.eval_transform(Image.new("RGB", (8, 8)))

    @torch.no_grad()
    def ask(rows: int) -> None:
        clip.images(pixels.expand(rows, -1, -1, -1))
        clip.texts(["a"] * rows)

    return can_run_in_rows(clip.model, _drawn(clip, lora, towers), ask)


def _fused(adapters: Adapters, config: SessionConfig) -> Factors:
    only_b = config.lora.mode == "shared_a"
    return {name: factor for name, factor in adapters.start.items() if not only_b or name.endswith(".lora_B")}


def layout(clip: Clip, config: SessionConfig) -> Layout:
    return Layout.of(_fused(_adapters(clip, config), config))


def empty(layout: Layout, config: SessionConfig) -> TaskState:
    if config.lora.mode == "exact":
        return SeparateState(layout, half=True)
    return FusedState(triggers.empty(layout, config.fusion.granularity, config.choices.triggers))


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> TaskState:
    if config.lora.mode == "exact":
        return SeparateState.load(layout, meta, objects)
    return FusedState.load(layout, meta, objects)


def factors_of(adapters: Adapters, layout: Layout, delta: Vector | None) -> Factors:
    """The adapters' factors once the delta has moved them; those that the layout does not name stay."""
    moved = {} if delta is None else layout.views(delta)
    return {name: start + moved[name] if name in moved else start for name, start in adapters.start.items()}


def prepare(
    clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    adapters = _adapters(clip, config)
    model = copy.deepcopy(clip.model).float()
    parameters = inject(model, adapters, factors_of(adapters, layout, start))
    trained = {entry.name: parameters[entry.name] for entry in layout.entries}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    return model, trained


def expert(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
    adapters = _adapters(clip, config)
    return merged_weights(clip.model, adapters, factors_of(adapters, layout, delta))


def adapter(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> LowRank | None:
    adapters = _adapters(clip, config)
    if not _in_rows(clip, config.lora, config.train.towers):
        return None
    return low_rank(clip.model, adapters, factors_of(adapters, layout, delta))


def head(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> None:
    return None
