"""A crew without Ray: all of a session's work in this process, by the same functions on the same parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from condu_ray.config import SessionConfig
from condu_ray.data import Split, TaskData
from condu_ray.engine.crew import chunks
from condu_ray.engine.fusing import Fused, Fuser
from condu_ray.engine.progress import Update
from condu_ray.engine.scoring import Question, Scorer, Seen, Sent, Snapshot, threads_of
from condu_ray.engine.work import Job, work_through
from condu_ray.methods.training import Place
from condu_ray.store import Manifest, ObjectRef, Store
from condu_ray.voting.labels import LabelSpace


class InProcessCrew:
    """`engine.crew.Crew` without Ray, for a process that has all it needs: a trial of a sweep, a test.

    threads: of a training, since sums may depend on them.
    """

    def __init__(self, store: Store, config: SessionConfig, threads: int = 1, device: str = "cpu") -> None:
        self._store, self._config, self._threads, self._device = store, config, threads, device
        self._scorer, self._fuser = Scorer(store.url, config, device), Fuser(store.url)

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        with threads_of(self._threads):
            work_through(self._store, self._config, jobs, Place(), lambda step: None, self._device)

    def features(self, pictures: Split, update: Update) -> Seen:
        return Seen.joined(self._scorer.features(part) for part in chunks(pictures))

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
            parts = [replace(asked, pictures=part) for part in chunks(asked.pictures)]
            right = sum(self._scorer.right(part, snapshot, self._fuser.state) for part in parts)
            scores.append(100 * right / max(1, len(asked.pictures)))
        return scores

    def logits(
        self, pictures: Split, voter: str | None, space: LabelSpace, snapshot: Snapshot, update: Update
    ) -> NDArray[np.float32]:
        state = self._fuser.state
        return np.concatenate([self._scorer.logits(part, voter, space, snapshot, state) for part in chunks(pictures)])

    def route(self, pictures: Split, snapshot: Snapshot, update: Update) -> Sent:
        return Sent.joined(self._scorer.routed(part, snapshot) for part in chunks(pictures))
