"""One run of `learn` from start to end: pictures, store, cluster, session, tracking."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.data import describe
from condu_ray.engine.cluster import Cluster, connected
from condu_ray.engine.figures import unmeasured
from condu_ray.engine.plan import header_of, open_data, plan
from condu_ray.engine.progress import Stage
from condu_ray.engine.ray_crew import RayCrew
from condu_ray.engine.reach import check_reached, one_of
from condu_ray.engine.room import room
from condu_ray.engine.session import learn, to_learn
from condu_ray.paths import check_lasting
from condu_ray.store import Manifest, absolute_url, create_store, open_store
from condu_ray.store.header import open_existing
from condu_ray.store.history import newest, readable
from condu_ray.tracking.history import draw
from condu_ray.tracking.mlflow_run import Tracking, open_tracking
from condu_ray.tracking.replay import record


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
    check_lasting(absolute_url(config.store), f"--store {config.store}")
    tasks = open_data(config, stage)
    store = open_existing(config.store)
    missing = to_learn(store, config, tasks) if store else tasks
    tracking, away = _tracking(config)
    made: list[Manifest] = []
    if missing:
        header = None if store else header_of(config)[0]
        with connected(cluster) as joined, ThreadPoolExecutor(1) as aside:
            found = room(config, len(missing), joined, stage)
            if header:
                store = create_store(config.store, header)
            assert store is not None
            pictures = one_of({task.name: task.train for task in missing})
            check_reached(found, {"the store": f"{store.url}/store.json", **pictures})
            crew = RayCrew(store, config, found)
            if tracking:
                aside.submit(tracking.prepare)  # what is wrong comes up again, and is told, when it records
            try:
                made = learn(store, config, tasks, crew, stage)
            finally:
                crew.close()
    assert store is not None
    manifest = newest(store)
    assert manifest is not None
    warnings = [away] if away else []
    if made:
        lost = unmeasured(made[-1])
        warnings += [f"the test pictures of {name} are gone or have changed: it has no figure now" for name in lost]
    if tracking:
        names = {task.name for task in tasks}
        versions = {card.learned_in for card in manifest.tasks if card.name in names}
        warnings += record(store, tracking, versions, stage, source)
    return Outcome([describe(task) for task in tasks], made, manifest, warnings)


def dry_run(config: SessionConfig, stage: Stage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(what was found, the plan); nothing is written and no cluster started."""
    tasks = open_data(config, stage)
    store = open_existing(config.store)
    if store:
        to_learn(store, config, tasks)
    return [describe(task) for task in tasks], plan(config, tasks)


def _tracking(config: SessionConfig) -> tuple[Tracking | None, str | None]:
    """Where runs go, None for nowhere; and a warning where it does not answer now."""
    if config.tracking == "off":
        return None, None
    tracking = open_tracking(config.tracking, config.store)
    return tracking, tracking.check()


def draw_store(url: str, folder: Path) -> list[Path]:
    """Draws the pictures of a store's newest version."""
    return draw(readable(open_store(url))[0], folder)
