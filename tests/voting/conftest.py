"""Three tasks of coloured pictures on the tiny model, with experts that differ from it in both towers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from condu_ray.config import VoteConfig
from condu_ray.models.clip import Clip, Overrides, class_means, expert_overrides
from condu_ray.voting.classifier import Classifier, TaskExpert
from condu_ray.voting.labels import LabelSpace
from condu_ray.voting.prototypes import FeatureSums, make_prototypes
from condu_ray.voting.router import Calibrated

UNCALIBRATED = Calibrated()
CLASSES = {"pets": ("cat", "dog"), "signs": ("stop", "cat", "give way"), "fruit": ("apple", "pear")}


def _coloured(count: int, seed: int) -> Tensor:
    """Pictures that differ most in their colours."""
    random = torch.Generator().manual_seed(seed)
    colours = 2 * torch.randn(count, 3, 1, 1, generator=random)
    return colours + 0.3 * torch.randn(count, 3, 32, 32, generator=random)


@pytest.fixture(scope="session")
def coloured() -> Callable[[int, int], Tensor]:
    """(count, seed) -> f32[count, 3, 32, 32]."""
    return _coloured


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """f32[12, 3, 32, 32]: pictures that no task was made from."""
    return _coloured(12, 99)


@pytest.fixture(scope="session")
def experts(tiny_clip: Clip) -> tuple[TaskExpert, ...]:
    made = []
    for seed, (name, classes) in enumerate(CLASSES.items()):
        templates = (f"{name}: {{c}}.", "a photo of a {c}.")
        features = tiny_clip.images(_coloured(4 * len(classes), seed)).numpy()
        labels = np.arange(len(features)) // 4
        sums = FeatureSums.zero(len(classes), 32).add(features, labels)
        held_out = tiny_clip.images(_coloured(8, seed + 50)).numpy()
        texts = class_means(tiny_clip, LabelSpace.of_candidates(classes, templates).prompts).numpy()
        made.append(TaskExpert(name, classes, templates, make_prototypes(sums, texts, held_out)))
    return tuple(made)


@pytest.fixture(scope="session")
def overrides(tiny_clip: Clip) -> dict[str, Overrides]:
    base = dict(tiny_clip.model.named_parameters())
    moved = ("visual.proj", "visual.conv1.weight", "text_projection", "token_embedding.weight")
    random = np.random.default_rng(0)
    return {
        task: expert_overrides(
            tiny_clip, {name: random.normal(scale=0.05, size=base[name].shape).astype(np.float32) for name in moved}
        )
        for task in CLASSES
    }


@pytest.fixture(scope="session")
def make(
    tiny_clip: Clip, experts: tuple[TaskExpert, ...], overrides: dict[str, Overrides]
) -> Callable[..., Classifier]:
    """Builds a classifier; keyword arguments other than these are settings of the vote."""

    def build(
        experts: tuple[TaskExpert, ...] = experts,
        expert_of: Callable[[str], Overrides | None] = overrides.__getitem__,
        calibrated: Calibrated = UNCALIBRATED,
        cache: int = 8,
        **vote: object,
    ) -> Classifier:
        return Classifier(tiny_clip, experts, expert_of, VoteConfig.model_validate(vote), calibrated, 7, cache)

    return build
