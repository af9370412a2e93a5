"""Answers cached pictures again under other settings of the vote: what voting/classifier.py does for one picture, here
for all at once, from logits that every voter gave once. tests/tuning/test_rescoring.py holds the two together.

Legend: N pictures, T tasks learned, V = T + 1 voters (θ⁰ last), C labels of the whole stream, n, c those of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from condu_ray.config import VoteConfig
from condu_ray.voting.classifier import TaskExpert
from condu_ray.voting.domains import strangeness
from condu_ray.voting.labels import Label, LabelSpace, Part
from condu_ray.voting.router import STRANGE, Calibrated, Prior, prior_of, router_of
from condu_ray.voting.routing import UNCALIBRATED, Thresholds, calibrate

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pictures:
    """The validation pictures of a stream, task after task.

    classes: of each task, in the order learned. owners i64[N]: whose pictures. labels i64[N]: index into the stream's
    labels. features f32[N, D], domains f32[N, W]: by θ⁰.
    """

    classes: tuple[tuple[str, ...], ...]
    owners: Indices
    labels: Indices
    features: NDArray[np.float32]
    domains: NDArray[np.float32]

    def rows(self, task: int) -> slice:
        found = np.flatnonzero(self.owners == task)
        return slice(int(found[0]), int(found[-1]) + 1)

    def columns(self, task: int) -> slice:
        start = sum(len(names) for names in self.classes[:task])
        return slice(start, start + len(self.classes[task]))


@dataclass(frozen=True, eq=False)
class _Routed:
    """chosen bool[N, T]. shares f64[N, T]: of the experts among themselves, 0 where not chosen. base f64[N]. order
    i64[N, T]: the likeliest first."""

    chosen: NDArray[np.bool_]
    shares: Doubles
    base: Doubles
    order: Indices


class Version:
    """One version's experts and what each voter says of every picture. logits: f32[V, N, C].

    calibrated: as the version holds it. Its domains do not depend on the vote; its cosines do, and are made anew.
    """

    def __init__(
        self,
        pictures: Pictures,
        experts: Sequence[TaskExpert],
        logits: NDArray[np.float32],
        calibrated: Calibrated,
    ) -> None:
        self._pictures, self._experts, self._logits = pictures, tuple(experts), logits
        self._domains = calibrated.domains if all(each.domain is not None for each in experts) else None
        self._learned = len(self._experts)
        self._thresholds = lru_cache(maxsize=None)(self._calibrate)
        self._ranked = lru_cache(maxsize=None)(self._rank)
        self._own = lru_cache(maxsize=None)(self._best_of_own)
        self._evidence_of = lru_cache(maxsize=None)(self._evidence)
        self._parts = lru_cache(maxsize=None)(self._parts_of)

    def row(self, vote: VoteConfig, labels: str, unseen: bool) -> tuple[list[float | None], float]:
        """(accuracy in percent by task of the stream, experts that run for a picture of a learned task, on average).

        labels: `union` or `candidates`, how learned tasks are asked; tasks to come are asked as candidates, if at all.
        """
        found: list[float | None] = []
        experts = 0.0
        rows = self._pictures.rows
        asked = rows(self._learned - 1).stop  # pictures of learned tasks come first
        truth = self._pictures.labels
        if labels == "union":
            answers, run = self.union(vote)
            right = answers == truth[:asked]
            found = [_percent(right[rows(task)]) for task in range(self._learned)]
            experts = float(run.mean())
        for task in range(len(found), len(self._pictures.classes)):
            if task >= self._learned and not unseen:
                found.append(None)
                continue
            answers, run = self.candidates(vote, task)
            found.append(_percent(answers == truth[rows(task)]))
            if task < self._learned:
                experts += float(run.sum()) / asked
        return found, experts

    # ---- who answers

    def _calibrate(self, k: int, prototypes: Literal["both", "image", "text"]) -> Thresholds:
        return calibrate([expert.prototypes.of(prototypes) for expert in self._experts], k)

    def _rank(self, router: str, prototypes: str) -> tuple[Doubles, Doubles]:
        """What the router makes of all pictures, see `Router.ranked`; neither thresholds nor k count for it."""
        vote = VoteConfig.model_validate({"router": router, "prototypes": prototypes})
        found = router_of(self._experts, vote, Calibrated(UNCALIBRATED, self._domains))
        return found.ranked(self._pictures.features, self._pictures.domains)

    def _route(self, vote: VoteConfig, rows: slice, prior: Prior | None) -> _Routed:
        if vote.router == "lda" and self._domains is not None:
            near, sure = self._ranked("lda", "both")
            likely = near[rows]
            if prior is not None:
                likely = likely * prior.tasks
                likely = likely / likely.sum(axis=1, keepdims=True)
            strange = strangeness(sure[rows], self._domains, *(() if prior is None else (prior.none,)))
            return _by_domains(vote, likely, strange)
        near, _ = self._ranked("cosine", vote.prototypes)
        thresholds = self._thresholds(vote.k, vote.prototypes)
        gap = thresholds.gap if vote.gap is None else vote.gap
        return _by_cosines(vote, near[rows], gap, thresholds.known, thresholds.unseen)

    # ---- what they say

    def _best_of_own(self, router: str, within: str) -> tuple[Doubles, Indices]:
        """(log probability f64[N, T] of the likeliest of its own labels by each expert, which label i64[N, T])."""
        size = self._logits.shape[1], self._learned
        surest, best = np.empty(size), np.empty(size, dtype=np.int64)
        told = self._evidence_of(router, within)
        for task in range(self._learned):
            columns = self._pictures.columns(task)
            own = self._logits[task, :, columns].astype(np.float64)
            if told:
                own += told[task]
            top = own.max(axis=1)
            surest[:, task] = -np.log(np.exp(own - top[:, None]).sum(axis=1))
            best[:, task] = own.argmax(axis=1) + columns.start
        return surest, best

    def _evidence(self, router: str, within: str) -> list[Doubles]:
        """What the router says of each task's classes, f64[N, c]; nothing where the vote does not listen to it."""
        vote = VoteConfig.model_validate({"router": router, "within": within})
        found = router_of(self._experts, vote, Calibrated(UNCALIBRATED, self._domains))
        return found.evidence(self._pictures.domains) if found.tells_classes else []

    def union(self, vote: VoteConfig) -> tuple[Indices, Indices]:
        """For the pictures of all learned tasks: (label answered among all that are learned, experts that run)."""
        rows = slice(0, self._pictures.rows(self._learned - 1).stop)
        routed = self._route(vote, rows, None)
        if vote.union == "own":
            surest, best = (each[rows] for each in self._own(vote.router, vote.within))
            with np.errstate(divide="ignore"):
                scores = np.where(routed.chosen, np.log(routed.shares) + surest, -np.inf)
            # Of equals the likelier task answers, as in the classifier.
            first = np.take_along_axis(scores, routed.order, axis=1).argmax(axis=1)
            answers = best[np.arange(len(best)), routed.order[np.arange(len(best)), first]]
            return answers, routed.chosen.sum(axis=1)
        stop = self._pictures.columns(self._learned - 1).stop
        logits = self._logits[:, rows, :stop]
        counted = None
        if vote.union == "routed":
            sizes = [len(names) for names in self._pictures.classes[: self._learned]]
            counted = np.repeat(routed.chosen, sizes, axis=1)
        return self._answer(vote, routed, logits, counted), _run(routed)

    def candidates(self, vote: VoteConfig, task: int) -> tuple[Indices, Indices]:
        """For the pictures of one task of the stream, learned or not: (label answered among its own, experts)."""
        rows, columns = self._pictures.rows(task), self._pictures.columns(task)
        prior = prior_of(self._pictures.classes[task], [expert.classes for expert in self._experts])
        routed = self._route(vote, rows, prior)
        parts, whole = self._parts(task)
        if parts and not whole and vote.union == "own":
            answers, run = self._in_parts(vote, routed, rows, columns, parts)
            return answers + columns.start, run
        logits = self._logits[:, rows, columns].astype(np.float64)
        for voter, told in enumerate(self._evidence_of(vote.router, vote.within)):
            part = whole.get(self._experts[voter].name)
            if part is not None:
                logits[voter] += told[rows, part.classes]
        return self._answer(vote, routed, logits, None) + columns.start, _run(routed)

    def _parts_of(self, task: int) -> tuple[dict[str, Part], dict[str, Part]]:
        """(which of a task's labels are classes of each expert's task, those of them that are all labels)."""
        space = LabelSpace("candidates", tuple(Label(None, name) for name in self._pictures.classes[task]), ())
        parts = space.by_task(self._experts)
        return parts, {name: part for name, part in parts.items() if space.whole(part)}

    def _in_parts(
        self, vote: VoteConfig, routed: _Routed, rows: slice, columns: slice, parts: Mapping[str, Part]
    ) -> tuple[Indices, Indices]:
        """As `Classifier` answers words that are all learned, but by no task alone: each expert scores those that are
        its own."""
        having = np.array([expert.name in parts for expert in self._experts])
        weights = _weights(routed)
        weights[:, :-1] *= having
        weights[weights.sum(axis=1) == 0, -1] = 1
        weights /= weights.sum(axis=1, keepdims=True)
        told = self._evidence_of(vote.router, vote.within)
        scores = weights[:, -1:] * softmax(self._logits[-1, rows, columns].astype(np.float64), axis=1)
        for voter in np.flatnonzero(having).tolist():
            part, own = parts[self._experts[voter].name], self._pictures.columns(voter)
            said = self._logits[voter, rows, own][:, part.classes].astype(np.float64)
            if told:
                said += told[voter][rows][:, part.classes]
            scores[:, part.labels] += weights[:, voter, None] * softmax(said, axis=1)
        return scores.argmax(axis=1), np.where(routed.base < 1, (routed.chosen & having).sum(axis=1), 0)

    def _answer(
        self, vote: VoteConfig, routed: _Routed, logits: NDArray[np.floating[Any]], counted: NDArray[np.bool_] | None
    ) -> Indices:
        """Which label wins, i64[n]. logits: f32[V, n, c]. counted bool[n, c]: which labels count, None: all."""
        weights = _weights(routed)
        scores = np.zeros(logits.shape[1:])
        mixes = vote.combine == "weighted" and vote.average == "probabilities"
        for voter in range(len(logits)):
            places = np.flatnonzero(weights[:, voter] > 0)
            if not len(places):
                continue
            said = logits[voter, places].astype(np.float64)
            if mixes:
                said = np.exp(said - said.max(axis=1, keepdims=True))
                of = said if counted is None else said * counted[places]
                said = said / of.sum(axis=1, keepdims=True)
            scores[places] += weights[places, voter][:, None] * said
        if counted is not None:
            scores[~counted] = -np.inf
        return np.asarray(scores.argmax(axis=1))


