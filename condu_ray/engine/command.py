"""One run of `learn` from start to end: pictures, store, cluster, session, tracking."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData, describe
from condu_ray.engine.cluster import Cluster, connected
from condu_ray.engine.crew import RayCrew
from condu_ray.engine.plan import header_of, open_data, plan
from condu_ray.engine.session import Stage, learn, newest, to_learn
from condu_ray.engine.train import check_workers
from condu_ray.store import Manifest, Store, create_store, open_store
from condu_ray.store.header import open_existing
from condu_ray.tracking.history import accuracy_matrix, draw, histories
from condu_ray.tracking.mlflow_run import Tracking, open_tracking
from condu_ray.tracking.pictures import draw_history


@dataclass(frozen=True)
class Outcome:
    """What a session did. made: versions of this run; newest: what the store holds now; warnings: sentences to show."""

    data: list[dict[str, Any]]
    made: list[Manifest]
    newest: Manifest
    warnings: list[str] = field(default_factory=list)


def run(config: SessionConfig, stage: Stage, source: str, cluster: Cluster | None = None) -> Outcome:
    """Learns the tasks of `config`; given again, it does only what is missing.

    source: what asked for it, for the tracking. cluster: one that the caller is connected to; None: connects where
    there is something to learn. Raises ConduError for bad input, before anything is written.
    """
    tasks = open_data(config, stage)
    store = open_existing(config.store)
    missing = to_learn(store, config, tasks) if store else tasks
    tracking = _tracking(config)
    made: list[Manifest] = []
    if missing:
        header = None if store else header_of(config)[0]
        with connected(cluster) as found:
            check_workers(config, len(missing), found)
            if header:
                store = create_store(config.store, header)
            assert store is not None
            crew = RayCrew(store, config, found)
            try:
                made = learn(store, config, tasks, crew, stage)
            finally:
                crew.close()
    assert store is not None
    manifest = newest(store)
    assert manifest is not None
    warnings = record(store, tracking, tasks, stage, source) if tracking else []
    return Outcome([describe(task) for task in tasks], made, manifest, warnings)


def dry_run(config: SessionConfig, stage: Stage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what was found, the plan); nothing is written and no cluster started."""
    tasks = open_data(config, stage)
    store = open_existing(config.store)
    if store:
        to_learn(store, config, tasks)
    return [describe(task) for task in tasks], plan(config, tasks)


def _tracking(config: SessionConfig) -> Tracking | None:
    if config.tracking == "off":
        return None
    tracking = open_tracking(config.tracking, config.store)
    tracking.check()
    return tracking


def record(store: Store, tracking: Tracking, tasks: Sequence[TaskData], stage: Stage, source: str) -> list[str]:
    """Tells MLflow of every version that learned one of `tasks`, unless it knows; returns sentences of warning."""
    manifests = [store.manifest(version) for version in store.versions()]
    newest = manifests[-1]
    names = {task.name for task in tasks}
    versions = {card.learned_in for card in newest.tasks if card.name in names}
    wanted = [manifest for manifest in manifests if manifest.version in versions]
    warnings = []
    with stage("recording") as update, tempfile.TemporaryDirectory() as folder:
        for index, manifest in enumerate(wanted):
            until = [each for each in manifests if each.version <= manifest.version]
            picture = Path(folder) / f"accuracy_over_versions_{manifest.version}.png"
            draw_history(histories(until), picture)
            losses, matrix = manifest.figures.get("losses", {}), accuracy_matrix(until)
            warning = tracking.record(manifest, losses, matrix, [picture], source)
            warnings += [warning] if warning else []
            update(index + 1, len(wanted), "")
    return warnings


def draw_store(url: str, folder: Path) -> list[Path]:
    """Draws the pictures of a store's newest version."""
    store = open_store(url)
    return draw([store.manifest(version) for version in store.versions()], folder)
