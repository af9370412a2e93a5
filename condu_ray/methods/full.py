"""Full fine-tuning: what `condu`, `finetune`, `sequential` and `wise-ft` have in common."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.protocol import Memory, Vector
from condu_ray.models.clip import Clip, Overrides, expert_overrides
from condu_ray.models.towers import in_towers

FROZEN = ("logit_scale", "logit_bias")


def layout(clip: Clip, config: SessionConfig) -> Layout:
    """All parameters of the towers that learn, except the logit scale (tied parameters once)."""
    return Layout.of(
        {
            name: np.broadcast_to(np.float32(0), parameter.shape)
            for name, parameter in clip.model.named_parameters()
            if name not in FROZEN and in_towers(name, config.train.towers)
        }
    )


def prepare(
    clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = copy.deepcopy(clip.model).float()
    parameters = dict(model.named_parameters())
    trained = {entry.name: parameters[entry.name] for entry in layout.entries}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    if start is not None:
        with torch.no_grad():
            for name, values in layout.views(start).items():
                trained[name].add_(torch.tensor(values, device=clip.device))
    return model, trained


def expert(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
    return expert_overrides(clip, layout.views(delta))


def adapter(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> None:
    return None


def head(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> None:
    return None
