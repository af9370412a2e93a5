"""Room for a session's workers: what the cluster has, or what its autoscaler brings in time."""

from __future__ import annotations

import time
from typing import Any

from ray.util import placement_group, remove_placement_group

from condu_ray.config import SessionConfig
from condu_ray.engine.cluster import Cluster, seen
from condu_ray.engine.placement import check_workers
from condu_ray.engine.progress import Stage
from condu_ray.errors import TrainingError

LOOK_SECONDS = 1.0


def room(config: SessionConfig, jobs: int, cluster: Cluster, stage: Stage) -> Cluster:
    """The cluster as it is once the workers of so many trainings fit.

    A cluster that was joined is given `config.node_wait_seconds` to grow. Raises TrainingError where the cluster is,
    and stays, too small.
    """
    try:
        check_workers(config, jobs, cluster)
    except TrainingError:
        if not cluster.joined or not config.node_wait_seconds:
            raise
        return _grown(config, jobs, cluster, stage)
    return cluster


def _grown(config: SessionConfig, jobs: int, cluster: Cluster, stage: Stage) -> Cluster:
    """Asks by a placement group that waits for what is lacking: it stands beside those of other sessions, and goes with
    this process however that ends. What is asked of the autoscaler itself replaces what others asked, and stays."""
    begun, longest = time.monotonic(), config.node_wait_seconds
    asked, waiting = list[dict[str, float]](), list[Any]()
    try:
        with stage("waiting for nodes") as update:
            while True:
                wanted = _bundles(config, cluster)
                if wanted != asked:  # with the first GPU that is seen, each worker wants one
                    _give_up(waiting)
                    waiting.append(placement_group(wanted))
                    asked = wanted
                waited = time.monotonic() - begun
                update(min(int(waited), int(longest)), int(longest), f"s; the cluster has {len(cluster.nodes)} nodes")
                try:
                    check_workers(config, jobs, cluster)
                    return cluster
                except TrainingError:
                    if waited >= longest:
                        raise
                time.sleep(LOOK_SECONDS)
                cluster = seen(cluster.joined)
    finally:
        _give_up(waiting)


def _give_up(waiting: list[Any]) -> None:
    while waiting:
        remove_placement_group(waiting.pop())


def _bundles(config: SessionConfig, cluster: Cluster) -> list[dict[str, float]]:
    """What the workers need, each on one node."""
    one: dict[str, float] = {"CPU": config.cpus_per_worker or 1}
    if config.gpu == "auto" and cluster.gpus:
        one["GPU"] = config.gpus_per_worker
    return [one] * (config.workers or 1)
