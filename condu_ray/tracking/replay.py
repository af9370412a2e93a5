"""MLflow as a mirror of the store: whatever it lacks is told again, from the manifests alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from condu_ray.errors import ConfigError
from condu_ray.store import Manifest, Store, open_store
from condu_ray.store.history import readable
from condu_ray.tracking.history import accuracy_matrix, histories
from condu_ray.tracking.mlflow_run import LATER, Tracking, open_tracking
from condu_ray.tracking.pictures import draw_history

Stage = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]


def record(store: Store, tracking: Tracking, versions: Collection[int], stage: Stage, source: str) -> list[str]:
    """Tells MLflow of these versions, unless it knows, oldest first; returns sentences of warning.

    A server that has gone away is not asked for the rest: each version would wait for it for minutes.

    source: what asked for it. Raises StoreError for one of them that cannot be read; others are left out of pictures.
    """
    manifests, faults = readable(store)
    if wrong := sorted(faults.keys() & set(versions)):
        raise faults[wrong[0]]
    wanted = [manifest for manifest in manifests if manifest.version in versions]
    warnings = list[str]()
    with stage("recording") as update:
        for index, manifest in enumerate(wanted):
            until = [each for each in manifests if each.version <= manifest.version]
            warning = _record(tracking, manifest, until, source)
            warnings += [warning] if warning else []
            rest = wanted[index + 1 :]
            if warning and rest and tracking.away():
                warnings.append(f"nor was it asked for the {len(rest)} versions after it, since it is away.")
                break
            update(index + 1, len(wanted), "")
    return warnings


def _record(tracking: Tracking, manifest: Manifest, until: Sequence[Manifest], source: str) -> str | None:
    """Tells MLflow of a version. until: those up to it, for the picture."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / f"accuracy_over_versions_{manifest.version}.png"
            draw_history(histories(until), picture)
            losses, matrix = manifest.figures.get("losses", {}), accuracy_matrix(until)
            return tracking.record(manifest, losses, matrix, [picture], source)
    except OSError as error:  # the disk of temporary files is full
        what = f"version {manifest.version} is published, but was not recorded ({error.strerror or error})"
        return f"{what}; {LATER}."


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
