"""A pool of Ray actors that hold θ⁰: whichever is free does the next call, another does that of one that is lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from condu_ray.config import SessionConfig
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.progress import Update
from condu_ray.engine.replies import GONE, TRIES, answer_of, gone
from condu_ray.engine.scoring import Scorer, threads_of
from condu_ray.engine.work import Job, work_through
from condu_ray.errors import TrainingError
from condu_ray.methods.batches import MOST_LOADERS
from condu_ray.methods.step import Step
from condu_ray.methods.training import Place
from condu_ray.store import Store

HIRE_SECONDS, LONGEST_HIRE_SECONDS = 60.0, 900.0
"""Longest wait for all actors that were asked for; where none has started by then, for the first of them."""
ANSWER_SECONDS = 10.0  # until an actor with nothing to do counts as busy, not gone
POLL_SECONDS = 1.0


class Worker(Scorer):
    """Ray actor of the pool. It also fits what learns on features: too small for a group of workers of its own."""

    def fit(self, jobs: Sequence[Job], threads: int, report: Callable[[Step], None]) -> None:
        """Puts the delta of every job into the store, unless it is there."""
        with threads_of(threads):
            work_through(self._store, self._config, jobs, Place(), report, self._device)


class Pool:
    """Actors that hold θ⁰, hired as there is work for them, and not held to a node that is lost."""

    def __init__(self, store: Store, config: SessionConfig, cluster: Cluster) -> None:
        self._store, self._config, self._cluster = store, config, cluster
        self._actors: list[Any] = []
        self._sought = 0  # how many actors were asked for: those that found no place are not waited for again
        self._lacks = False  # whether one that was hired for a lost one found no place

    def spread(self, calls: Sequence[tuple[str, tuple[Any, ...]]], update: Update) -> list[Any]:
        """Results of these calls in their order, from whichever actors are free; the call of one that dies is given to
        another."""
        results: list[Any] = [None] * len(calls)
        waiting, tries = deque(range(len(calls))), [TRIES] * len(calls)
        free, under_way = list(self._hired(len(calls), update)), dict[Any, tuple[int, Any]]()
        while waiting or under_way:
            while waiting and free:
                place, actor = waiting.popleft(), free.pop()
                name, given = calls[place]
                under_way[getattr(actor, name).remote(*given)] = (place, actor)
            for ref in ray.wait(list(under_way))[0]:
                place, actor = under_way.pop(ref)
                try:
                    results[place] = answer_of(ref)
                except GONE as error:
                    tries[place] -= 1
                    if not tries[place]:
                        raise gone(error) from None
                    waiting.appendleft(place)
                    free = self._without(actor, free, update)
                    continue
                free.append(actor)
                update(len(calls) - len(waiting) - len(under_way), len(calls), "")
        return results

    def alone(self, ask: Callable[[Any], Any], update: Update) -> Any:
        """What `ask`, which is given one actor of the pool, returns; asked again of another where that one dies."""
        for left in range(TRIES - 1, -1, -1):
            actor = self._hired(1, update)[0]
            try:
                return ask(actor)
            except GONE as error:
                if not left:
                    raise gone(error) from None
                self._without(actor, self._actors, update)
        raise AssertionError("not reached")

    def threads(self) -> int:
        """How many threads one actor takes for a training while the others wait: those of the whole pool, as far as the
        node with the fewest cores has them; beside a GPU the cores there are for each.

        It follows from the cluster and the settings alone, not from how many actors found a place, since sums in
        floating point may depend on it.
        """
        if self._gpu:
            return self._beside_a_gpu()
        return max(1, min([self._places, *(cpus for cpus, _ in self._cluster.nodes if cpus)]))

    def close(self) -> None:
        """Gives the cores back."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._sought, self._lacks = [], 0, False

    def _without(self, dead: Any, idle: Sequence[Any], update: Update) -> list[Any]:
        """Takes an actor out of the pool, and the idle ones that went with it: on each a call would be tried in vain.

        Returns who is idle then, with those that are hired instead. Their node may be gone for good: once one found no
        place, none is waited for as long as others do the work.
        """
        left = those_alive([actor for actor in idle if actor != dead])
        lost = [dead, *(actor for actor in idle if actor != dead and actor not in left)]
        self._actors = [actor for actor in self._actors if actor not in lost]
        if self._actors and self._lacks:
            return left
        hired = self._hire(len(lost), update)
        self._lacks = len(hired) < len(lost)
        self._actors += hired
        return left + hired

    @property
    def _gpu(self) -> bool:
        return self._config.gpu == "auto" and self._cluster.gpus > 0

    @property
    def _places(self) -> int:
        """How many actors the pool has if all of them find a core."""
        places = max(1, self._cluster.gpus if self._gpu else self._cluster.cpus)
        return min(places, self._config.workers or places)

    def _beside_a_gpu(self) -> int:
        """CPU cores for each GPU, on the node that has the fewest."""
        return max(1, min(cpus // gpus for cpus, gpus in self._cluster.nodes if gpus))

    def _hired(self, calls: int, update: Update) -> list[Any]:
        """The pool, grown where so many calls have work for more: each actor is a process that holds the base model."""
        wanted = min(self._places, calls)
        if wanted > self._sought:
            hired = self._hire(wanted - self._sought, update)
            self._actors += hired
            self._sought = wanted if len(hired) == wanted - self._sought else self._places  # or each would wait anew
        return self._actors

    def _hire(self, count: int, update: Update) -> list[Any]:
        gpu = self._gpu
        # Not restarted by Ray: it would wait for the node that it was lost with, and others can do its work.
        actor = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpu else 0)
        device, decoders = ("cuda", min(MOST_LOADERS, self._beside_a_gpu())) if gpu else ("cpu", 1)
        given = (self._store.url, self._config, device, decoders)
        place = "GPU" if gpu else "CPU core"
        return those_ready([actor.remote(*given) for _ in range(count)], place, update, needed=not self._actors)


def those_ready(actors: Sequence[Any], place: str, update: Update, needed: bool = True) -> list[Any]:
    """Waits for actors to start, and returns those that did; the others are ended.

    Not all need to start: other work may hold some of the cluster's cores. place: the resource that they need, said
    while they wait and in the error where none came free. needed: whether at least one of them must start; False where
    other actors can do the work. One that is lost while it starts (with its node, or for want of memory) counts as not
    started. Raises TrainingError where none starts that is needed, and for one that says why it cannot.
    """
    hired = {one.__ray_ready__.remote(): one for one in actors}
    ready, late = ray.wait(list(hired), num_returns=len(hired), timeout=HIRE_SECONDS)
    until = time.monotonic() + LONGEST_HIRE_SECONDS
    while not ready and needed and time.monotonic() < until:
        update(0, 1, f"waiting for a {place} of the cluster to come free (`ray status`)")
        ready, late = ray.wait(late, timeout=POLL_SECONDS)
    for ref in late:
        ray.kill(hired[ref])
    if not ready and needed:
        raise TrainingError(
            f"no {place} of the cluster came free in {LONGEST_HIRE_SECONDS:.0f} s",
            "end other work on it, and run the same command again",
        )
    alive, lost = list[Any](), list[RayError]()
    for ref in ready:
        try:
            answer_of(ref)  # one that could not start counts as ready, too
            alive.append(hired[ref])
        except GONE as error:
            if getattr(error, "actor_init_failed", False):
                raise gone(error) from None
            lost.append(error)
    if lost and needed and not alive:
        raise gone(lost[0])
    return alive


def those_alive(actors: Sequence[Any]) -> list[Any]:
    """Those that are not gone, of actors with nothing to do: where one is lost, its whole node may be."""
    asked = {one.__ray_ready__.remote(): one for one in actors}
    if not asked:
        return []
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    alive = [asked[ref] for ref in late]
    for ref in ready:
        with suppress(*GONE):
            answer_of(ref)
            alive.append(asked[ref])
    return alive
