"""The linear probe: logistic regression on what θ⁰ sees, one a task, the task named."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.benchmark.evaluation import Tests
from condu_ray.engine.crew import Crew
from condu_ray.engine.progress import Stage
from condu_ray.store.documents import read, write
from condu_ray.voting.prototypes import HELD_OUT_SHARE, held_out_indices

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""Inverse strengths of the L2 penalty; the best on a held-out fifth of the training pictures is taken, as CLIP did."""
MOST_STEPS = 1000
BYTES = 4  # a weight in float32


def probe_tasks(tests: Tests, seed: int, crew: Crew, path: Path, stage: Stage) -> None:
    """Writes what `read_probe` reads of each task, unless it is there."""
    done: dict[str, Any] = dict(read_probe(path))
    for name, (task, pictures) in tests.items():
        if name in done:
            continue
        with stage(f"linear probe of {name}") as update:
            begun = time.monotonic()
            train = crew.features(task.train, update).unit
            weights = fit(train, task.train.labels, seed)
            seconds = time.monotonic() - begun
            test = crew.features(pictures, update).unit
        right = weights.predict(test) == pictures.labels
        size = BYTES * (weights.coef_.size + weights.intercept_.size)
        done[name] = {"accuracy": 100 * float(right.mean()), "seconds": seconds, "bytes": size}
        write(path, done)


def read_probe(path: Path) -> Mapping[str, Any]:
    """Task -> {"accuracy": percent, "seconds", "bytes"} of those that were measured."""
    found: Mapping[str, Any] = read(path) or {}
    return found


def fit(features: NDArray[np.float32], labels: NDArray[np.int64], seed: int) -> Any:
    """scikit-learn's logistic regression over unit features f32[N, D] and labels i64[N]."""
    held = held_out_indices(labels, seed, count=len(labels) // HELD_OUT_SHARE)
    rest = np.setdiff1d(np.arange(len(labels)), held)
    strength = STRENGTHS[len(STRENGTHS) // 2]
    if len(held):
        scores = [_fitted(features[rest], labels[rest], each).score(features[held], labels[held]) for each in STRENGTHS]
        strength = STRENGTHS[int(np.argmax(scores))]
    return _fitted(features, labels, strength)


def _fitted(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # A hair from the optimum the answers are the same; what matters is measured.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=MOST_STEPS).fit(features.astype(np.float64), labels)
