"""DMC and DMC-OT: first the image tower learns against fixed text vectors, then prompts against the fixed image tower.

Published (arXiv 2511.10974, its outline; no method section could be read): two stages, in each of which one tower is
frozen and anchors the other; class-wise Gaussians for generative replay; in DMC-OT their calibration across successive
encoders by optimal transport, and task-specific prompts. Everything else is our reconstruction:

    stage 1   LoRA on keys and values of the image tower (linear layers where it has no attention), the same factors
              carried on from task to task; cross entropy over the classes of the current task against θ⁰'s own text
              vectors, which never move
    between   what both encoders see of the current pictures says how old Gaussians move (memory/calibration.py)
    stage 2   `dmc`: one prompt for all tasks, moved on; `dmc-ot`: a prompt for each task, kept as it is afterwards

One model answers: the newest encoder, and for each class the vector of its prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from condu_ray.config import SessionConfig, memory_calibration
from condu_ray.data import TaskData
from condu_ray.data.loading import PictureSet
from condu_ray.fusion.layout import Layout
from condu_ray.memory.calibration import best_mode, distances, fit, measure
from condu_ray.memory.gaussians import Gaussians, Sampler
from condu_ray.methods.batches import seed_of
from condu_ray.methods.checkpoint import Checkpoint, Resume
from condu_ray.methods.prompt_tuning import PromptedTask, tune_prompts
from condu_ray.methods.protocol import Features, Memory, Stored, TaskState, Vector
from condu_ray.methods.remembered import Found, Remembered, fingerprint
from condu_ray.methods.states import LatestState
from condu_ray.methods.training import Place, Step, Trained, prompt_steps_for, steps_for, train_task
from condu_ray.models.clip import Clip, Overrides
from condu_ray.models.head import Head
from condu_ray.models.lora import Adapters, inject, merged_weights, plan_adapters
from condu_ray.models.prompts import most_vectors, prompt_tokens, start_vectors

SHARED = "prompt.shared"
PROMPT = 16
"""Vectors of a prompt where nothing is set and they fit: CoOp's (arXiv 2109.01134)."""

BATCH = 64


@lru_cache(maxsize=2)
def _drawn(clip: Clip, rank: int, seed: int) -> Adapters:
    return plan_adapters(clip.model, rank, "attention", seed, "image")


def _adapters(clip: Clip, config: SessionConfig) -> Adapters:
    return _drawn(clip, config.dmc.rank, config.lora.seed)


def _lengths(clip: Clip, config: SessionConfig) -> tuple[int, int]:
    """(vectors of the prompt that all tasks share, vectors of each task's own)."""
    usual = min(PROMPT, most_vectors(clip) // 2)
    shared, own = (0, usual) if config.method == "dmc-ot" else (usual, 0)
    given = config.dmc.shared_prompt, config.dmc.task_prompt
    return shared if given[0] is None else given[0], own if given[1] is None else given[1]


def _start(clip: Clip, config: SessionConfig, length: int) -> Tensor:
    return start_vectors(clip, length, config.lora.seed)


def layout(clip: Clip, config: SessionConfig) -> Layout:
    """The factors of the image tower's adapters, and the prompt that tasks share."""
    shared = _lengths(clip, config)[0]
    prompt = {SHARED: _start(clip, config, shared).cpu().numpy()} if shared else {}
    return Layout.of({**_adapters(clip, config).start, **prompt})


def _vision(layout: Layout) -> Layout:
    """Of the image tower alone; its vector is the beginning of the whole one."""
    return replace(layout, entries=tuple(entry for entry in layout.entries if entry.name != SHARED))


def empty(layout: Layout, config: SessionConfig) -> TaskState:
    return LatestState(layout)


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> TaskState:
    return LatestState.load(layout, meta, objects)


def _factors(adapters: Adapters, layout: Layout, delta: Vector | None) -> dict[str, NDArray[np.float32]]:
    moved = {} if delta is None else layout.views(delta)
    return {name: start + moved[name] if name in moved else start for name, start in adapters.start.items()}


def prepare(
    clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    adapters = _adapters(clip, config)
    model = copy.deepcopy(clip.model).float()
    return model, inject(model, adapters, _factors(adapters, layout, start))


def expert(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
    adapters = _adapters(clip, config)
    return merged_weights(clip.model, adapters, _factors(adapters, layout, delta))


def adapter(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> None:
    return None


def head(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> Head:
    return Head(texts={task: torch.tensor(kept["texts"], device=clip.device) for task, kept in memory.items()})
