"""What `evaluate` counts, in this process; tests/cli/ runs the command on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_crew import InProcessCrew, learn_here, opened, settings, silent

from condu_ray.data import load_picture
from condu_ray.engine.evaluate import kept, scored
from condu_ray.engine.figures import learned_pictures
from condu_ray.sources import resolve
from condu_ray.store import Store, open_store
from condu_ray.store.header import fixed_settings
from condu_ray.voting.labels import LabelSpace
from condu_ray.voting.open import load_classifier

TASKS = ["colours", "stripes"]


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    config = settings(tmp_path_factory.mktemp("evaluate") / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, *TASKS))
    return open_store(config.store)


def evaluated(store: Store, labels: str) -> dict[str, Any]:
    config, _ = resolve({}, fixed=fixed_settings(store.url))
    manifest = store.manifest()
    return scored(InProcessCrew(store, config), store, manifest, labels, kept(store, manifest), silent)


def test_evaluate_measures_each_task_and_their_union(store: Store) -> None:
    manifest, classifier = store.manifest(), load_classifier(store.url)
    union = evaluated(store, "union")
    assert [row["name"] for row in union["tasks"]] == TASKS
    assert [row["pictures"] for row in union["tasks"]] == [card.pictures["test"] for card in manifest.tasks]
    for row, (name, pictures) in zip(union["tasks"], learned_pictures(store, manifest).items(), strict=True):
        card = manifest.task(name)
        assert card is not None
        pixels = torch.stack([classifier.clip.eval_transform(load_picture(each)) for each in pictures.pictures])
        said = [(answer.label.task, answer.label.name) for answer in classifier.classify(pixels)]
        right = [(name, card.classes[label]) for label in pictures.labels]
        assert row["accuracy"] == 100 * np.mean([one == other for one, other in zip(said, right, strict=True)])
    assert union["mean"] == pytest.approx(np.mean([row["accuracy"] for row in union["tasks"]]))


def test_evaluate_with_candidates_asks_the_vote_among_a_tasks_own_classes(store: Store) -> None:
    manifest, classifier = store.manifest(), load_classifier(store.url)
    found = evaluated(store, "candidates")
    assert [row["name"] for row in found["tasks"]] == TASKS
    for row, pictures in zip(found["tasks"], learned_pictures(store, manifest).values(), strict=True):
        card = manifest.task(row["name"])
        pixels = torch.stack([classifier.clip.eval_transform(load_picture(each)) for each in pictures.pictures])
        space = LabelSpace.of_candidates(card.classes, card.templates)
        right = classifier.label_indices(pixels, space) == pictures.labels
        assert row["accuracy"] == pytest.approx(100 * right.mean())
