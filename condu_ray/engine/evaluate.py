"""Measures a published version on test pictures, spread over the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.data import Split, TaskData
from condu_ray.engine import figures as measure
from condu_ray.engine.cluster import connected
from condu_ray.engine.crew import Crew
from condu_ray.engine.plan import open_data
from condu_ray.engine.progress import Stage
from condu_ray.engine.ray_crew import RayCrew
from condu_ray.engine.reach import check_reached, one_of
from condu_ray.engine.scoring import By, Snapshot
from condu_ray.errors import ConfigError, DataError, NotFound, nearest
from condu_ray.sources import resolve
from condu_ray.store import Manifest, Store, TaskCard, open_store
from condu_ray.voting.open import buffers_of, check_pictured, task_experts
from condu_ray.voting.router import Calibrated

BY: dict[str, By] = {"task": "named", "candidates": "vote", "union": "union"}
"""Label space -> who answers."""


def evaluate(url: str, version: int | None, labels: str, data: list[str], stage: Stage) -> dict[str, Any]:
    """Accuracy in percent on each task: {"version", "labels", "tasks": [{"name", "pictures", "accuracy"}], "mean"}.

    labels: `task` (each picture's task is named), `candidates` (the classes of its task are given, no task is named) or
    `union` (all learned classes compete). data: NAME=PATH to measure a learned task on its test split there; empty: the
    pictures that its session kept for testing.
    """
    if labels not in BY:
        raise ConfigError(f"--labels {labels} is not a label space", nearest(labels, BY))
    store = open_store(url)
    manifest = store.manifest(version)
    check_pictured(manifest)
    config, _ = resolve({"store": url, **({"tasks": data} if data else {})}, fixed=store.header.settings)
    config = config.model_copy(update={"vote": config.vote.model_validate(manifest.settings["vote"])})
    asked = _given(config, manifest, stage) if data else kept(store, manifest)
    with connected() as cluster:
        pictures = one_of({card.name: pictures for card, pictures in asked})
        check_reached(cluster, {"the store": f"{store.url}/store.json", **pictures})
        crew = RayCrew(store, config, cluster)
        try:
            return scored(crew, store, manifest, labels, asked, stage)
        finally:
            crew.close()


def scored(
    crew: Crew, store: Store, manifest: Manifest, labels: str, asked: Sequence[tuple[TaskCard, Split]], stage: Stage
) -> dict[str, Any]:
    """What `evaluate` says, from this crew and pictures of these tasks."""
    questions = [measure.ask(BY[labels], card, pictures) for card, pictures in asked]
    with stage(f"evaluating version {manifest.version}") as update:
        crew.hold(manifest)
        scores = crew.score(questions, snapshot_of(store, manifest), update)
    rows = [
        {"name": card.name, "pictures": len(pictures), "accuracy": score}
        for (card, pictures), score in zip(asked, scores, strict=True)
    ]
    return {"version": manifest.version, "labels": labels, "tasks": rows, "mean": sum(scores) / len(scores)}


def snapshot_of(store: Store, manifest: Manifest) -> Snapshot:
    """What answers in a published version, besides its state."""
    return Snapshot(
        f"version-{manifest.version}",
        tuple(task_experts(store, manifest)),
        buffers_of(store, manifest),
        Calibrated.from_state(manifest.state),
    )


def kept(store: Store, manifest: Manifest) -> list[tuple[TaskCard, Split]]:
    """Each task of a version with the test pictures of its session; raises where some are gone."""
    found = measure.learned_pictures(store, manifest)
    gone = [card.name for card in manifest.tasks if card.name not in found]
    if gone:
        raise DataError(
            f"the test pictures of {', '.join(gone)} are no longer where they were, or have changed",
            f"say where: --task {gone[0]}=PATH",
        )
    if not found:
        raise NotFound(f"version {manifest.version} has learned no task", "learn one with `condu-ray learn`")
    return [(card, found[card.name]) for card in manifest.tasks]


def _given(config: SessionConfig, manifest: Manifest, stage: Stage) -> list[tuple[TaskCard, Split]]:
    asked = []
    for name, source in config.tasks.items():
        card = manifest.card(name)
        # With its own seed, or pictures it was trained on would be among those to test on where the split is made here.
        share = card.settings.get("test_share", manifest.settings["test_share"])  # older tasks do not name it
        made_with = {"seed": card.settings["seed"], "test_share": share}
        (task,) = open_data(config.model_copy(update={"tasks": {name: source}, **made_with}), stage)
        _same_classes(card, task)
        asked.append((card, task.test))
    return asked


def _same_classes(card: TaskCard, task: TaskData) -> None:
    if list(task.classes) != card.classes:
        strange = next((name for name in task.classes if name not in card.classes), None)
        found = (
            f"class {strange} is not one of task {card.name}"
            if strange
            else f"the classes of {card.name} differ in number or order"
        )
        raise DataError(found, "evaluate on pictures of the classes that were learned")
