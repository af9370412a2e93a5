"""Where the router sends test pictures, and how well it tells learned domains from those still to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.benchmark.evaluation import Tests
from condu_ray.data import Split
from condu_ray.engine.crew import Crew
from condu_ray.engine.evaluate import snapshot_of
from condu_ray.engine.progress import Stage
from condu_ray.store import Manifest, Store


def route_versions(
    store: Store, versions: Sequence[Manifest], tests: Tests, crew: Crew, stage: Stage
) -> dict[str, Any]:
    """{"accuracy", "top2": percent or None, "auroc": 0 to 1 or None, "alone": percent}, see `router_shares`,
    `known_auroc` and `nearest_right`.

    accuracy, top2, alone: of the last version. auroc: mean over the versions that have tasks still to come.
    """
    owners = np.repeat(np.arange(len(tests)), [len(pictures) for _, pictures in tests.values()])
    every = [pictures for _, pictures in tests.values()]
    pictures = Split(
        tuple(each for split in every for each in split.pictures), np.concatenate([split.labels for split in every])
    )
    place = {name: index for index, name in enumerate(tests)}
    aurocs = []
    for manifest in versions:
        with stage(f"routing, version {manifest.version}") as update:
            sent = crew.route(pictures, snapshot_of(store, manifest), update)
        known = np.isin(owners, [place[card.name] for card in manifest.tasks])
        if not known.all():
            aurocs.append(known_auroc(sent.score, known))
    learned = np.array([place[card.name] for card in versions[-1].tasks])
    first, two = router_shares(learned[sent.order], owners)
    alone = nearest_right(sent.nearest, [len(card.classes) for card in versions[-1].tasks], learned, owners, pictures)
    return {"accuracy": first, "top2": two, "auroc": float(np.mean(aurocs)) if aurocs else None, "alone": alone}


def nearest_right(
    nearest: NDArray[np.int64],
    sizes: Sequence[int],
    learned: NDArray[np.int64],
    owners: NDArray[np.int64],
    tests: Split,
) -> float:
    """Percent of pictures whose nearest class by the router is theirs, mean over the tasks: no expert, all classes
    competing.

    nearest: i64[N], see `Sent`. sizes: classes of each task in the version's order, learned: i64[T], which task of the
    tests that is. owners: i64[N].
    """
    starts = np.empty(len(sizes), np.int64)
    starts[learned] = np.cumsum([0, *sizes[:-1]])
    right = nearest == starts[owners] + tests.labels
    return 100 * float(np.mean([right[owners == task].mean() for task in range(len(sizes))]))


def router_shares(order: NDArray[np.int64], owners: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Percent of pictures whose own task comes first, and among the first two; None where there is no choice.

    order: tasks i64[N, T] by how likely each picture is theirs, owners: i64[N].
    """
    hits = order == owners[:, None]
    tasks = order.shape[1]
    first = 100 * float(hits[:, 0].mean()) if tasks > 1 else None
    return first, 100 * float(hits[:, :2].any(axis=1).mean()) if tasks > 2 else None


def known_auroc(score: NDArray[np.float64], known: NDArray[np.bool_]) -> float:
    """Area under the curve: how often a picture of a learned task has a higher score than one of a task still to come
    (equal: half)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(known, score))
