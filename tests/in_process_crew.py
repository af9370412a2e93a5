"""Does the work of a session in this process, without Ray: the same functions in the same parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from condu_ray.config import SessionConfig, resolve
from condu_ray.data import Split, TaskData, open_task
from condu_ray.engine.crew import _chunks
from condu_ray.engine.fusing import Fused, Fuser
from condu_ray.engine.plan import header_of
from condu_ray.engine.progress import Update
from condu_ray.engine.scoring import Question, Scorer, Seen, Snapshot
from condu_ray.engine.session import learn
from condu_ray.engine.train import Job, work_through
from condu_ray.methods.training import Place
from condu_ray.store import Manifest, ObjectRef, Store, create_store
from condu_ray.store.bucket import Bucket
from condu_ray.store.header import open_existing

FAST = {"train.steps": 4, "train.batch_size": 8, "train.towers": "image", "tracking": "off"}
"""Settings under which a task trains in a blink."""


class InProcessCrew:
    """`engine.crew.Crew` without Ray. threads: of a training, since sums may depend on them."""

    def __init__(self, store: Store, config: SessionConfig, threads: int = 1) -> None:
        self._store, self._config, self._threads = store, config, threads
        self._scorer, self._fuser = Scorer(store.url, config), Fuser(store.url)

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        work_through(self._store, self._config, jobs, Place(), lambda step: None)
        torch.set_num_threads(before)

    def features(self, pictures: Split, update: Update) -> Seen:
        return Seen.joined(self._scorer.features(part) for part in _chunks(pictures))

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        return self._scorer.text_means(classes, templates)

    def hold(self, version: Manifest | None) -> None:
        self._fuser.hold(version)

    def rescalers(
        self,
        parent: Manifest | None,
        task: TaskData,
        delta: ObjectRef | None,
        buffers: ObjectRef | None,
        update: Update,
    ) -> NDArray[np.float32]:
        state = self._fuser.propose(parent, task.name, delta)
        return self._scorer.rescalers(task, state, buffers, self._threads, lambda step: None)

    def fuse(
        self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None, rescalers: ObjectRef | None
    ) -> Fused:
        return self._fuser.add(key, parent, task, delta, rescalers)

    def score(self, questions: Sequence[Question], snapshot: Snapshot | None, update: Update) -> list[float]:
        scores = []
        for asked in questions:
            parts = [replace(asked, pictures=part) for part in _chunks(asked.pictures)]
            right = sum(self._scorer.right(part, snapshot, self._fuser.state) for part in parts)
            scores.append(100 * right / max(1, len(asked.pictures)))
        return scores

    def route(
        self, pictures: Split, snapshot: Snapshot, update: Update
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        orders, scores = zip(*[self._scorer.routed(part, snapshot) for part in _chunks(pictures)], strict=True)
        return np.concatenate(orders), np.concatenate(scores)


@contextmanager
def silent(name: str) -> Iterator[Update]:
    """A stage that shows nothing."""
    yield lambda done, total, note: None


def settings(store: Any, model: Any, **others: Any) -> SessionConfig:
    """Settings for a store at `store` with the model in folder `model`; `others` by dotted names, `__` for the dot."""
    given = {name.replace("__", "."): value for name, value in others.items()}
    return resolve({**FAST, "store": str(store), "model": f"local-dir:{model}", **given})[0]


def opened(folders: Mapping[str, Any], *names: str) -> list[TaskData]:
    """The tasks of these names, opened."""
    return [open_task(name, folders[name]) for name in names]


def make_store(config: SessionConfig) -> Store:
    """The store of these settings, made if it is not there."""
    return open_existing(config.store) or create_store(config.store, header_of(config)[0])


def learn_here(config: SessionConfig, tasks: Sequence[TaskData], threads: int = 1) -> list[Manifest]:
    """Learns in this process; makes the store if needed and returns the new versions."""
    store = make_store(config)
    return learn(store, config, tasks, InProcessCrew(store, config, threads), silent)


def contents(store: str | Path) -> dict[str, Any]:
    """What must be the same in two stores after the same work: manifests without times, objects' sha256."""
    files = files_of(store)
    manifests = {Path(name).name: json.loads(body) for name, body in files.items() if name.startswith("versions/")}
    for manifest in manifests.values():
        del manifest["created"], manifest["seconds"]
    objects = {name: hashlib.sha256(body).hexdigest() for name, body in files.items() if name.startswith("objects/")}
    return {**manifests, **objects}


def files_of(store: str | Path) -> dict[str, bytes]:
    """Everything in a store, by path: of a folder, or below an s3:// URL."""
    if str(store).startswith("s3://"):
        place = Bucket(str(store))
        return {entry.path: place.read(entry.path) or b"" for entry in place.entries("")}
    root = Path(store)
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}
