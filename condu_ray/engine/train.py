"""Fine-tunes the tasks of a command in one Ray Train run: a worker group takes task after task.

An empty `fit()` costs 10 to 24 s on two cores, so it is paid once a command. Tasks are either dealt out, one worker
each, or shared by all workers (DDP). Every finished delta is in the store before the run ends, so a group that is
restarted after a worker died, or a command that is given again, goes on where it stopped.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.engine.board import POLL_SECONDS, post, reporter, show
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.keeper import Keeper
from condu_ray.engine.keys import SEEN, features_key
from condu_ray.engine.placement import Group, plan_group
from condu_ray.engine.progress import Update
from condu_ray.engine.work import Job, work_through
from condu_ray.engine.worker_group import Apart, work
from condu_ray.errors import ConduError, StoreError, TrainingError
from condu_ray.methods.step import Step
from condu_ray.methods.training import Place, all_steps_for
from condu_ray.store import Store, object_path, open_store

RESTARTS = 3
STILL_SECONDS = 10.0


def train(store: Store, config: SessionConfig, jobs: Sequence[Job], cluster: Cluster, update: Update) -> None:
    """Returns when the store holds the delta of every job (`find(job.key, "delta")`)."""
    pending = [job for job in jobs if store.find(job.key, "delta") is None]
    if not pending:
        return
    ordered = config.system.ordered
    group = plan_group(config, len(jobs), ordered, cluster)
    board = post()
    name = f"ray-train-{uuid.uuid4().hex[:12]}"  # its own: a name used before would go on where that run ended
    trainer = TorchTrainer(
        work,
        train_loop_config={"given": ray.put(Given(store.url, config, tuple(jobs), group, board))},
        torch_config=TorchConfig(backend="nccl" if group.gpus_each else "gloo") if group.shared else Apart(),
        scaling_config=ScalingConfig(
            num_workers=group.workers,
            use_gpu=group.gpus_each > 0,
            resources_per_worker={"CPU": group.cpus_each, **({"GPU": group.gpus_each} if group.gpus_each else {})},
        ),
        run_config=RunConfig(
            name=name, failure_config=FailureConfig(max_failures=RESTARTS), **_storage(store.work(name))
        ),
    )
    kept = [object_path(job.key, "delta") for job in jobs]
    kept += [object_path(features_key(store.header, config, job.data), each) for job in jobs for each in SEEN]

    keeper, tell = Keeper(store, kept, name), teller(group, sum(_steps(job, config) for job in pending), update)

    def look(steps: Mapping[str, Step]) -> None:
        tell(steps)
        keeper.touch()

    try:
        _watch(trainer, board, look)
    finally:
        ray.kill(board)
        with suppress(StoreError):  # what is left of it goes with gc; an error of the training is what counts
            store.discard_work(name)
    missing = [job.data.name for job in jobs if store.find(job.key, "delta") is None]
    if missing:
        raise TrainingError(
            f"the workers ended without the delta of {', '.join(missing)}",
            "every node must see the store's folder; run the same command again",
        )


def teller(group: Group, total: int, update: Update) -> Callable[[Mapping[str, Step]], None]:
    """Shows the newest step of each task; what the workers wait for where there is none, or no new one for long: their
    node may be gone."""
    last: dict[str, Step] = {}
    since = [float("-inf")]

    def tell(steps: Mapping[str, Step]) -> None:
        if steps != last:
            last.clear()
            last.update(steps)
            since[0] = time.monotonic()
        waits = unplaced(group) if time.monotonic() - since[0] >= STILL_SECONDS else ""
        if waits or not steps:
            update(sum(step.step for step in steps.values()), total, waits)
        else:
            show(steps, total, update)

    return tell


def unplaced(group: Group) -> str:
    """A note on what the workers wait for where Ray has not found them a place yet; '' once they have one."""
    one = {"CPU": float(group.cpus_each), **({"GPU": float(group.gpus_each)} if group.gpus_each else {})}
    wanted = [one] * group.workers
    waiting = any(
        place["state"] == "PENDING" and list(place["bundles"].values()) == wanted
        for place in ray.util.placement_group_table().values()
    )
    if not waiting:
        return ""
    free = ray.available_resources()
    left = " and ".join(f"{free.get(name, 0):g} {name}" for name in one)
    needed = " and ".join(f"{amount:g} {name}" for name, amount in one.items())
    return f"waiting for {group.workers} x {needed}: {left} free (`ray status`); fewer --cpus-per-worker need less"


def _storage(place: str) -> dict[str, Any]:
    """Arguments of `RunConfig` that say where Ray Train keeps its own files: at `place`, which every node reaches.

    For S3 the filesystem is made here: a URL alone would be read with the environment of the node's raylet, which may
    lack the endpoint. No credentials go along; each node finds its own.
    """
    if not place.startswith("s3://"):
        return {"storage_path": place}
    import boto3
    from pyarrow.fs import S3FileSystem

    from condu_ray.store.bucket import endpoint

    url, authority = endpoint()  # the store's own, wherever boto3 found it: Arrow looks in other places
    scheme, _, host = (url or "").rstrip("/").partition("://")
    given = {
        "endpoint_override": host,
        "scheme": scheme,
        "region": boto3.Session().region_name,
        "tls_ca_file_path": authority,
    }
    return {
        "storage_path": place.removeprefix("s3://"),
        "storage_filesystem": S3FileSystem(**{name: value for name, value in given.items() if value}),
    }


def _watch(trainer: TorchTrainer, board: Any, tell: Callable[[Mapping[str, Step]], None]) -> None:
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    # A daemon: Ctrl-C must not wait for the end of the training.
    fitting = threading.Thread(target=fit, name="fit", daemon=True)
    fitting.start()
    while fitting.is_alive():
        fitting.join(POLL_SECONDS)
        tell(ray.get(board.read.remote())[0])
    fault = ray.get(board.read.remote())[1]
    if fault is not None:
        raise fault
    for error in errors:
        reason = str(error).strip().splitlines()
        raise TrainingError(
            f"training stopped after {RESTARTS} restarts ({reason[-1] if reason else type(error).__name__})",
            "see session_latest/logs/train of Ray, free memory or use fewer --workers, and run the same command again",
        ) from error


def deal(jobs: Sequence[Job], workers: int, config: SessionConfig) -> list[list[Job]]:
    """The jobs of each worker: the longest first, each to the worker that has the fewest steps so far."""
    if workers == 1:
        return [list(jobs)]  # in the order given: a task may start from the one before
    dealt: list[list[Job]] = [[] for _ in range(workers)]
    load = [0] * workers
    for job in sorted(jobs, key=lambda each: -_steps(each, config)):
        least = load.index(min(load))
        dealt[least].append(job)
        load[least] += _steps(job, config)
    return dealt


def _steps(job: Job, config: SessionConfig) -> int:
    return all_steps_for(len(job.data.train), config)


@dataclass(frozen=True)
class Given:
    """What all workers of a group are told. store: URL. board: where they report."""

    store: str
    config: SessionConfig
    jobs: tuple[Job, ...]
    group: Group
    board: Any


def take_part(given: Given) -> None:
    """What each worker of the group does."""
    config, group, board = given.config, given.group, given.board
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(group.cpus_each)
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which Ray does only for workers that it connects
    mine = list(given.jobs) if group.shared else deal(given.jobs, size, config)[rank]
    together = group.shared and size > 1
    place = Place(rank, size, _distribute, _barrier, _agree) if together else Place()
    if ray.get(board.read.remote())[1] is not None:
        return
    try:
        work_through(open_store(given.store), config, mine, place, reporter(board), str(device))
    except ConduError as fault:
        # Doing it again would fail again: tell the driver instead of letting Ray restart the group.
        ray.get(board.fail.remote(fault))
        if together:
            raise  # the others wait for this one: only a restart, which finds the fault, ends them


def _barrier() -> None:
    torch.distributed.barrier()


def _agree(*numbers: int) -> bool:
    spread = torch.tensor([*numbers, *(-each for each in numbers)], device=get_device())
    torch.distributed.all_reduce(spread, torch.distributed.ReduceOp.MIN)
    least, most = spread.view(2, -1)
    return bool((least == -most).all())


def _distribute(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module, static_graph=True)
