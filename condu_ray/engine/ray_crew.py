"""A crew on Ray: Ray Train, the fusion actor, and a pool of actors that hold θ⁰."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, OwnerDiedError

from condu_ray import __version__
from condu_ray.config import SessionConfig
from condu_ray.data import Split, TaskData
from condu_ray.engine.board import POLL_SECONDS, post, reporter, show
from condu_ray.engine.cluster import NAMESPACE, Cluster
from condu_ray.engine.crew import chunks
from condu_ray.engine.fusing import Fused
from condu_ray.engine.fusion_actor import FusionActor
from condu_ray.engine.pool import Pool
from condu_ray.engine.progress import Update, no_update
from condu_ray.engine.replies import TRIES, answer_of, result_of
from condu_ray.engine.scoring import Question, Seen, Sent, Snapshot
from condu_ray.engine.train import train
from condu_ray.engine.work import Job
from condu_ray.methods.rescaling import steps_of
from condu_ray.methods.step import Step
from condu_ray.methods.training import all_steps_for
from condu_ray.store import Manifest, ObjectRef, Store
from condu_ray.voting.labels import LabelSpace

HEAD = "node:__internal_head__"  # a resource that Ray gives the head node of any cluster


class RayCrew:
    """`engine.crew.Crew` on a cluster; `close` gives the cores of its pool back."""

    def __init__(self, store: Store, config: SessionConfig, cluster: Cluster) -> None:
        self._store, self._config, self._cluster = store, config, cluster
        self._pool = Pool(store, config, cluster)
        self._refresh: Callable[[], Any] = lambda: self.hold(None)
        self._state: Any = None
        self._fusion = (
            ray.remote(FusionActor)
            .options(
                name=_fusion_name(store, config.fusion.shards),
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                # Without any resource Ray would place it on any node, and keep that node from being given back.
                resources={HEAD: 0.001},
                max_restarts=-1,
                max_task_retries=TRIES,  # every change is named by its input, so it may be called again
                lifetime="detached" if cluster.joined else None,
            )
            .remote(store.url, config.fusion.shards)
        )

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        if not self._config.system.on_features:
            train(self._store, self._config, jobs, self._cluster, update)
            return
        steps = sum(all_steps_for(len(job.data.train), self._config) for job in jobs)

        def fit(actor: Any) -> Any:
            return self._watched(
                lambda report: actor.fit.remote(list(jobs), self._pool.threads(), report), steps, update
            )

        self._pool.alone(fit, update)

    def features(self, pictures: Split, update: Update) -> Seen:
        return Seen.joined(self._pool.spread([("features", (chunk,)) for chunk in chunks(pictures)], update))

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        found = self._pool.spread([("text_means", (tuple(classes), tuple(templates)))], no_update)
        return np.asarray(found[0])

    def hold(self, version: Manifest | None) -> None:
        self._refresh = lambda: self.hold(version)
        (self._state,) = self._change("held", version)

    def rescalers(
        self,
        parent: Manifest | None,
        task: TaskData,
        delta: ObjectRef | None,
        buffers: ObjectRef | None,
        update: Update,
    ) -> NDArray[np.float32]:
        def propose() -> None:
            (self._state,) = self._change("proposed", parent, task.name, delta)

        def train(actor: Any) -> Any:
            given = task, self._state, buffers, self._pool.threads()
            steps = steps_of(task, self._config)
            return self._watched(lambda report: actor.rescalers.remote(*given, report), steps, update)

        self._refresh = propose
        propose()
        return np.asarray(self._with_state(lambda: self._pool.alone(train, update)))

    def fuse(
        self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None, rescalers: ObjectRef | None
    ) -> Fused:
        self._refresh = lambda: self.fuse(key, parent, task, delta, rescalers)
        fused, (self._state,) = self._change("added", key, parent, task, delta, rescalers)
        return cast(Fused, fused)

    def score(self, questions: Sequence[Question], snapshot: Snapshot | None, update: Update) -> list[float]:
        asked = [replace(each, pictures=part) for each in questions for part in chunks(each.pictures)]
        shared = ray.put(snapshot)
        right = self._with_state(
            lambda: self._pool.spread([("right", (each, shared, self._state)) for each in asked], update)
        )
        counts: dict[int, int] = dict.fromkeys(range(len(questions)), 0)
        owner = [index for index, each in enumerate(questions) for _ in chunks(each.pictures)]
        for index, count in zip(owner, right, strict=True):
            counts[index] += count
        return [100 * counts[index] / max(1, len(each.pictures)) for index, each in enumerate(questions)]

    def logits(
        self, pictures: Split, voter: str | None, space: LabelSpace, snapshot: Snapshot, update: Update
    ) -> NDArray[np.float32]:
        shared = ray.put(snapshot)
        return np.concatenate(
            self._with_state(
                lambda: self._pool.spread(
                    [("logits", (chunk, voter, space, shared, self._state)) for chunk in chunks(pictures)], update
                )
            )
        )

    def route(self, pictures: Split, snapshot: Snapshot, update: Update) -> Sent:
        shared = ray.put(snapshot)
        return Sent.joined(self._pool.spread([("routed", (chunk, shared)) for chunk in chunks(pictures)], update))

    def close(self) -> None:
        """Gives the pool's cores back; the fusion actor of a cluster that was joined goes on."""
        self._pool.close()

    def dismiss(self) -> None:
        """Ends the fusion actor, too: nobody goes on with this store."""
        self.close()
        ray.kill(self._fusion)

    def _watched(self, ask: Callable[[Callable[[Step], None]], Any], steps: int, update: Update) -> Any:
        """The result of the call that `ask` starts; the steps it reports are shown while it runs.

        ask: gets the function that reports a step, and returns the call's reference. steps: how many there will be.
        """
        board = post()
        try:
            ref = ask(reporter(board))
            while not ray.wait([ref], timeout=POLL_SECONDS)[0]:
                show(ray.get(board.read.remote())[0], steps, update)
            return answer_of(ref)
        finally:
            ray.kill(board)

    def _change(self, method: str, *given: Any) -> Any:
        return result_of(getattr(self._fusion, method).remote(*given))

    def _with_state(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, which reads the state in Ray's object store; published anew where that was lost."""
        for _ in range(TRIES - 1):
            try:
                return ask()
            except (ObjectLostError, OwnerDiedError):
                # The fusion actor died and took the published state along; it makes the same one again.
                self._refresh()
        return ask()


def _fusion_name(store: Store, shards: int) -> str:
    """A copy of a store has the same id, but not the same place; another release is other code."""
    return f"fusion-{__version__}-{store.header.id}-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}-{shards}"
