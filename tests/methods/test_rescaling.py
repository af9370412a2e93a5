"""Trained rescalers: only they change, the task's loss falls, and a step sees the expert as it will answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.loading import PictureSet
from condu_ray.errors import TrainingError
from condu_ray.methods import registry, rescaling
from condu_ray.methods.batches import batches
from condu_ray.methods.experts import Buffers, expert_of
from condu_ray.methods.rescaling import train_rescalers
from condu_ray.methods.states import FusedState
from condu_ray.methods.step import Step
from condu_ray.methods.training import Trained, train_task
from condu_ray.models.clip import Clip
from condu_ray.models.load import weights_sha256

Settings = Callable[..., SessionConfig]


def sign(settings: Settings, **changes: Any) -> SessionConfig:
    return settings(**{"method": "condu-sign", "fusion__tune_rescalers": 6, **changes})


def fused(clip: Clip, task: TaskData, config: SessionConfig) -> tuple[FusedState, Trained]:
    """The state after a task of noise and `task`, and what training gave for the latter."""
    method = registry.get(config.method)
    layout = method.layout(clip, config)
    trained = train_task(clip, method, layout, task, config)
    noise = np.random.default_rng(0).permutation(trained.delta).astype(np.float32)
    state = method.empty(layout, config).add("noise", noise).add(task.name, trained.delta)
    assert isinstance(state, FusedState)
    return state, trained


def tuned(clip: Clip, state: FusedState, task: TaskData, config: SessionConfig, **more: Any) -> np.ndarray:
    return train_rescalers(clip, registry.get(config.method), state, task, config, more.pop("buffers", {}), **more)


def loss_of(
    clip: Clip, config: SessionConfig, state: FusedState, task: TaskData, pixels: Tensor, labels: Tensor, own: Buffers
) -> float:
    """Of the task's expert: smoothed cross entropy against the first prompt of each class."""
    method, delta = registry.get(config.method), state.delta(task.name)
    expert = expert_of(clip, method, method.layout(clip, config), config, delta, own)
    texts = clip.texts([task.templates[0].format(c=name) for name in task.classes], expert)
    logits = clip.logit_scale * clip.images(pixels, expert) @ texts.T
    return float(torch.nn.functional.cross_entropy(logits, labels, label_smoothing=config.train.label_smoothing))


def test_only_the_rescalers_of_the_task_change_and_its_loss_falls(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    config = sign(settings, fusion__tune_rescalers=12)
    state, _ = fused(tiny_clip, colours, config)
    found = tuned(tiny_clip, state, colours, config)
    after = state.rescaled("colours", found)
    assert after.delta("noise").tobytes() == state.delta("noise").tobytes()
    assert np.array_equal(np.sign(after.delta("colours")), np.sign(state.delta("colours")))
    first = state.fused.tasks[1].rescalers
    unused = first == 0
    assert unused.any(), "words that no prompt has"
    assert found.dtype == np.float32
    assert not found[unused].any()
    assert 0 < np.abs(np.log(found[~unused] / first[~unused])).max() < 1
    pictures = PictureSet(colours.train, tiny_clip.eval_transform)
    pixels, labels = torch.stack([pictures[i][0] for i in range(10)]), torch.tensor(colours.train.labels)
    before, now = (loss_of(tiny_clip, config, each, colours, pixels, labels, {}) for each in (state, after))
    assert now < before
    assert weights_sha256(tiny_clip.model) == tiny_clip.sha256


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    tiny_clip: Clip, colours: TaskData, settings: Settings
) -> None:
    config = sign(settings)
    state, _ = fused(tiny_clip, colours, config)
    one, same = (tuned(tiny_clip, state, colours, config) for _ in range(2))
    other = tuned(tiny_clip, state, colours, sign(settings, seed=1))
    assert one.tobytes() == same.tobytes()
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        pytest.param("tiny_clip", {}, id="full"),
        pytest.param("tiny_clip", {"fusion__granularity": "tensor", "train__towers": "image"}, id="image tower"),
        pytest.param("tiny_clip", {"fusion__granularity": "l1", "train__accumulate": 2}, id="one rescaler"),
        pytest.param("tiny_clip", {"method": "condu-lora", "fusion__triggers": "sign"}, id="lora"),
        pytest.param(
            "conv_clip",
            {"method": "condu-lora", "fusion__triggers": "sign", "lora__mode": "factors"},
            id="lora, both factors",
        ),
        pytest.param("conv_clip", {"train__batch_norm": "updated"}, id="running statistics"),
    ],
)
def test_the_first_step_sees_the_expert_and_the_pictures_after_the_last_step_of_training(
    model: str, changes: dict[str, Any], colours: TaskData, settings: Settings, request: pytest.FixtureRequest
) -> None:
    clip: Clip = request.getfixturevalue(model)
    config = sign(settings, **changes)
    state, trained = fused(clip, colours, config)
    assert bool(trained.buffers) == ("train__batch_norm" in changes)
    steps: list[Step] = []
    found = tuned(clip, state, colours, config, buffers=trained.buffers, on_step=steps.append)
    ((pixels, labels),) = batches(colours, clip, config, range(4, 5))
    if config.train.towers == "both":
        expected = loss_of(clip, config, state, colours, pixels, labels, trained.buffers)
        assert steps[0].loss == pytest.approx(expected, rel=1e-4)
    assert [(each.task, each.step, each.steps) for each in steps] == [("colours", n, 6) for n in range(1, 7)]
    assert found.shape == state.fused.tasks[1].rescalers.shape
    assert not np.array_equal(found, state.fused.tasks[1].rescalers)


def test_what_is_no_number_is_an_error_that_names_the_task(
    tiny_clip: Clip, colours: TaskData, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sign(settings)
    method = registry.get(config.method)
    layout = method.layout(tiny_clip, config)
    far = method.empty(layout, config).add("colours", np.full(layout.total, 1e20, np.float32))
    assert isinstance(far, FusedState)
    with pytest.raises(TrainingError, match=r"task colours: the loss is nan at step 1 of 6 of its rescalers"):
        tuned(tiny_clip, far, colours, config)
    state, _ = fused(tiny_clip, colours, config)
    monkeypatch.setattr(rescaling, "RATE", 1e30)
    with pytest.raises(TrainingError, match=r"at step 2 of 6 of its rescalers.*fusion\.tune-rescalers 0"):
        tuned(tiny_clip, state, colours, config)
