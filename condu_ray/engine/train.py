"""Fine-tunes the tasks of a command in one Ray Train run: a worker group takes task after task.

An empty `fit()` costs 10 to 24 s on two cores, so it is paid once a command. Tasks are either dealt out, one worker
each, or shared by all workers (DDP). Every finished delta is in the store before the run ends, so a group that is
restarted after a worker died, or a command that is given again, goes on where it stopped.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from numpy.typing import NDArray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine.board import POLL_SECONDS, post, reporter, show
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.keys import FEATURES, SEEN, features_key
from condu_ray.engine.progress import Update
from condu_ray.engine.worker_group import Apart, work
from condu_ray.errors import ConduError, StoreError, TrainingError
from condu_ray.methods import registry
from condu_ray.methods.protocol import Features, TaskState, Vector
from condu_ray.methods.step import Step
from condu_ray.methods.stored import config_of, layout_of, state_of
from condu_ray.methods.training import (
    Checkpoint,
    Place,
    Resume,
    all_steps_for,
    memory_in,
    train_task,
)
from condu_ray.models.load import load
from condu_ray.store import Store, object_path, open_store, put_first

BASE = "base"
RESTARTS = 3
TOUCH_SECONDS = 3600.0
CHECKPOINT_SHARE = 0.05
"""Most of a worker's time that writing checkpoints may take: a store that is far gets fewer."""


@dataclass(frozen=True)
class Job:
    """One task to train. key: names its delta in the store.

    For systems that go on from task to task: parent is the version whose state the first job of a list starts from
    (None: θ⁰), each later one starts from the state after the job before; origin is the key of the training that came
    before ("base": none).
    """

    key: str
    data: TaskData
    parent: int | None = None
    origin: str = BASE


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
    most = room if shared else min(room, 1 if ordered else jobs)
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
    info = registry.info(config.method)
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


def train(store: Store, config: SessionConfig, jobs: Sequence[Job], cluster: Cluster, update: Update) -> None:
    """Returns when the store holds the delta of every job (`find(job.key, "delta")`)."""
    pending = [job for job in jobs if store.find(job.key, "delta") is None]
    if not pending:
        return
    ordered = registry.info(config.method).ordered
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

    def tell(steps: Mapping[str, Step]) -> None:
        show(steps, total, update) if steps else update(0, total, unplaced(group))
        keeper.touch()

    keeper = Keeper(store, kept, name)
    try:
        total = sum(_steps(job, config) for job in pending)
        _watch(trainer, board, tell)
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


class Keeper:
    """Says again and again that what a session has finished is in use, or gc would take it from one that lasts long."""

    def __init__(self, store: Store, paths: Sequence[str], work: str) -> None:
        self._store, self._paths, self._work = store, paths, work
        self._next = time.monotonic() + TOUCH_SECONDS

    def touch(self) -> None:
        if time.monotonic() >= self._next:
            for path in self._paths:
                self._store.touch(path)
            self._store.work(self._work)
            self._next = time.monotonic() + TOUCH_SECONDS


