"""Zero-shot: nothing is trained; θ⁰ answers every task with its class names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.errors import TrainingError
from condu_ray.fusion.layout import Layout
from condu_ray.methods.protocol import Memory, Stored, Vector
from condu_ray.methods.states import NamesState
from condu_ray.models.clip import Clip, Overrides


def layout(clip: Clip, config: SessionConfig) -> Layout:
    # A layout holds at least one tensor; this one never learns.
    return Layout.of({"logit_scale": np.zeros((), np.float32)})


def empty(layout: Layout, config: SessionConfig) -> NamesState:
    return NamesState()


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> NamesState:
    return NamesState(tuple(meta["tasks"]))


def prepare(
    clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    raise TrainingError("zero-shot does not train")


def expert(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
    return {}


def adapter(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> None:
    return None


def head(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> None:
    return None
