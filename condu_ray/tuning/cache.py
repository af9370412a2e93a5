"""What the search for settings of the vote starts from: the stream learned once, and what every voter says of every
validation picture. All of it stays in the sweep's own store, so a run that was killed does not do it again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from condu_ray.config import SessionConfig
from condu_ray.data import PictureSet, Split, TaskData
from condu_ray.engine import figures as measure
from condu_ray.engine.crew import Crew
from condu_ray.engine.evaluate import snapshot_of
from condu_ray.engine.progress import Stage
from condu_ray.engine.scoring import threads_of
from condu_ray.engine.session import learn
from condu_ray.errors import ConfigError
from condu_ray.models.load import load
from condu_ray.store import Manifest, ObjectRef, Store
from condu_ray.tuning.objectives import Goals, Row
from condu_ray.tuning.rescoring import Pictures, Version
from condu_ray.voting.labels import LabelSpace
from condu_ray.voting.open import task_experts
from condu_ray.voting.router import Calibrated

LARGEST = 8 * 2**30
"""Bytes of logits at most: every process that scores maps them."""

TIMED, TIMES = 16, 7  # pictures of a pass and passes, where passes are timed


@dataclass(frozen=True)
class Cached:
    """One reference a version, oldest first. passes: ms a picture of (θ⁰, one expert), where latency is asked for."""

    store: str
    pictures: ObjectRef
    versions: tuple[tuple[int, ObjectRef], ...]
    classes: tuple[tuple[str, ...], ...]
    zero_shot: Row
    passes: tuple[float, float] | None


def prepare(
    config: SessionConfig, tasks: Sequence[TaskData], goals: Goals, store: Store, crew: Crew, stage: Stage
) -> Cached:
    """Learns what is missing of the stream, asks every voter, and returns where the answers are.

    tasks: `test` holds the validation pictures. Raises ConfigError where the logits would be too large to hold.
    """
    tests = {task.name: measure.test_pictures(task, config) for task in tasks}
    first = 0 if goals.unseen else len(tasks) - 1
    _check_size(tasks, tests, first)
    learn(store, config, tasks, crew, stage)
    manifests = [store.manifest(version + 1) for version in range(first, len(tasks))]
    every = Split(tuple(p for split in tests.values() for p in split.pictures), _labels(tests))
    pictures = _pictures(store, manifests[-1], tasks, tests, every, crew, stage)
    space = LabelSpace.of_union(tasks)
    versions = tuple((each.version, _logits(store, each, every, space, crew, stage)) for each in manifests)
    row: Row = [None] * len(tasks)
    if goals.unseen:
        with stage("zero-shot") as update:
            questions = [measure.ask("base", task, tests[task.name]) for task in tasks]
            row = [*crew.score(questions, None, update)]
    classes = tuple(task.classes for task in tasks)
    return Cached(store.url, pictures, versions, classes, row, _timed(store, config, every) if goals.timed else None)


def load_versions(cached: Cached, store: Store) -> list[Version]:
    """Reads it back; arrays stay memory-mapped."""
    pictures = Pictures(classes=cached.classes, **store.get(cached.pictures))
    found = []
    for number, ref in cached.versions:
        manifest = store.manifest(number)
        limits = Calibrated.from_state(manifest.state)
        found.append(Version(pictures, task_experts(store, manifest), store.get(ref)["logits"], limits))
    return found


def _labels(tests: dict[str, Split]) -> np.ndarray:
    return np.concatenate([split.labels for split in tests.values()])


def _check_size(tasks: Sequence[TaskData], tests: dict[str, Split], first: int) -> None:
    pictures, labels = sum(len(split) for split in tests.values()), sum(len(task.classes) for task in tasks)
    size = 4 * pictures * labels * sum(learned + 2 for learned in range(first, len(tasks)))
    if size > LARGEST:
        raise ConfigError(
            f"what all voters say of {pictures} pictures and {labels} labels takes {size / 2**30:.0f} GiB",
            f"use a smaller session.eval_pictures (it was {max(len(split) for split in tests.values())}), "
            "or the objective last alone, which asks the newest version only",
        )


def _pictures(
    store: Store,
    last: Manifest,
    tasks: Sequence[TaskData],
    tests: dict[str, Split],
    every: Split,
    crew: Crew,
    stage: Stage,
) -> ObjectRef:
    key = f"rescoring-{last.version}"
    found = store.find(key, "pictures")
    if found is None:
        with stage("features of the validation pictures") as update:
            seen = crew.features(every, update)
        owners = np.repeat(np.arange(len(tasks)), [len(split) for split in tests.values()])
        starts = np.cumsum([0, *(len(task.classes) for task in tasks[:-1])])
        labels = every.labels + starts[owners]
        arrays = {"owners": owners.astype(np.int64), "labels": labels, "features": seen.unit, "domains": seen.domains}
        found = store.put(key, "pictures", arrays)
    return found


def _logits(store: Store, manifest: Manifest, every: Split, space: LabelSpace, crew: Crew, stage: Stage) -> ObjectRef:
    key = f"rescoring-{manifest.version}"
    found = store.find(key, "logits")
    if found is None:
        crew.hold(manifest)
        snapshot = snapshot_of(store, manifest)
        voters = [*(card.name for card in manifest.tasks), None]
        said = []
        for voter in voters:
            with stage(f"what {voter or 'the base model'} says, version {manifest.version}") as update:
                said.append(crew.logits(every, voter, space, snapshot, update))
        found = store.put(key, "logits", {"logits": np.stack(said)})
    return found


def _timed(store: Store, config: SessionConfig, every: Split) -> tuple[float, float]:
    """What `_passes` measured once: all configurations of a sweep are judged by the same times."""
    key = f"passes-{config.seed}"
    found = store.find(key, "passes") or store.put(key, "passes", {"ms": np.array(_passes(config, every))})
    base, expert = store.get(found)["ms"].tolist()
    return base, expert


def _passes(config: SessionConfig, every: Split) -> tuple[float, float]:
    """Milliseconds a picture of θ⁰ with its domain features, and of one expert (a pass of θ⁰ costs the same), on this
    machine's CPU by one thread."""
    clip = load(config.model_spec)
    loaded = PictureSet(every, clip.eval_transform)
    pixels = torch.stack([loaded[place][0] for place in range(min(TIMED, len(every)))])
    with threads_of(1), torch.no_grad():
        times = [(_ms(lambda: clip.features(pixels)), _ms(lambda: clip.images(pixels))) for _ in range(TIMES)]
    base, expert = (statistics.median(each) / len(pixels) for each in zip(*times, strict=True))
    return base, expert


def _ms(work: object) -> float:
    begun = time.perf_counter()
    work()  # type: ignore[operator]
    return 1000 * (time.perf_counter() - begun)
