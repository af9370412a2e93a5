"""Whether pictures still look like what a version has learned: similarity to prototypes, a Kolmogorov-Smirnov test.

Each picture belongs to the task whose prototype is nearest to it in the space of θ⁰. The similarities of a task's new
pictures are compared with those of the training pictures that were held out when it was learned. The test is one-sided
(new pictures are less similar), since pictures that are more typical than before need no new task. Our reconstruction:
the papers have no such test.

Legend: B pictures, C classes of all tasks, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from condu_ray.config import ModelSpec
from condu_ray.data import Skipped, open_pictures
from condu_ray.data.loading import BATCH, in_batches, unlabelled
from condu_ray.errors import NotFound
from condu_ray.models.load import load
from condu_ray.store import open_store
from condu_ray.voting.classifier import TaskExpert
from condu_ray.voting.open import task_experts

MOST_PICTURES = 1000  # that are looked at: a test of two distributions needs no more
FEWEST = 8
"""Pictures on each side below which a test says nothing."""

P_VALUE = 0.01
"""Divided by the number of tasks tested (Bonferroni)."""

DISTANCE = 0.25
"""Least distance of the two distributions that counts: with many pictures every small difference is significant."""


@dataclass(frozen=True)
class TaskDrift:
    """One task, and the new pictures that are nearest to it.

    pictures: how many. similarity, learned: median cosine similarity to the nearest prototype, of the new pictures and
    of held-out training pictures. distance, p: of the test; None where either side has too few pictures. drifted: the
    new ones are less similar, by much and not by chance.
    """

    name: str
    pictures: int
    similarity: float | None
    learned: float | None
    distance: float | None
    p: float | None
    drifted: bool


def drift(tasks: Sequence[TaskExpert], features: NDArray[np.float32]) -> list[TaskDrift]:
    """For each task, how its share of pictures with unit features f32[B, D] compares with what was learned."""
    from scipy.stats import ks_2samp

    nearest, similarity = _nearest(tasks, features)
    sides: list[tuple[str, NDArray[np.float64], NDArray[np.float64]]] = []
    for index, task in enumerate(tasks):
        owner, held = _nearest(tasks, task.prototypes.held_out)
        sides.append((task.name, similarity[nearest == index], held[owner == index]))
    tested = sum(min(len(new), len(held)) >= FEWEST for _, new, held in sides)
    found = []
    for name, new, held in sides:
        distance = p = None
        if min(len(new), len(held)) >= FEWEST:
            result = ks_2samp(new, held, alternative="greater")  # the new ones' distribution function lies above
            distance, p = float(result.statistic), float(result.pvalue)
        away = p is not None and distance is not None and p < P_VALUE / tested and distance >= DISTANCE
        found.append(TaskDrift(name, len(new), _median(new), _median(held), distance, p, away))
    return found


def examine(
    url: str,
    version: int | None,
    data: Sequence[str | Path],
    progress: Callable[[int, int, str], None],
    on_skipped: Callable[[Skipped], None] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Compares pictures (files and folders; at most 1000 of them, drawn with a fixed seed) with a version.

    on_skipped: as in `open_pictures`. device: where they are looked at. Returns {"version", "pictures": how many were
    looked at, "of": how many there are, "tasks": `TaskDrift` as objects, "drifted": share of the pictures that are
    nearest to a task that they no longer look like}. Raises NotFound where nothing is learned, DataError for a path
    that is no picture.
    """
    store = open_store(url)
    manifest = store.manifest(version)
    tasks = task_experts(store, manifest)
    if not tasks:
        raise NotFound(f"version {manifest.version} has learned no task", "learn one with `condu-ray learn`")
    found = open_pictures(data, on_skipped)
    chosen = np.sort(np.random.default_rng(0).permutation(len(found))[:MOST_PICTURES])
    clip = load(ModelSpec(**store.header.model), device, expect_sha256=store.header.model_sha256)
    pictures, parts = unlabelled([found[index] for index in chosen], clip.eval_transform), []
    for pixels, _ in in_batches(pictures, BATCH, torch.get_num_threads()):
        parts.append(clip.images(pixels).cpu().numpy())
        progress(sum(map(len, parts)), len(pictures), "")
    rows = drift(tasks, np.concatenate(parts))
    return {
        "version": manifest.version,
        "pictures": len(pictures),
        "of": len(found),
        "tasks": [asdict(row) for row in rows],
        "drifted": sum(row.pictures for row in rows if row.drifted) / len(pictures),
    }


def _nearest(
    tasks: Sequence[TaskExpert], features: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(index of the task with the nearest prototype i64[B], cosine similarity to it f64[B])."""
    features = np.asarray(features, np.float64)
    best = np.stack([(features @ task.prototypes.unit.T.astype(np.float64)).max(axis=1) for task in tasks])
    return best.argmax(axis=0), best.max(axis=0)


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None
