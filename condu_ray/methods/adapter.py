"""RAPF and CalFuse: θ⁰ stays whole, one linear adapter on its image features learns from session to session.

RAPF (arXiv 2407.14143) as read in its public code. Of CalFuse (arXiv 2503.18672) the parts are published (calibrated
features, QR fusion, distillation), every formula is our reconstruction. The delta of both is that of the head alone:
W − I and β − 1, so that a delta of zero is θ⁰.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.errors import TrainingError
from condu_ray.fusion.adapter import fuse
from condu_ray.fusion.layout import Layout
from condu_ray.methods.adapter_fit import Adapter, fit
from condu_ray.methods.checkpoint import Resume
from condu_ray.methods.discriminants import discriminants
from condu_ray.methods.protocol import Features, Memory, Stored, TaskState, Vector
from condu_ray.methods.states import LatestState
from condu_ray.methods.step import Step
from condu_ray.methods.training import Place, Trained
from condu_ray.models.clip import Clip, Overrides
from condu_ray.models.head import Head, mixed

WEIGHT, SHARE = "head.weight", "head.share"


def layout(clip: Clip, config: SessionConfig) -> Layout:
    width = clip.texts([""]).shape[1]
    return Layout.of({WEIGHT: np.broadcast_to(np.float32(0), (width, width)), SHARE: np.zeros((), np.float32)})


def empty(layout: Layout, config: SessionConfig) -> LatestState:
    return LatestState(layout, _move(layout, config))


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> LatestState:
    return LatestState.load(layout, meta, objects, _move(layout, config))


def _move(layout: Layout, config: SessionConfig) -> Callable[[Vector | None, Vector], Vector]:
    return partial(moved, layout=layout, config=config)


def moved(before: Vector | None, trained: Vector, layout: Layout, config: SessionConfig) -> Vector:
    """The adapter that was trained, fused with the one before; nothing is fused after the first task.

    A learned β is fused too: its logit by the mean weight of the adapter's entries. Every other β was chosen for the
    fused adapter.
    """
    if before is None:
        return trained
    old, new = adapter_of(layout, before), adapter_of(layout, trained)
    rule = config.choices
    fused = fuse(old.weight, new.weight, config.adapter.mix_bias, rule.basis, config.adapter.weights)
    share = new.share
    if rule.calibration == "learnable":
        logits = [np.log(each) - np.log1p(-each) for each in np.clip([old.share, new.share], 1e-6, 1 - 1e-6)]
        share = float(1 / (1 + np.exp(-(logits[0] + fused.mean_weight * (logits[1] - logits[0])))))
    return delta_of(layout, Adapter(fused.weight.astype(np.float32), share))


def adapter_of(layout: Layout, delta: Vector) -> Adapter:
    values = layout.views(delta)
    weight = values[WEIGHT] + np.eye(len(values[WEIGHT]), dtype=np.float32)
    return Adapter(weight, 1 + float(values[SHARE]))


def delta_of(layout: Layout, adapter: Adapter) -> Vector:
    weight = adapter.weight - np.eye(len(adapter.weight), dtype=np.float32)
    return layout.flatten({WEIGHT: weight, SHARE: np.array(adapter.share - 1, np.float32)})


def prepare(
    clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    raise TrainingError(f"{config.method} learns on features, it tunes no tower")


def learn(
    clip: Clip,
    layout: Layout,
    task: TaskData,
    config: SessionConfig,
    before: TaskState,
    features: Features | None,
    place: Place,
    resume: Resume,
    on_step: Callable[[Step], None],
) -> Trained:
    """Fits the adapter; a fit is short, so one that was killed begins anew, to the same bits."""
    assert features is not None, "the catalogue says that these methods learn on features"
    delta = before.delta(before.tasks[-1]) if before.tasks else None
    start = None if delta is None else adapter_of(layout, delta)
    old = [before.memory[name] for name in before.tasks]
    fitted = fit(task.name, features, old, start, clip.logit_scale, config, on_step, str(clip.device))
    kept = {task.name: {**fitted.gaussians.arrays(), "texts": features.texts}}
    return Trained(delta_of(layout, fitted.adapter), {}, fitted.losses, kept)


def expert(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
    return {}


def adapter(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> None:
    return None


def head(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> Head:
    found = adapter_of(layout, delta)
    weight, mix = torch.tensor(found.weight), config.adapter.mix
    told = discriminants(memory, config, lambda raw: mixed(raw, weight, found.share, mix), clip.device)
    return Head(weight.to(clip.device), found.share, mix, discriminants=told)
