"""The one place that starts Ray or joins a cluster."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import ray

from condu_ray.errors import TrainingError

NAMESPACE = "condu-ray"


@dataclass(frozen=True)
class Cluster:
    """What can be asked for. nodes: (CPU cores, GPUs) of each; joined: it was running before and goes on after."""

    nodes: tuple[tuple[int, int], ...]
    joined: bool

    @property
    def cpus(self) -> int:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(gpus for _, gpus in self.nodes)


def connect() -> Cluster:
    """Joins the cluster of RAY_ADDRESS (set inside `ray job submit`), else starts one on this machine."""
    joined = bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()
    if not ray.is_initialized():
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        try:
            if joined:
                ray.init(**quiet)
            else:
                # A private cluster on loopback, gone with this process: it needs no token, and leaves none behind.
                os.environ.setdefault("RAY_AUTH_MODE", "disabled")
                ray.init(address="local", include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"Ray cluster {os.environ.get('RAY_ADDRESS', 'on this machine')}: {reason}",
                "check RAY_ADDRESS and RAY_AUTH_MODE, or unset RAY_ADDRESS to run on this machine",
            ) from error
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found), joined)


def disconnect(cluster: Cluster) -> None:
    """Stops a cluster that `connect` started; leaves one that it joined."""
    if not cluster.joined:
        ray.shutdown()
