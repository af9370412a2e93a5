"""How many workers, with how many cores: decided before Ray is asked, which would wait for ever."""

from __future__ import annotations

from typing import Any

import pytest

from condu_ray.config import SessionConfig
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.placement import Group, check_workers, plan_group
from condu_ray.errors import TrainingError

LAPTOP = Cluster(((8, 0),), joined=False)
BOX = Cluster(((16, 4),), joined=False)


def plan(cluster: Cluster, jobs: int, ordered: bool = False, **settings: Any) -> Group:
    return plan_group(SessionConfig(**settings), jobs, ordered, cluster)


def test_small_tasks_get_a_worker_each() -> None:
    assert plan(LAPTOP, 3) == Group(3, 2, gpus_each=0, shared=False)
    assert plan(LAPTOP, 20) == Group(8, 1, gpus_each=0, shared=False)
    assert plan(LAPTOP, 3, workers=2) == Group(2, 4, gpus_each=0, shared=False)


def test_tasks_that_start_from_one_another_share_one_worker() -> None:
    assert plan(LAPTOP, 3, ordered=True) == Group(1, 8, gpus_each=0, shared=False)


def test_a_single_task_is_shared_by_all_gpus() -> None:
    assert plan(BOX, 1) == Group(4, 4, gpus_each=1, shared=True)
    assert plan(BOX, 2) == Group(2, 8, gpus_each=1, shared=False)
    assert plan(BOX, 1, gpu="no") == Group(1, 16, gpus_each=0, shared=False)


def test_no_more_workers_share_a_task_than_a_batch_has_pictures() -> None:
    """Or a large cluster would refuse what was asked for without any number of workers."""
    assert plan(Cluster(((64, 0),), joined=False), 1, parallel="data") == Group(32, 2, gpus_each=0, shared=True)
    assert plan(Cluster(((16, 8),) * 5, joined=True), 1) == Group(32, 2, gpus_each=1, shared=True)
    assert plan(BOX, 1, train={"batch_size": 3}) == Group(3, 5, gpus_each=1, shared=True)


def test_more_workers_than_places_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"9 workers need 9 CPU cores, the cluster has 8: use --workers 8"):
        plan(LAPTOP, 1, workers=9, parallel="data")
    with pytest.raises(TrainingError, match=r"5 workers need 5 GPUs, the cluster has 4"):
        plan(BOX, 1, workers=5)


def test_a_worker_never_needs_more_cores_than_its_node_has() -> None:
    """16 cores for 3 workers would be 5 each, but a node of 8 holds only one such."""
    two_nodes = Cluster(((8, 0), (8, 0)), joined=True)
    assert plan(two_nodes, 1, workers=3, parallel="data") == Group(3, 4, gpus_each=0, shared=True)


def test_a_gpu_without_a_core_beside_it_is_refused() -> None:
    with pytest.raises(TrainingError, match="no node has a GPU with 1 CPU core beside each worker"):
        plan(Cluster(((0, 2), (8, 0)), joined=True), 1)


def test_no_more_workers_than_ray_finds_places_for() -> None:
    """It takes a share of one GPU, never of two, and each worker's cores where its GPU is."""
    assert plan(Cluster(((16, 2),), joined=False), 3, gpus_per_worker=0.6).workers == 2
    assert plan(BOX, 20, gpus_per_worker=0.3).workers == 12
    assert plan(Cluster(((4, 1),), joined=False), 10, gpus_per_worker=0.1) == Group(4, 1, gpus_each=0.1, shared=False)
    assert plan(Cluster(((2, 4),), joined=False), 1, cpus_per_worker=1).workers == 2


def test_cores_of_a_worker_are_as_asked() -> None:
    assert plan(LAPTOP, 3, cpus_per_worker=4) == Group(2, 4, gpus_each=0, shared=False)
    assert plan(BOX, 1, cpus_per_worker=8) == Group(2, 8, gpus_each=1, shared=True)
    with pytest.raises(TrainingError, match=r"3 workers need 4 CPU cores each, the cluster has 2 such places"):
        plan(LAPTOP, 3, workers=3, cpus_per_worker=4)


def test_small_tasks_may_share_a_gpu() -> None:
    assert plan(BOX, 8, gpus_per_worker=0.5) == Group(8, 2, gpus_each=0.5, shared=False)
    with pytest.raises(TrainingError, match=r"a whole GPU each, not 0.5"):
        plan(BOX, 1, gpus_per_worker=0.5)
    assert plan(LAPTOP, 2, gpus_per_worker=0.5).gpus_each == 0


def test_more_tasks_than_workers_queue() -> None:
    """A worker takes task after task (see test_dealing_tasks.py)."""
    assert plan(Cluster(((2, 0),), joined=True), 7) == Group(2, 1, gpus_each=0, shared=False)


def test_what_does_not_train_needs_no_workers() -> None:
    check_workers(SessionConfig(method="zero-shot", workers=99), 1, LAPTOP)
