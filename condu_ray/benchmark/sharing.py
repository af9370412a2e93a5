"""What methods of one seed share: deltas that start from θ⁰ are trained once, prototypes are computed once.

A training is named by its input (engine/keys.py), and methods that fine-tune from θ⁰ in the same way ask for the same
name. So its result is put into a method's store before the method learns, and the session finds it there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from condu_ray.benchmark.work import seconds_in, timed
from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine.crew import Crew
from condu_ray.engine.keys import features_key, train_key, training_settings
from condu_ray.engine.plan import store_for
from condu_ray.engine.progress import Stage
from condu_ray.engine.work import BASE, Job
from condu_ray.store import Store
from condu_ray.store.documents import read, write
from condu_ray.store.header import open_existing

Crews = Callable[[Store, SessionConfig], AbstractContextManager[Crew]]
"""Who does the work on a store, for as long as the block runs."""

Sessions = Sequence[tuple[SessionConfig, Sequence[TaskData]]]
"""Settings, and the tasks that are learned with them."""


def deltas_of(config: SessionConfig) -> Path:
    """Where the deltas are that these settings share; the file of the same name beside it has their seconds."""
    lora = config.lora
    kind = f"lora-{lora.mode}-{lora.rank}" if config.method == "condu-lora" else "full"
    return Path(config.store).parent / "deltas" / kind


def train_once(sessions: Sessions, crews: Crews, stage: Stage) -> None:
    """Trains what is missing of these tasks from θ⁰, into the store of `deltas_of`; equal settings in one go."""
    alike: dict[str, tuple[SessionConfig, list[TaskData]]] = {}
    for config, tasks in sessions:
        alike.setdefault(json.dumps(training_settings(config)), (config, []))[1].extend(tasks)
    for config, tasks in alike.values():
        bank = _bank(config)
        store = store_for(bank)
        jobs = [Job(_key(store, config, task), task) for task in tasks]
        if all(store.find(job.key, "delta") for job in jobs):
            continue
        with timed(_seconds(config)), crews(store, bank) as crew, stage("training from the base model") as update:
            crew.train(jobs, update)
        for job in jobs:
            store.discard_work(job.key)


def give_deltas(config: SessionConfig, tasks: Sequence[TaskData], target: Store, record: Path) -> None:
    """Puts the deltas that there are of these tasks into `target`; `record` tells what their training took."""
    source = open_existing(str(deltas_of(config)))
    if source is None:
        return
    given = read(record) or {}
    for task in tasks:
        key = _key(source, config, task)
        if source.find(key, "delta") is not None:
            _give(source, target, key, "delta")
            given[task.name] = seconds_in(_seconds(config)) / len(config.tasks)
    write(record, given)


def given_seconds(record: Path) -> float:
    """Seconds of the trainings whose deltas a method was given, each task's the mean of all."""
    return math.fsum((read(record) or {}).values())


def give_features(config: SessionConfig, tasks: Sequence[TaskData], source: Store, target: Store) -> None:
    """Puts what θ⁰ made of these tasks' pictures for `source` into `target`: it is the same whatever the method."""
    for task in tasks:
        key = features_key(target.header, config, task)
        for name in ("prototypes", "domain"):
            _give(source, target, key, name)


def _give(source: Store, target: Store, key: str, name: str) -> None:
    ref = source.find(key, name)
    if ref is not None and target.find(key, name) is None:
        target.put(key, name, source.get(ref))


def _key(store: Store, config: SessionConfig, task: TaskData) -> str:
    return train_key(store.header.model_sha256, config, task, BASE)


def _bank(config: SessionConfig) -> SessionConfig:
    """Settings of the store that holds the deltas: a method that asks for this training and keeps nothing else."""
    method = "condu-lora" if config.method == "condu-lora" else "finetune"
    return config.model_copy(update={"store": str(deltas_of(config)), "method": method})


def _seconds(config: SessionConfig) -> Path:
    return deltas_of(config).with_suffix(".json")
