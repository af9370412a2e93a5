"""From what θ⁰ sees in a picture to who answers, and with what weight: by domains or by prototypes.

Legend: B pictures, T tasks, M experts that answer for a picture, D and W widths of unit and domain features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from condu_ray.config import VoteConfig
from condu_ray.data.templates import word_key
from condu_ray.voting.combine import Scores, weights
from condu_ray.voting.domains import (
    PRIOR,
    Calibration,
    Discriminant,
    Distances,
    Domain,
    calibrate,
    evidence,
    probabilities,
    strangeness,
)
from condu_ray.voting.prototypes import Prototypes
from condu_ray.voting.routing import UNCALIBRATED, Thresholds, choose, similarities
from condu_ray.voting.routing import calibrate as calibrate_cosines

STRANGE = 0.95  # adaptive: from here on θ⁰ answers alone
DOUBT = 0.1  # share of a prior over tasks that is spread evenly, whatever the labels are


@dataclass(frozen=True, eq=False)
class Routed:
    """Who answers for one picture.

    experts: task indices, the likeliest first, at least one where there are tasks. nearness f64[M]: cosine to the
    nearest prototype, or probability of the task. shares f64[M]: of the experts among themselves, sum 1. base: θ⁰'s
    share of the whole; at 1 no expert is asked. evidence: for each expert what the router says of its classes, see
    `Router.evidence`; None where it says nothing of classes. strange: probability that the picture is of no task; None
    where the router does not say.
    """

    experts: tuple[int, ...]
    nearness: NDArray[np.float64]
    shares: Scores
    base: float
    evidence: tuple[Scores, ...] | None = None
    strange: float | None = None


@dataclass(frozen=True)
class Calibrated:
    """What held-out pictures say about a version's routing; None where nothing was held out or kept."""

    cosines: Thresholds | None = None
    domains: Calibration | None = None

    def to_state(self) -> dict[str, Any]:
        """As JSON, for a manifest."""
        return {
            "thresholds": asdict(self.cosines) if self.cosines else None,
            "domains": asdict(self.domains) if self.domains else None,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Calibrated:
        """The inverse of `to_state`; versions made by older releases know no domains."""
        cosines, domains = state.get("thresholds"), state.get("domains")
        return cls(Thresholds(**cosines) if cosines else None, Calibration(**domains) if domains else None)


class Known(Protocol):
    """What a router needs to know of a task. domain: None for a task that an older release learned."""

    @property
    def prototypes(self) -> Prototypes: ...
    @property
    def domain(self) -> Domain | None: ...


class Router(Protocol):
    def ranked(self, features: NDArray[np.float32], domains: NDArray[np.float32]) -> tuple[Scores, Scores]:
        """Unit features [B, D] and domain features [B, W] by θ⁰ -> (how near each task is f64[B, T], how surely the
        picture is of one of them f64[B]: higher is surer, without a unit)."""

    def nearest(self, features: NDArray[np.float32], domains: NDArray[np.float32]) -> NDArray[np.int64]:
        """The class that is nearest, i64[B]: its place among those of all tasks, one task after another."""

    def route(
        self, features: NDArray[np.float32], domains: NDArray[np.float32], prior: Prior | None = None
    ) -> list[Routed]:
        """Who answers for each picture. prior: what the labels say beforehand, if any were given."""

    def asking(self, k: int) -> Router:
        """The same with at most `k` experts a picture; shares all that is computed from the tasks."""

    @property
    def tells_classes(self) -> bool:
        """Whether the vote listens to what the router says of classes, and it says something."""

    def evidence(self, domains: NDArray[np.float32]) -> list[Scores]:
        """What domain features [B, W] say of each task's classes, f64[B, C]: to be added to the logarithm of the
        probabilities of the task's expert. Only where `tells_classes`."""


def router_of(tasks: Sequence[Known], vote: VoteConfig, calibrated: Calibrated) -> Router:
    """By domains where the vote says so, every task has one and they are calibrated; else by prototypes."""
    domains = [task.domain for task in tasks if task.domain is not None]
    if vote.router == "lda" and domains and len(domains) == len(tasks) and calibrated.domains:
        return DomainRouter(domains, vote, calibrated.domains)
    prototypes = [task.prototypes.of(vote.prototypes) for task in tasks]
    thresholds = calibrated.cosines or UNCALIBRATED
    return CosineRouter(prototypes, vote, thresholds if vote.gap is None else replace(thresholds, gap=vote.gap))


def calibrated(tasks: Sequence[Known], vote: VoteConfig) -> Calibrated:
    """What the tasks' held-out pictures say about routing by this vote (`vote.k`, `vote.prototypes`)."""
    if not tasks:
        return Calibrated()
    domains = [task.domain for task in tasks if task.domain is not None]
    return Calibrated(
        calibrate_cosines([task.prototypes.of(vote.prototypes) for task in tasks], vote.k),
        calibrate(domains) if len(domains) == len(tasks) else None,
    )


def for_prototypes(tasks: Sequence[Known], vote: VoteConfig, calibrated: Calibrated) -> Calibrated:
    """The same with the cosines calibrated anew, for a vote with other prototypes or another number of experts."""
    return replace(
        calibrated, cosines=calibrate_cosines([task.prototypes.of(vote.prototypes) for task in tasks], vote.k)
    )


@dataclass(frozen=True)
class Prior:
    """What is known before a picture is looked at. tasks f64[T]: probabilities, if it is of one of them. none: that it
    is of none."""

    tasks: Scores
    none: float


def prior_of(labels: Sequence[str], classes: Sequence[Sequence[str]]) -> Prior:
    """What a caller's labels say, by their words alone (ours): labels that are a task's classes speak for that task,
    labels that no task has speak for none.

    classes: of each task. Words are compared by their `word_key`.
    """
    asked = {word_key(label) for label in labels}
    learned = [{word_key(name) for name in names} for names in classes]
    matches = np.array([len(asked & names) for names in learned], dtype=np.float64)
    even = np.full(len(classes), 1 / max(1, len(classes)))
    tasks = matches / matches.sum() if matches.any() else even
    unknown = len(asked.difference(*learned)) / len(asked)
    return Prior((1 - DOUBT) * tasks + DOUBT * even, PRIOR + (1 - 2 * PRIOR) * unknown)


class _Asking:
    """What routers do alike with the vote."""

    _vote: VoteConfig

    def asking(self, k: int) -> Self:
        other = copy.copy(self)
        other._vote = self._vote.model_copy(update={"k": k})
        return other


class CosineRouter(_Asking):
    """The largest cosine to a class prototype decides (ConDU, as published); what the labels are does not matter."""

    def __init__(self, prototypes: Sequence[Prototypes], vote: VoteConfig, thresholds: Thresholds) -> None:
        self._prototypes, self._vote, self._thresholds = tuple(prototypes), vote, thresholds

    def ranked(self, features: NDArray[np.float32], domains: NDArray[np.float32]) -> tuple[Scores, Scores]:
        similarity = similarities(features, self._prototypes).astype(np.float64)
        return similarity, similarity.max(axis=1, initial=-1.0)

    def nearest(self, features: NDArray[np.float32], domains: NDArray[np.float32]) -> NDArray[np.int64]:
        every = np.concatenate([task.unit for task in self._prototypes])
        return np.asarray((features @ every.T).argmax(axis=1))

    @property
    def tells_classes(self) -> bool:
        return False

    def evidence(self, domains: NDArray[np.float32]) -> list[Scores]:
        raise ValueError("cosines say nothing of classes")

    def route(
        self, features: NDArray[np.float32], domains: NDArray[np.float32], prior: Prior | None = None
    ) -> list[Routed]:
        similarity = similarities(features, self._prototypes)
        routed = []
        for row, chosen in zip(similarity, choose(similarity, self._vote, self._thresholds), strict=True):
            near = row[list(chosen.experts)]
            _, base = weights(near, chosen.base, self._vote)
            shares, _ = weights(near, False, self._vote)
            routed.append(Routed(chosen.experts, near.astype(np.float64), shares, base))
        return routed


class DomainRouter(_Asking):
    """A linear discriminant on domain features decides; θ⁰ weighs as much as the picture is strange (ours)."""

    def __init__(self, domains: Sequence[Domain], vote: VoteConfig, calibration: Calibration) -> None:
        self._discriminant, self._vote, self._calibration = Discriminant(domains), vote, calibration

    def ranked(self, features: NDArray[np.float32], domains: NDArray[np.float32]) -> tuple[Scores, Scores]:
        return self._rank(self._discriminant.distances(domains))

    def nearest(self, features: NDArray[np.float32], domains: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(np.concatenate(self._discriminant.distances(domains).classes, axis=1).argmin(axis=1))

    @property
    def tells_classes(self) -> bool:
        return self._vote.within == "both" and self._calibration.within is not None

    def evidence(self, domains: NDArray[np.float32]) -> list[Scores]:
        return [evidence(classes, self._calibration) for classes in self._discriminant.distances(domains).classes]

    def _rank(self, found: Distances) -> tuple[Scores, Scores]:
        return probabilities(found.tasks, self._calibration), found.relative

    def route(
        self, features: NDArray[np.float32], domains: NDArray[np.float32], prior: Prior | None = None
    ) -> list[Routed]:
        found = self._discriminant.distances(domains)
        likely, relative = self._rank(found)
        if prior is None:
            strange = strangeness(relative, self._calibration)
        else:
            likely = likely * prior.tasks
            likely /= likely.sum(axis=1, keepdims=True)
            strange = strangeness(relative, self._calibration, prior.none)
        routed = [self._route(*pair) for pair in zip(likely, strange, strict=True)]
        if not self.tells_classes:
            return routed
        chosen = {task for one in routed for task in one.experts}
        told = {task: evidence(found.classes[task], self._calibration) for task in chosen}
        return [replace(one, evidence=tuple(told[task][row] for task in one.experts)) for row, one in enumerate(routed)]

    def _route(self, likely: Scores, strange: float) -> Routed:
        order = np.argsort(-likely, kind="stable")[: self._vote.k]
        if self._vote.adaptive:
            order = order[: int(np.searchsorted(np.cumsum(likely[order]), self._vote.coverage)) + 1]
        near = likely[order]
        experts = tuple(int(task) for task in order)
        if self._vote.combine == "mean_logits":
            return Routed(experts, near, np.full(len(near), 1 / len(near)), 1 / (len(near) + 1), strange=float(strange))
        base = self._vote.base_weight
        if base is None:
            base = 1.0 if self._vote.adaptive and strange >= STRANGE else float(strange)
        return Routed(experts, near, near / near.sum(), base, strange=float(strange))
