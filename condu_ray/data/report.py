"""What was found when a task's data was opened, as plain values for a table or JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from condu_ray.data.task import Split, TaskData


def describe(task: TaskData) -> dict[str, Any]:
    """Returns what a user wants to know about the data before training on it; every value is JSON."""
    return {
        "name": task.name,
        "source": task.source,
        "fingerprint": task.fingerprint,
        "classes": list(task.classes),
        "templates": list(task.templates),
        "train": _counts(task.train, len(task.classes)),
        "test": _counts(task.test, len(task.classes)),
        "split_made": task.split_made,
        "width": dict(zip(("min", "median", "max"), task.sizes.width, strict=True)),
        "height": dict(zip(("min", "median", "max"), task.sizes.height, strict=True)),
        "skipped": [{"path": one.path, "reason": one.reason} for one in task.skipped],
        "leaked": task.leaked,
    }


def _counts(split: Split, classes: int) -> dict[str, int]:
    each = np.bincount(split.labels, minlength=classes)
    return {"pictures": len(split), "least_per_class": int(each.min()), "most_per_class": int(each.max())}
