"""What a worker does: it trains task after task and puts each delta into the store. Knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.catalogue import info
from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine.keys import FEATURES, features_key
from condu_ray.errors import StoreError
from condu_ray.methods import registry
from condu_ray.methods.protocol import Features, TaskState, Vector
from condu_ray.methods.step import Step
from condu_ray.methods.stored import config_of, layout_of, state_of
from condu_ray.methods.training import Checkpoint, Place, Resume, memory_in, train_task
from condu_ray.models.load import load
from condu_ray.store import Store, put_first

BASE = "base"
CHECKPOINT_SHARE = 0.05
"""Largest share of a worker's time that writing checkpoints may take: a slow store gets fewer."""


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
    kind = info(header.method)
    state = _state_before(store, jobs[0]) if kind.ordered else None
    for job in jobs:
        if not _is_trained(store, job, place):
            resume = checkpoints(store, job.key, place)
            if learner is None:
                trained = train_task(clip, method, layout, job.data, config, _start(state), place, resume, report)
            else:
                before = state or method.empty(layout, config_of(header))
                seen = _features(store, config, job.data) if kind.on_features else None
                trained = learner.learn(clip, layout, job.data, config, before, seen, place, resume, report)
            if place.rank == 0:
                put_first(store, job.key, "delta", trained.arrays())
            place.barrier()  # the next task may start from this delta
        if state is not None:
            trained_arrays = _trained(store, job)
            state = state.add(job.data.name, trained_arrays["delta"], memory_in(trained_arrays))


def _is_trained(store: Store, job: Job, place: Place) -> bool:
    """Whether any process of the group sees the delta, so that all of them train the task or none does.

    Another session may put it while they look, and those that train would wait for ever for those that do not.
    """
    found = store.find(job.key, "delta") is not None
    same = place.agree(found)
    return found or not same


def _state_before(store: Store, job: Job) -> TaskState:
    header = store.header
    if job.parent is None:
        return registry.get(header.method).empty(layout_of(header), config_of(header))
    return state_of(store, store.manifest(job.parent))


def _start(state: TaskState | None) -> Vector | None:
    """The delta that training starts from: that of the newest task where one model goes on, else None for θ⁰."""
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
    """How far a training was: arrays in its checkpoint, more in each stage, and steps done (-1: between two stages)."""
    return (len(found), int(found["step"][0]) if "step" in found else -1) if found else (0, -1)
