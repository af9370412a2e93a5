"""Trains a task in this process, and what its first step was."""

from __future__ import annotations

from typing import Any

import numpy as np

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.methods import registry
from condu_ray.methods.training import Checkpoint, Resume, Trained, train_task
from condu_ray.models.clip import Clip


def train(clip: Clip, task: TaskData, config: SessionConfig, **more: Any) -> Trained:
    method = registry.get(config.method)
    return train_task(clip, method, method.layout(clip, config), task, config, **more)


def first_gradient(clip: Clip, task: TaskData, config: SessionConfig) -> np.ndarray:
    """Of the first step, times 0.1: AdamW's first moment. (Its steps divide by the gradient, so deltas tell less.)"""
    saved: list[np.ndarray] = []

    def save(checkpoint: Checkpoint) -> None:
        saved.append(np.concatenate([each.ravel() for name, each in checkpoint.items() if name.startswith("first/")]))

    train(clip, task, config, resume=Resume(save=save))
    return saved[0]
