"""MLflow as a mirror of the store: whatever it lacks is told again, from the manifests alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from condu_ray.errors import ConfigError, StoreError
from condu_ray.store import Store, open_store
from condu_ray.tracking.history import accuracy_matrix, histories
from condu_ray.tracking.mlflow_run import Tracking, open_tracking
from condu_ray.tracking.pictures import draw_history

Stage = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]


def record(store: Store, tracking: Tracking, versions: Collection[int], stage: Stage, source: str) -> list[str]:
    """Tells MLflow of these versions, unless it knows, oldest first; returns sentences of warning.

    source: what asked for it. Raises StoreError for one of them that cannot be read; others are left out of pictures.
    """
    manifests = []
    for version in store.versions():
        try:
            manifests.append(store.manifest(version))
        except StoreError:
            if version in versions:
                raise
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


def track(url: str, uri: str | None, replay: bool, stage: Stage) -> dict[str, Any]:
    """Which versions of the store MLflow knows; with `replay`, it is told of the others first.

    Returns {"tracking": URI, "versions", "recorded", "missing": numbers}. Raises ConfigError where MLflow cannot be
    asked or told.
    """
    store, tracking = open_store(url), open_tracking(uri, url)
    versions = store.versions()
    if away := tracking.check():
        raise ConfigError(away, "start it first")
    recorded = tracking.recorded()
    missing = [version for version in versions if version not in recorded]
    if replay and missing:
        warnings = record(store, tracking, missing, stage, "condu-ray track --replay")
        if warnings:
            raise ConfigError(warnings[0], "start the server first, and run the same command again")
        recorded = tracking.recorded()
        missing = [version for version in versions if version not in recorded]
    known = [version for version in versions if version in recorded]
    return {"tracking": tracking.shown, "versions": versions, "recorded": known, "missing": missing}
