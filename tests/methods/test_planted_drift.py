"""DMC on a small CLIP whose image tower drifts as the test says: what replay and each calibration are worth.

Only the pictures' features and the first stage stand in; Gaussians, calibration, prompts and their training are real.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from condu_ray.data.task import Picture, Sizes, Split, TaskData
from condu_ray.methods import dmc
from condu_ray.methods.checkpoint import Resume
from condu_ray.methods.training import Place, Trained
from condu_ray.models.clip import Clip
from condu_ray.sources import from_dotted

CLASSES = (("cat", "dog", "bus", "car"), ("tree", "cup", "chair", "ship"), ("apple", "bird", "house", "shoe"))
EACH, WIDTH = 40, 32
LABELS = np.arange(4 * EACH) % 4


class World:
    """Three tasks of four classes around their text vectors; encoder n sees them through the n-th power of `drift`."""

    def __init__(self, clip: Clip, drift: NDArray[np.float64]) -> None:
        random = np.random.default_rng(0)
        texts = [clip.texts([f"a photo of a {name}." for name in names]).numpy() for names in CLASSES]
        means = [each + 0.5 * random.standard_normal((4, WIDTH)) / np.sqrt(WIDTH) for each in texts]
        self.clip, self.drift = clip, drift
        self.train, self.test = (
            [each[LABELS] + 0.6 * random.standard_normal((len(LABELS), WIDTH)) / np.sqrt(WIDTH) for each in means]
            for _ in range(2)
        )

    def seen(self, features: NDArray[np.float64], encoder: int) -> NDArray[np.float32]:
        return (features @ np.linalg.matrix_power(self.drift, encoder).T).astype(np.float32)

    def last(self, **others: Any) -> float:
        """Mean accuracy on all twelve classes after three sessions."""
        given = {"method": "dmc", "dmc.prompt_steps": 60, "dmc.prompt_lr": 1e-2, "memory.discriminant": False}
        config = from_dotted(given | {name.replace("__", "."): value for name, value in others.items()})
        layout = dmc.layout(self.clip, config)
        state = dmc.empty(layout, config)
        for number in range(3):
            trained = dmc.learn(
                self.clip, layout, task(number), config, state, None, Place(), Resume(), lambda step: None
            )
            state = state.add(f"{number}", trained.delta, trained.memory)
        head = dmc.head(self.clip, layout, config, trained.delta, state.memory)
        right = []
        for number in range(3):
            features = head(functional.normalize(torch.from_numpy(self.seen(self.test[number], 3)), dim=-1))
            logits = [self.clip.logit_scale * features @ head.texts[f"{each}"].T for each in range(3)]
            for each, (weights, bias) in head.discriminants.items():
                logits[int(each)] += features @ weights.T + bias
            right.append(torch.cat(logits, dim=1).numpy().argmax(1) == 4 * number + LABELS)
        return float(np.mean(right))


def task(number: int) -> TaskData:
    pictures = Split(tuple(Picture(f"{each}") for each in range(len(LABELS))), LABELS)
    return TaskData(
        name=f"{number}",
        source="",
        classes=CLASSES[number],
        templates=("a photo of a {c}.",),
        train=pictures,
        test=pictures,
        skipped=(),
        fingerprint="0" * 64,
        sizes=Sizes((1, 1, 1), (1, 1, 1)),
        split_made=True,
        leaked=0,
    )


@pytest.fixture
def world_of(tiny_clip: Clip, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Drift f64[WIDTH, WIDTH] -> a world; the number of the encoder stands first in its delta."""

    def make(drift: NDArray[np.float64]) -> World:
        world = World(tiny_clip, drift)

        def seen(model: Any, task: TaskData) -> NDArray[np.float32]:
            return world.seen(world.train[int(task.name)], round(float(model.delta[0])))

        def train_vision(model: Any, *others: Any) -> Trained:
            delta = model.delta[: dmc._vision(model.layout).total].copy()
            delta[0] += 1
            return Trained(delta, {}, [])

        monkeypatch.setattr(dmc._Model, "seen", seen)
        monkeypatch.setattr(dmc._Model, "train_vision", train_vision)
        return world

    return make


def turned() -> NDArray[np.float64]:
    found, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((WIDTH, WIDTH)))
    return np.asarray(found)


def test_replay_and_calibration_keep_old_classes_under_a_symmetric_drift(world_of: Any) -> None:
    basis = turned()
    world = world_of((basis * np.exp(0.5 * np.random.default_rng(2).standard_normal(WIDTH))) @ basis.T)
    last = {mode: world.last(dmc__memory_calibration=mode) for mode in ("none", "ot", "linear")}
    nothing_replayed = world.last(dmc__memory_calibration="linear", dmc__replay=0.0)
    assert min(last["ot"], last["linear"]) > last["none"] + 0.04, last
    assert last["none"] > nothing_replayed + 0.04, (last, nothing_replayed)


def test_a_turn_of_the_space_is_followed_by_regression_alone(world_of: Any) -> None:
    planes = np.eye(WIDTH)
    for first in range(0, WIDTH, 2):
        planes[first : first + 2, first : first + 2] = [[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]]
    basis = turned()
    world = world_of(basis @ planes @ basis.T)
    last = {mode: world.last(dmc__memory_calibration=mode) for mode in ("none", "ot", "linear")}
    assert last["linear"] > max(last["none"], last["ot"]) + 0.05, last
    told = world.last(dmc__memory_calibration="linear", memory__discriminant=True)
    assert told > last["linear"] + 0.05, "Gaussians that followed know more than prompts learned from them"
