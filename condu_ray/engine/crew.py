"""Crew: whoever does the heavy steps of a session, on Ray (ray_crew.py) or in this process (in_process.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from condu_ray.data import Split, TaskData
from condu_ray.engine.fusing import Fused
from condu_ray.engine.progress import Update
from condu_ray.engine.scoring import Question, Seen, Sent, Snapshot
from condu_ray.engine.work import Job
from condu_ray.store import Manifest, ObjectRef
from condu_ray.voting.labels import LabelSpace

CHUNK = 256  # pictures a call; fixed, so that sums do not depend on the number of actors


class Crew(Protocol):
    """Does the heavy steps of a session. Every call may be repeated after a crash and then gives the same result."""

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        """Puts the delta of every job into the store, unless it is there."""

    def features(self, pictures: Split, update: Update) -> Seen:
        """Features of the pictures by θ⁰, with the evaluation transform."""

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Mean text vectors of classes by θ⁰, f32[C, D]."""

    def hold(self, version: Manifest | None) -> None:
        """Makes the state of a version (None: before the first) the one that `score` and `logits` ask."""

    def rescalers(
        self,
        parent: Manifest | None,
        task: TaskData,
        delta: ObjectRef | None,
        buffers: ObjectRef | None,
        update: Update,
    ) -> NDArray[np.float32]:
        """Trains the rescalers that a task has once it is added to the state of `parent`, f32[G]; writes nothing."""

    def fuse(
        self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None, rescalers: ObjectRef | None
    ) -> Fused:
        """Adds a task to the state of `parent`, with trained rescalers if any, writes it to the store and holds it."""

    def score(self, questions: Sequence[Question], snapshot: Snapshot | None, update: Update) -> list[float]:
        """Accuracy in percent for each question."""

    def logits(
        self, pictures: Split, voter: str | None, space: LabelSpace, snapshot: Snapshot, update: Update
    ) -> NDArray[np.float32]:
        """What one voter (None: θ⁰) of the version held says of every label, f32[N, C]."""

    def route(self, pictures: Split, snapshot: Snapshot, update: Update) -> Sent:
        """Where the router of the version sends pictures."""


def chunks(pictures: Split) -> list[Split]:
    """The pictures in parts of CHUNK, in order: what one call to a process is given."""
    return [pictures.take(range(start, min(start + CHUNK, len(pictures)))) for start in range(0, len(pictures), CHUNK)]