def _percent(right: NDArray[np.bool_]) -> float:
    return 100 * int(right.sum()) / len(right)


def _weights(routed: _Routed) -> Doubles:
    """Of every voter, f64[n, V], θ⁰'s last; they sum to 1."""
    return np.concatenate([(1 - routed.base)[:, None] * routed.shares, routed.base[:, None]], axis=1)


def _run(routed: _Routed) -> Indices:
    """Experts that run for each picture: none where θ⁰ answers alone."""
    return np.asarray(np.where(routed.base < 1, routed.chosen.sum(axis=1), 0))


def _by_domains(vote: VoteConfig, likely: Doubles, strange: Doubles) -> _Routed:
    """As `DomainRouter.route`."""
    order = np.argsort(-likely, axis=1, kind="stable")
    ordered = np.take_along_axis(likely, order, axis=1)
    count = np.full(len(likely), min(vote.k, likely.shape[1]))
    if vote.adaptive:
        count = np.minimum(count, (np.cumsum(ordered, axis=1) < vote.coverage).sum(axis=1) + 1)
    taken = np.arange(likely.shape[1]) < count[:, None]
    if vote.combine == "mean_logits":
        return _placed(order, taken, taken / count[:, None], 1 / (count + 1))
    near = np.where(taken, ordered, 0.0)
    base = np.full(len(likely), vote.base_weight) if vote.base_weight is not None else strange
    if vote.base_weight is None and vote.adaptive:
        base = np.where(strange >= STRANGE, 1.0, strange)
    return _placed(order, taken, near / near.sum(axis=1, keepdims=True), base)


