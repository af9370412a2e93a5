"""Who does the work of a session: the protocol that the spine speaks, and Ray's side of it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError

from condu_ray import __version__
from condu_ray.config import SessionConfig
from condu_ray.data import Split, TaskData
from condu_ray.engine.board import POLL_SECONDS, post, reporter, show
from condu_ray.engine.cluster import NAMESPACE, Cluster
from condu_ray.engine.fusing import Fused
from condu_ray.engine.fusion_actor import FusionActor
from condu_ray.engine.progress import Update, unseen
from condu_ray.engine.replies import TRIES, answer_of, gone, result_of
from condu_ray.engine.scoring import Question, Scorer, Seen, Sent, Snapshot, threads_of
from condu_ray.engine.train import Job, train, work_through
from condu_ray.errors import TrainingError
from condu_ray.methods import registry
from condu_ray.methods.batches import MOST_LOADERS
from condu_ray.methods.rescaling import steps_of
from condu_ray.methods.step import Step
from condu_ray.methods.training import Place, all_steps_for
from condu_ray.store import Manifest, ObjectRef, Store
from condu_ray.voting.labels import LabelSpace

CHUNK = 256  # pictures a call; fixed, so that sums do not depend on the number of actors
HIRE_SECONDS, LONGEST_HIRE_SECONDS = 60.0, 900.0
HEAD = "node:__internal_head__"  # a resource that Ray gives the head node of any cluster


class Crew(Protocol):
    """Does the heavy steps of a session. Every call may be repeated after a crash and then gives the same result."""

    def train(self, jobs: Sequence[Job], update: Update) -> None:
        """Puts the delta of every job into the store, unless it is there."""

    def features(self, pictures: Split, update: Update) -> Seen:
        """What θ⁰ sees."""

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Mean text vectors of classes by θ⁰, f32[C, D]."""

    def hold(self, version: Manifest | None) -> None:
        """Makes the state of a version the one that experts and votes are asked of."""

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


class Worker(Scorer):
    """Ray actor of the pool. It also fits what learns on features: too small for a group of workers of its own."""

    def fit(self, jobs: Sequence[Job], threads: int, report: Callable[[Step], None]) -> None:
        """Puts the delta of every job into the store, unless it is there."""
        with threads_of(threads):
            work_through(self._store, self._config, jobs, Place(), report, self._device)


