"""The search for settings of the vote: batches of configurations, each scored from what the voters said once.

No trial actor a configuration: a pool of processes maps the logits and takes batches, so thousands go by in a minute.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from condu_ray.config import VoteConfig
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.pool import those_alive, those_ready
from condu_ray.engine.progress import Update
from condu_ray.engine.replies import GONE, TRIES, answer_of, gone
from condu_ray.store import open_store
from condu_ray.tracking.matrix import mean
from condu_ray.tuning.cache import Cached, load_versions
from condu_ray.tuning.objectives import figures_of
from condu_ray.tuning.proposals import Proposals
from condu_ray.tuning.records import Record, Report, Scores
from condu_ray.tuning.rescoring import vote_of
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.space import Settings

BATCH = 16
"""Configurations a call; while they are scored the search learns nothing of them."""

Batch = list[tuple[int, Settings]]
"""(number, settings) of each."""


class Rescorer:
    """Answers the whole stream again, for one configuration after another."""

    def __init__(self, cached: Cached, vote: VoteConfig, labels: str, unseen: bool) -> None:
        self._cached, self._vote, self._labels, self._unseen = cached, vote, labels, unseen
        self._versions = load_versions(cached, open_store(cached.store))

    def figures(self, settings: Settings) -> dict[str, float]:
        """By name, as `figures_of` has them; latency: ms a picture, from the passes it takes."""
        vote = vote_of(self._vote, settings)
        rows, experts = [], 0.0
        for version in self._versions:
            row, experts = version.row(vote, self._labels, self._unseen)
            rows.append(row)
        # Without tasks to come the newest version stands for itself: it is the only one that was asked.
        last = mean(rows[-1])
        assert last is not None  # the newest version has learned every task
        found = figures_of(rows, self._cached.zero_shot) if self._unseen else {"last": last}
        if self._cached.passes is not None:
            base, expert = self._cached.passes
            found["latency"] = base + experts * expert
        return found

    def scored(self, batch: Sequence[Settings]) -> list[tuple[dict[str, float], float]]:
        """(figures, seconds) of each."""
        found = []
        for settings in batch:
            begun = time.perf_counter()
            found.append((self.figures(settings), time.perf_counter() - begun))
        return found


def search(sweep: Sweep, cached: Cached, folder: Path, cluster: Cluster, update: Update) -> list[Record]:
    """Scores what is missing of the sweep's configurations and returns all, in the order proposed."""
    scores = Scores(folder)
    known = scores.all()
    proposals = Proposals(sweep, known=known)
    # Not restarted by Ray: it would wait for the node that it was lost with, and others can do its work.
    actor = ray.remote(num_cpus=1)(Rescorer)
    given = (cached, sweep.config.vote, sweep.asked, sweep.goals.unseen)
    places = max(1, min(cluster.cpus, sweep.config.workers or cluster.cpus))
    hired: list[Any] = []

    def hire(count: int) -> list[Any]:
        found = those_ready([actor.remote(*given) for _ in range(count)], "CPU core", update)
        hired.extend(found)
        return found

    try:
        _work(sweep, proposals, hire(places), hire, scores, known, update)
    finally:
        for each in hired:
            ray.kill(each)
    return scores.all()


def _work(
    sweep: Sweep,
    proposals: Proposals,
    free: list[Any],
    hire: Callable[[int], list[Any]],
    scores: Scores,
    known: list[Record],
    update: Update,
) -> None:
    """The batch of a process that is gone is given to another. free: processes with nothing to do; hire: brings one
    where none is left."""
    running = dict[Any, tuple[Any, Batch]]()
    again, lost = list[Batch](), Counter[int]()
    done = len(known)
    while True:
        while free and (batch := again.pop() if again else _batch(proposals)):
            worker = free.pop()
            running[worker.scored.remote([settings for _, settings in batch])] = (worker, batch)
        if not running:
            return
        (ready,), _ = ray.wait(list(running), num_returns=1)
        worker, batch = running.pop(ready)
        try:
            scored = answer_of(ready)
        except GONE as error:
            first, _ = batch[0]
            lost[first] += 1
            if lost[first] == TRIES:
                raise gone(error) from None
            again.append(batch)
            free = those_alive(free)  # with one its whole node may be lost
            if not free and not running:
                free = hire(1)
            continue
        free.append(worker)
        ended = []
        for (number, settings), (figures, seconds) in zip(batch, scored, strict=True):
            values = sweep.goals.values(figures)
            proposals.tell(number, values)
            ended.append(Record(number, settings, (Report(1, values, figures, 0, seconds),), "finished"))
        scores.add(ended)
        done += len(ended)
        update(done, sweep.most, "")


def _batch(proposals: Proposals) -> Batch:
    found: Batch = []
    while len(found) < BATCH and (one := proposals.ask()):
        found.append(one)
    return found