def _by_cosines(vote: VoteConfig, near: Doubles, gap: float, known: float, unseen: float) -> _Routed:
    """As `CosineRouter.route`."""
    order = np.argsort(-near, axis=1, kind="stable")
    ordered = np.take_along_axis(near, order, axis=1)
    most = min(vote.k, near.shape[1])
    count = np.full(len(near), most)
    takes_part = np.ones(len(near), dtype=bool)
    if vote.adaptive:
        wide = np.concatenate([ordered[:, :-1] - ordered[:, 1:], np.full((len(near), 1), np.inf)], axis=1) >= gap
        lost = ordered[:, 0] < unseen
        count = np.where(lost, most, np.minimum(most, wide.argmax(axis=1) + 1))
        takes_part = lost | ~(wide[:, 0] & (ordered[:, 0] >= known))
    taken = np.arange(near.shape[1]) < count[:, None]
    if vote.combine == "mean_logits":
        return _placed(order, taken, taken / count[:, None], takes_part / (count + 1))
    equal = 1 / (count + 1) if vote.base_weight is None else vote.base_weight
    scores = np.where(taken, ordered / vote.temperature, -np.inf)
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return _placed(order, taken, shares / shares.sum(axis=1, keepdims=True), takes_part * equal)


def _placed(order: Indices, taken: NDArray[np.bool_], shares: Doubles, base: Doubles) -> _Routed:
    """From the order of likelihood to the order of tasks."""
    chosen, placed = np.zeros_like(taken), np.zeros(shares.shape)
    np.put_along_axis(chosen, order, taken, axis=1)
    np.put_along_axis(placed, order, shares, axis=1)
    return _Routed(chosen, placed, np.asarray(base, dtype=np.float64), order)


def vote_of(base: VoteConfig, settings: Mapping[str, Any]) -> VoteConfig:
    """`base` with settings of the vote by dotted name."""
    own = {name.removeprefix("vote."): value for name, value in settings.items()}
    return VoteConfig.model_validate({**base.model_dump(), **own})