def unplaced(group: Group) -> str:
    """What the workers wait for where Ray has not found them a place yet, else nothing."""
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
    """Where Ray Train keeps its own notes: beside the store's work, which every node reaches.

    For S3 the filesystem is made here: a URL alone would be read with the environment of the node's raylet, which may
    lack the endpoint. No credentials go along; each node finds its own.
    """
    if not place.startswith("s3://"):
        return {"storage_path": place}
    import boto3
    from pyarrow.fs import S3FileSystem

    scheme, _, host = os.environ.get("AWS_ENDPOINT_URL", "").rstrip("/").partition("://")
    endpoint = {"endpoint_override": host, "scheme": scheme} if host else {}
    region = boto3.Session().region_name
    return {
        "storage_path": place.removeprefix("s3://"),
        "storage_filesystem": S3FileSystem(**endpoint, **({"region": region} if region else {})),
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
    """Who trains what: the longest task first, each to the worker that has the fewest steps so far."""
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
    mine = list(given.jobs) if group.shared else deal(given.jobs, size, config)[rank]
    together = group.shared and size > 1
    place = Place(rank, size, _distribute, _barrier, _agree) if together else Place()
    if ray.get(board.read.remote())[1] is not None:
        return
    try:
        work_through(open_store(given.store), config, mine, place, reporter(board), str(get_device()))
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


def work_through(
    store: Store,
    config: SessionConfig,
    jobs: Sequence[Job],
    place: Place,
    report: Callable[[Step], None],
    device: str = "cpu",
) -> None:
    """Trains these jobs one after another and puts each delta into the store; what is there already is left alone."""
    if all(_is_trained(store, job, place) for job in jobs):
        return
    header = store.header
    clip = load(config.model_spec, device, header.model_sha256)
    method, learner, layout = registry.get(header.method), registry.learner(header.method), layout_of(header)
    info = registry.info(header.method)
    state = _state_before(store, jobs[0]) if info.ordered else None
    for job in jobs:
        if not _is_trained(store, job, place):
            resume = checkpoints(store, job.key, place)
            if learner is None:
                trained = train_task(clip, method, layout, job.data, config, _start(state), place, resume, report)
            else:
                before = state or method.empty(layout, config_of(header))
                seen = _features(store, config, job.data) if info.on_features else None
                trained = learner.learn(clip, layout, job.data, config, before, seen, place, resume, report)
            if place.rank == 0:
                put_first(store, job.key, "delta", trained.arrays())
            place.barrier()  # the next task may start from this delta
        if state is not None:
            trained_arrays = _trained(store, job)
            state = state.add(job.data.name, trained_arrays["delta"], memory_in(trained_arrays))


def _is_trained(store: Store, job: Job, place: Place) -> bool:
    """Whether any process of the group sees the delta: another session may put it while they look one by one, and
    those that go on would wait for ever for those that do not."""
    found = store.find(job.key, "delta") is not None
    same = place.agree(found)
    return found or not same


def _state_before(store: Store, job: Job) -> TaskState:
    header = store.header
    if job.parent is None:
        return registry.get(header.method).empty(layout_of(header), config_of(header))
    return state_of(store, store.manifest(job.parent))


def _start(state: TaskState | None) -> Vector | None:
    """What answers now for systems that go on from task to task; θ⁰ (None) for all others, and before any task."""
    return state.delta(state.tasks[-1]) if state is not None and state.tasks else None


def _trained(store: Store, job: Job) -> Mapping[str, NDArray[Any]]:
    ref = store.find(job.key, "delta")
    if ref is None:
        raise StoreError(f"the delta of {job.data.name} is gone from {store.url}", "run the same command again")
    return store.get(ref)


def _features(store: Store, config: SessionConfig, task: TaskData) -> Features:
    """What the session computed before it began to train."""
    key = features_key(store.header, config, task)
    refs = [store.find(key, name) for name in (FEATURES, "prototypes")]
    if None in refs:
        raise StoreError(f"the features of {task.name} are gone from {store.url}", "run the same command again")
    seen, prototypes = (store.get(ref) for ref in refs if ref is not None)
    texts = prototypes["text_mean"]
    unit = texts / np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-12)
    return Features(seen["raw"], task.train.labels, unit)


def checkpoints(store: Store, key: str, place: Place | None = None) -> Resume:
    """Checkpoints of the training called `key`, not more often than they may cost; none where the processes of a group
    find different ones, which another session of the same task may write."""
    place = place or Place()
    free = [0.0]  # monotonic seconds

    def load() -> Checkpoint | None:
        found = store.load_work(key, "checkpoint")
        return found if place.agree(*_progress(found)) else None

    def save(checkpoint: Checkpoint) -> None:
        begun = time.monotonic()
        if begun >= free[0]:
            store.save_work(key, "checkpoint", checkpoint)
            free[0] = time.monotonic() + (time.monotonic() - begun) / CHECKPOINT_SHARE

    return Resume(load, save)


def _progress(found: Checkpoint | None) -> tuple[int, int]:
    """How far a training was: number of arrays, which grows from stage to stage, and steps (-1: not in a stage)."""
    return (len(found), int(found["step"][0]) if "step" in found else -1) if found else (0, -1)
