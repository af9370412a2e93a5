"""The one place that starts Ray or joins a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from condu_ray.errors import TrainingError

NAMESPACE = "condu-ray"
REACH_SECONDS = 20.0
PRIVATE = {
    # No node of it is taken away with a warning: that watcher would be one more process to wait for.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Nobody listens there, and it has no dashboard. Ray Train asks one whether its controller still lives: it would
    # look for 20 s, and where it found another cluster's, take the workers of this one away as nobody's.
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
}
"""What Ray Train reads from the environment in a cluster of this process's own."""
_RELEASES = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
_TOKEN = secrets.token_hex(32)
"""The token of every cluster that this process starts: Ray reads its environment variable only once."""


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
                _reach(os.environ["RAY_ADDRESS"])
                ray.init(**quiet)
            else:
                # Ray's ports are open to the network, and who reaches them can run code. Unless told otherwise it asks
                # for a token: one of this process's own, so that none is written into the home folder.
                if "RAY_AUTH_MODE" not in os.environ:
                    os.environ.setdefault("RAY_AUTH_TOKEN", _TOKEN)
                os.environ |= PRIVATE
                ray.init(address="local", include_dashboard=False, **quiet)
        except Exception as error:
            # ConnectionError, RuntimeError, ValueError; and a bare Exception where a busy machine is slow to start Ray.
            raise _refused(error, joined) from error
    return seen(joined)


def _refused(error: Exception, joined: bool) -> TrainingError:
    """What Ray says, in one sentence; of other releases it says it in seven lines."""
    place = f"Ray cluster {os.environ.get('RAY_ADDRESS', 'on this machine')}"
    releases = _RELEASES.findall(str(error))
    if len(releases) == 2:
        there, here = (f"Ray {each[0]} and Python {each[1]}" for each in releases)
        return TrainingError(f"{place} runs {there}, this process {here}", "use the same releases on every node")
    said = str(error).strip().splitlines() or [type(error).__name__]
    reason = f"{said[0]} {said[-1].strip()}" if said[0].endswith(":") else said[0]
    mend = "check RAY_ADDRESS and RAY_AUTH_MODE, or unset RAY_ADDRESS to run on this machine"
    if not joined:
        mend = "close what else uses this machine's cores, and run the same command again"
    return TrainingError(f"{place}: {reason}", mend)


def seen(joined: bool) -> Cluster:
    """The nodes that are there now."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Cluster(tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found), joined)


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()


def disconnect(cluster: Cluster) -> None:
    """Stops a cluster that `connect` started; leaves one that it joined."""
    if not cluster.joined:
        ray.shutdown()


@contextlib.contextmanager
def connected(given: Cluster | None = None) -> Iterator[Cluster]:
    """A cluster for as long as the block runs: the one given, which goes on after, else one from `connect`.

    What is printed in the block goes to standard error: Ray's own listener prints what died on standard output, which
    belongs to the command's answer.
    """
    if given is not None:
        yield given
        return
    with contextlib.redirect_stdout(sys.stderr), _restored("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *PRIVATE):
        cluster = connect()
        try:
            yield cluster
        finally:
            disconnect(cluster)


@contextlib.contextmanager
def _restored(*names: str) -> Iterator[None]:
    """Puts variables of the environment back at the end: what comes after may belong to another cluster."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