class RayCrew:
    """Ray Train, the fusion actor, and a pool of actors that hold θ⁰."""

    def __init__(self, store: Store, config: SessionConfig, cluster: Cluster) -> None:
        self._store, self._config, self._cluster = store, config, cluster
        self._pool: list[Any] = []
        self._sought = 0  # of the pool's places; who found none is not waited for again
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
        if not registry.info(self._config.method).on_features:
            train(self._store, self._config, jobs, self._cluster, update)
            return
        steps = sum(all_steps_for(len(job.data.train), self._config) for job in jobs)

        def fit(actor: Any) -> Any:
            return self._watched(lambda report: actor.fit.remote(list(jobs), self._threads(), report), steps, update)

        self._alone(fit)

    def features(self, pictures: Split, update: Update) -> Seen:
        return Seen.joined(self._spread([("features", (chunk,)) for chunk in chunks(pictures)], update))

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        found = self._spread([("text_means", (tuple(classes), tuple(templates)))], unseen)
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
            given = task, self._state, buffers, self._threads()
            steps = steps_of(task, self._config)
            return self._watched(lambda report: actor.rescalers.remote(*given, report), steps, update)

        self._refresh = propose
        propose()
        return np.asarray(self._with_state(lambda: self._alone(train)))

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
            lambda: self._spread([("right", (each, shared, self._state)) for each in asked], update)
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
                lambda: self._spread(
                    [("logits", (chunk, voter, space, shared, self._state)) for chunk in chunks(pictures)], update
                )
            )
        )

    def route(self, pictures: Split, snapshot: Snapshot, update: Update) -> Sent:
        shared = ray.put(snapshot)
        return Sent.joined(self._spread([("routed", (chunk, shared)) for chunk in chunks(pictures)], update))

    def close(self) -> None:
        """Gives the pool's cores back; the fusion actor of a cluster that was joined goes on."""
        for actor in self._pool:
            ray.kill(actor)
        self._pool, self._sought = [], 0

    def dismiss(self) -> None:
        """Ends the fusion actor, too: nobody goes on with this store."""
        self.close()
        ray.kill(self._fusion)

    def _watched(self, ask: Callable[[Callable[[Step], None]], Any], steps: int, update: Update) -> Any:
        """The result of what `ask` starts with a place to report to; meanwhile its steps are shown."""
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
        """What `ask` returns, which needs the published state."""
        for _ in range(TRIES - 1):
            try:
                return ask()
            except (ObjectLostError, OwnerDiedError):
                # The fusion actor died and took the published state along; it makes the same one again.
                self._refresh()
        return ask()

    def _spread(self, calls: Sequence[tuple[str, tuple[Any, ...]]], update: Update) -> list[Any]:
        """Results of these calls in their order, from whichever actors are free; the call of one that dies is given to
        another."""
        results: list[Any] = [None] * len(calls)
        waiting, tries = deque(range(len(calls))), [TRIES] * len(calls)
        free, under_way = list(self._hired(len(calls))), dict[Any, tuple[int, Any]]()
        while waiting or under_way:
            while waiting and free:
                place, actor = waiting.popleft(), free.pop()
                name, given = calls[place]
                under_way[getattr(actor, name).remote(*given)] = (place, actor)
            for ref in ray.wait(list(under_way))[0]:
                place, actor = under_way.pop(ref)
                try:
                    results[place] = answer_of(ref)
                except RayActorError as error:
                    tries[place] -= 1
                    if not tries[place]:
                        raise gone(error) from None
                    waiting.appendleft(place)
                    free += self._instead_of(actor)
                    continue
                free.append(actor)
                update(len(calls) - len(waiting) - len(under_way), len(calls), "")
        return results

    def _alone(self, ask: Callable[[Any], Any]) -> Any:
        """What `ask`, which is given one actor of the pool, returns; asked again of another where that one dies."""
        for left in range(TRIES - 1, -1, -1):
            actor = self._hired(1)[0]
            try:
                return ask(actor)
            except RayActorError as error:
                if not left:
                    raise gone(error) from None
                self._instead_of(actor)
        raise AssertionError("not reached")

    def _instead_of(self, dead: Any) -> list[Any]:
        """Takes an actor out of the pool and hires another, if it finds a place: its node may be gone for good."""
        self._pool.remove(dead)
        hired = self._hire(1)
        self._pool += hired
        return hired

    @property
    def _gpu(self) -> bool:
        return self._config.gpu == "auto" and self._cluster.gpus > 0

    @property
    def _places(self) -> int:
        """How many actors the pool has if all of them find a core."""
        places = max(1, self._cluster.gpus if self._gpu else self._cluster.cpus)
        return min(places, self._config.workers or places)

    def _threads(self) -> int:
        """Of one actor that works while the rest of the pool waits: as many of its cores as every node has.

        From the cluster and the settings alone, not from who found a place: sums may depend on it.
        """
        if self._gpu:
            return self._beside_a_gpu()
        return max(1, min([self._places, *(cpus for cpus, _ in self._cluster.nodes if cpus)]))

    def _beside_a_gpu(self) -> int:
        """Cores that every node has for each of its GPUs."""
        return max(1, min(cpus // gpus for cpus, gpus in self._cluster.nodes if gpus))

    def _hired(self, calls: int) -> list[Any]:
        """The pool, grown where so many calls have work for more: each actor is a process that holds the base model."""
        wanted = min(self._places, calls)
        if wanted > self._sought:
            hired = self._hire(wanted - self._sought)
            self._pool += hired
            self._sought = wanted if len(hired) == wanted - self._sought else self._places  # or each would wait anew
        return self._pool

    def _hire(self, count: int) -> list[Any]:
        gpu = self._gpu
        # Not restarted by Ray: it would wait for the node that it was lost with, and others can do its work.
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpu else 0)
        device, decoders = ("cuda", min(MOST_LOADERS, self._beside_a_gpu())) if gpu else ("cpu", 1)
        given = (self._store.url, self._config, device, decoders)
        place = "GPU" if gpu else "CPU core"
        return those_ready([actor.remote(*given) for _ in range(count)], place, needed=not self._pool)


def those_ready(actors: Sequence[Any], place: str, needed: bool = True) -> list[Any]:
    """Those that found a place; the others are ended, since other work may hold some of the cluster's cores.

    place: what they need, for the error where none came free. needed: False where others do the work without them.
    """
    hired = {one.__ray_ready__.remote(): one for one in actors}
    ready, late = ray.wait(list(hired), num_returns=len(hired), timeout=HIRE_SECONDS)
    if not ready and needed:
        ready, late = ray.wait(late, timeout=LONGEST_HIRE_SECONDS)
    for ref in late:
        ray.kill(hired[ref])
    if not ready and needed:
        raise TrainingError(
            f"no {place} of the cluster came free in {LONGEST_HIRE_SECONDS:.0f} s",
            "end other work on it, and run the same command again",
        )
    for ref in ready:
        result_of(ref)  # one that could not start counts as ready, too
    return [hired[ref] for ref in ready]


def _fusion_name(store: Store, shards: int) -> str:
    """A copy of a store has the same id, but not the same place; another release is other code."""
    return f"fusion-{__version__}-{store.header.id}-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}-{shards}"


def chunks(pictures: Split) -> list[Split]:
    return [pictures.take(range(start, min(start + CHUNK, len(pictures)))) for start in range(0, len(pictures), CHUNK)]
