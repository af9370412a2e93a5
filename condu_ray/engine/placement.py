"""How many workers train, of what size: what the settings ask for, and what the nodes have room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from condu_ray.config import SessionConfig
from condu_ray.errors import TrainingError

if TYPE_CHECKING:
    from condu_ray.engine.cluster import Cluster


@dataclass(frozen=True)
class Group:
    """How the work is spread: `shared` means that all workers train each task together. gpus_each: 0 on CPUs."""

    workers: int
    cpus_each: int
    gpus_each: float
    shared: bool


def plan_group(config: SessionConfig, jobs: int, ordered: bool, cluster: Cluster) -> Group:
    """Decides on workers; raises TrainingError where the cluster is too small, since Ray would wait for ever, and for
    tasks that are to be trained at once by a system that goes on from task to task.

    Counts all jobs of the command, finished or not: the threads of a worker must not depend on where it stopped.
    """
    if ordered and config.parallel == "tasks" and jobs > 1:
        raise TrainingError(
            f"{config.method} learns one task after another, so {jobs} tasks cannot be trained at once",
            "leave --parallel tasks out",
        )
    gpus_each = config.gpus_per_worker if config.gpu == "auto" and cluster.gpus > 0 else 0.0
    shared = config.parallel == "data" or (config.parallel == "auto" and (jobs == 1 or ordered) and gpus_each > 0)
    if shared and 0 < gpus_each < 1:
        raise TrainingError(
            f"workers that train a task together need a whole GPU each, not {gpus_each}",
            "leave --gpus-per-worker out, or use --parallel tasks",
        )
    room = places(config.cpus_per_worker or 1, gpus_each, cluster)
    if gpus_each and not room:
        raise TrainingError(
            f"no node has a GPU with {config.cpus_per_worker or 1} CPU core beside each worker",
            "use fewer --cpus-per-worker, or --gpu no",
        )
    # Of those that share a batch each needs a picture of it.
    most = min(room, config.train.batch_size) if shared else min(room, 1 if ordered else jobs)
    workers = config.workers or max(1, most)
    if not shared:
        workers = min(workers, 1 if ordered else jobs)
    if workers > room:
        raise TrainingError(
            f"{workers} workers need {_need(workers, config.cpus_per_worker, gpus_each)}, the cluster has {room}"
            + (" such places" if config.cpus_per_worker else ""),
            f"use --workers {max(1, room)}" + (" or fewer --cpus-per-worker" if config.cpus_per_worker else ""),
        )
    return Group(workers, config.cpus_per_worker or _cpus_each(workers, gpus_each, cluster), gpus_each, shared)


def check_workers(config: SessionConfig, jobs: int, cluster: Cluster) -> None:
    """Raises TrainingError where the cluster is too small for the workers that are asked for."""
    info = config.system
    if info.trains:
        plan_group(config, jobs, info.ordered, cluster)


def places(cpus_each: int, gpus_each: float, cluster: Cluster) -> int:
    """How many workers of this size the nodes have room for."""
    return sum(_room(node, cpus_each, gpus_each) for node in cluster.nodes)


def _room(node: tuple[int, int], cpus_each: int, gpus_each: float) -> int:
    cores, gpus = node
    if not gpus_each:
        return cores // cpus_each
    # Ray takes a fraction of one GPU, never of two.
    most = gpus * int(1 / gpus_each + 1e-9) if gpus_each < 1 else int(gpus / gpus_each)
    return min(cores // cpus_each, most)


def _need(workers: int, cpus_each: int | None, gpus_each: float) -> str:
    if cpus_each:
        return f"{cpus_each} CPU cores each" + (f" beside {gpus_each:g} GPU" if gpus_each else "")
    return f"{workers * gpus_each:g} GPUs" if gpus_each else f"{workers} CPU cores"


def _cpus_each(workers: int, gpus_each: float, cluster: Cluster) -> int:
    """The most cores a worker can have if each must find them on one node."""
    for cpus in range(max(1, cluster.cpus // workers), 0, -1):
        if sum(_room(node, cpus, gpus_each) for node in cluster.nodes) >= workers:
            return cpus
    raise TrainingError(f"{workers} workers find no {workers} GPUs with a CPU core beside each", "use fewer --workers")
