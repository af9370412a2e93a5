"""Who does the work of a session: the protocol that the spine speaks, and Ray's side of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, OwnerDiedError, RayTaskError
from ray.util import ActorPool

from condu_ray.config import SessionConfig
from condu_ray.data import Split
from condu_ray.engine.cluster import NAMESPACE, Cluster
from condu_ray.engine.fusing import Fused, Fuser
from condu_ray.engine.progress import Update
from condu_ray.engine.scoring import Question, Scorer, Snapshot
from condu_ray.engine.train import Job, train
from condu_ray.errors import ConduError, TrainingError
from condu_ray.store import Manifest, ObjectRef, Store

CHUNK = 256  # pictures a call; fixed, so that sums do not depend on the number of actors
TRIES = 3
HIRE_SECONDS, LONGEST_HIRE_SECONDS = 60.0, 900.0


class Crew(Protocol):
    """Does the heavy steps of a session. Every call may be repeated after a crash and then gives the same result."""

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        """Puts the delta of every job into the store, unless it is there."""

    def features(self, pictures: Split, update: Update) -> NDArray[np.float32]:
        """Unit features by θ⁰, f32[N, D]."""

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Mean text vectors of classes by θ⁰, f32[C, D]."""

    def hold(self, version: Manifest | None) -> None:
        """Makes the state of a version the one that experts and votes are asked of."""

    def fuse(self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None) -> Fused:
        """Adds a task to the state of `parent`, writes it to the store and holds it."""

    def score(self, questions: Sequence[Question], snapshot: Snapshot | None, update: Update) -> list[float]:
        """Accuracy in percent for each question."""

    def route(
        self, pictures: Split, snapshot: Snapshot, update: Update
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Where the router sends pictures: (order i64[N, T], score f64[N]), see `Scorer.routed`."""


class FusionActor(Fuser):
    """Ray actor that owns the state of one store and publishes it in the object store: readers map it without a copy.

    One call at a time. References come in a list, so that Ray does not send the arrays along with the answer.
    """

    def held(self, version: Manifest | None) -> list[Any]:
        self.hold(version)
        return [ray.put(self.state)]

    def added(self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None) -> tuple[Fused, list[Any]]:
        fused = self.add(key, parent, task, delta)
        return fused, [ray.put(self.state)]


class RayCrew:
    """Ray Train, the fusion actor, and a pool of actors that hold θ⁰."""

    def __init__(self, store: Store, config: SessionConfig, cluster: Cluster) -> None:
        self._store, self._config, self._cluster = store, config, cluster
        self._pool: list[Any] = []
        self._refresh: Callable[[], Any] = lambda: self.hold(None)
        self._state: Any = None
        self._fusion = (
            ray.remote(FusionActor)
            .options(
                name=_fusion_name(store),
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=TRIES,  # every change is named by its input, so it may be called again
                lifetime="detached" if cluster.joined else None,
            )
            .remote(store.url)
        )

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        train(self._store, self._config, jobs, self._cluster, update)

    def features(self, pictures: Split, update: Update) -> NDArray[np.float32]:
        return np.concatenate(self._spread([("features", (chunk,)) for chunk in _chunks(pictures)], update))

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        found = self._spread([("text_means", (tuple(classes), tuple(templates)))], lambda done, total, note: None)
        return np.asarray(found[0])

    def hold(self, version: Manifest | None) -> None:
        self._refresh = lambda: self.hold(version)
        (self._state,) = self._change("held", version)

    def fuse(self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None) -> Fused:
        self._refresh = lambda: self.fuse(key, parent, task, delta)
        fused, (self._state,) = self._change("added", key, parent, task, delta)
        return cast(Fused, fused)

    def score(self, questions: Sequence[Question], snapshot: Snapshot | None, update: Update) -> list[float]:
        asked = [replace(each, pictures=part) for each in questions for part in _chunks(each.pictures)]
        shared = ray.put(snapshot)
        for attempt in range(TRIES):
            try:
                right = self._spread([("right", (each, shared, self._state)) for each in asked], update)
                break
            except (ObjectLostError, OwnerDiedError):
                # The fusion actor died and took the published state along; it makes the same one again.
                if attempt == TRIES - 1:
                    raise
                self._refresh()
        counts: dict[int, int] = dict.fromkeys(range(len(questions)), 0)
        owner = [index for index, each in enumerate(questions) for _ in _chunks(each.pictures)]
        for index, count in zip(owner, right, strict=True):
            counts[index] += count
        return [100 * counts[index] / max(1, len(each.pictures)) for index, each in enumerate(questions)]

    def route(
        self, pictures: Split, snapshot: Snapshot, update: Update
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        shared = ray.put(snapshot)
        orders, scores = zip(
            *self._spread([("routed", (chunk, shared)) for chunk in _chunks(pictures)], update), strict=True
        )
        return np.concatenate(orders), np.concatenate(scores)

    def close(self) -> None:
        """Gives the pool's cores back; the fusion actor of a cluster that was joined goes on."""
        for actor in self._pool:
            ray.kill(actor)
        self._pool = []

    def _change(self, method: str, *given: Any) -> Any:
        try:
            return ray.get(getattr(self._fusion, method).remote(*given))
        except RayTaskError as error:
            raise _cause(error) from None

    def _spread(self, calls: Sequence[tuple[str, tuple[Any, ...]]], update: Update) -> list[Any]:
        """Results of these calls in their order, from whichever actors are free."""
        if not self._pool:
            self._pool = self._hire()
        results = []
        try:
            for result in ActorPool(self._pool).map(
                lambda actor, call: getattr(actor, call[0]).remote(*call[1]), calls
            ):
                results.append(result)
                update(len(results), len(calls), "")
        except RayTaskError as error:
            raise _cause(error) from None
        return results

    def _hire(self) -> list[Any]:
        gpu = self._config.gpu == "auto" and self._cluster.gpus > 0
        places = max(1, self._cluster.gpus if gpu else self._cluster.cpus)
        options = {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "max_restarts": -1, "max_task_retries": TRIES}
        actor = ray.remote(Scorer).options(**options)
        given = (self._store.url, self._config, "cuda" if gpu else "cpu")
        hired = {}
        for _ in range(min(places, self._config.workers or places)):
            one = actor.remote(*given)
            hired[one.__ray_ready__.remote()] = one
        # Other work may hold some of the cluster's cores: those that found no place are not waited for.
        ready, late = ray.wait(list(hired), num_returns=len(hired), timeout=HIRE_SECONDS)
        if not ready:
            ready, late = ray.wait(late, timeout=LONGEST_HIRE_SECONDS)
        for ref in late:
            ray.kill(hired[ref])
        if not ready:
            raise TrainingError(
                f"no {'GPU' if gpu else 'CPU core'} of the cluster came free in {LONGEST_HIRE_SECONDS:.0f} s",
                "end other work on it, and run the same command again",
            )
        return [hired[ref] for ref in ready]


def _fusion_name(store: Store) -> str:
    """A copy of a store has the same id, but not the same place."""
    return f"fusion-{store.header.id}-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}"


def _chunks(pictures: Split) -> list[Split]:
    return [pictures.take(range(start, min(start + CHUNK, len(pictures)))) for start in range(0, len(pictures), CHUNK)]


def _cause(error: RayTaskError) -> BaseException:
    """What a worker raised, without Ray's text around it, where it is meant for the user."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConduError) else error
