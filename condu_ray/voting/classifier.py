"""A version that answers: one pass of θ⁰ chooses the experts, and only those run, each once a batch.

Legend: B pictures, C labels of a label space, M voters of a picture, D width of the common space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ray.config import VoteConfig
from condu_ray.data import DEFAULT_TEMPLATES
from condu_ray.errors import DataError, NotFound, nearest
from condu_ray.models import clip as models
from condu_ray.models.clip import Clip
from condu_ray.voting.answer import Answer, Vote
from condu_ray.voting.combine import by_columns, combine, probabilities, side_by_side
from condu_ray.voting.domains import Domain
from condu_ray.voting.labels import LabelSpace, Part
from condu_ray.voting.prototypes import Prototypes
from condu_ray.voting.router import Calibrated, Prior, Routed, Router, prior_of, router_of
from condu_ray.voting.voters import Asked, ExpertCache, LocalVoters, Voters


@dataclass(frozen=True, eq=False)
class TaskExpert:
    """A learned task as voting sees it. domain: None where an older release learned it."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    prototypes: Prototypes
    domain: Domain | None = None


@dataclass(frozen=True)
class _Ballot:
    """Who votes for a picture, which blocks of the label space count (indices), and which of them each voter scores.

    apart: every voter scores a block of its own, so that weights belong to blocks. evidence: of the router on what each
    voter scores, where it has any, to be added to the voter's logits. parts: which labels each voter speaks for, and
    where they are in what it scores; empty where voters score all labels that count, or a block of its own. strange: as
    `Routed` has it.
    """

    votes: tuple[Vote, ...]
    blocks: tuple[int, ...]
    scored: tuple[tuple[int, ...], ...]
    apart: bool = False
    evidence: tuple[NDArray[np.float64] | None, ...] = ()
    parts: tuple[Part, ...] = ()
    strange: float | None = None


class Classifier:
    """θ⁰ and the experts of one version.

    expert_of: a task's parameters, or None where the method leaves θ⁰ to answer for it; the last `cache` are kept, and
    all that are adapters. calibrated: where nothing was, as many experts as `vote.k` allows answer, and θ⁰. single: all
    tasks have the same expert.
    """

    def __init__(
        self,
        clip: Clip,
        experts: Sequence[TaskExpert],
        expert_of: Callable[[str], models.Expert | None],
        vote: VoteConfig,
        calibrated: Calibrated,
        version: int,
        cache: int = 8,
        single: bool = False,
    ) -> None:
        self.clip = clip
        self.experts = tuple(experts)
        self.version = version
        self._names = [expert.name for expert in self.experts]
        self.cached = ExpertCache(expert_of, cache)
        self.voters: Voters = LocalVoters(clip, self.cached)
        self._vote = vote
        self._calibrated = calibrated
        self._single = single
        self._task_spaces: dict[str, LabelSpace] = {}

    @property
    def vote(self) -> VoteConfig:
        """How the experts of this version answer."""
        return self._vote

    def asking(self, k: int | None = None, voters: Voters | None = None) -> Classifier:
        """The same version with at most `k` experts a picture, or with other voters than those of this process.

        Where one model answers there are no experts to count.
        """
        other = copy.copy(self)
        if k is not None and not self._single:
            other._vote = self._vote.model_copy(update={"k": k})
            other._router = self._router.asking(k)
        other.voters = voters or self.voters
        return other

    def by_experts(self) -> Classifier:
        """The same version, where the router chooses experts and says nothing of classes."""
        other = copy.copy(self)
        other._vote = self._vote.model_copy(update={"within": "expert"})
        other.__dict__.pop("_router", None)
        return other

    def classify(self, pixels: Tensor, task: str | None = None, labels: Sequence[str] | None = None) -> list[Answer]:
        """Answers for pictures f32[B, 3, H, W] as the base model's eval_transform makes them.

        task: that expert answers, among its own classes, and the router beside it. labels: θ⁰ and the chosen experts
        answer among these words; one model that has learned all of them, as it has learned them. Neither: among all
        classes learned. Raises NotFound for an unknown task, and where nothing is learned and neither is given;
        DataError for both at once and for labels that cannot be told apart.
        """
        space = self.label_space(task, labels)
        return [self._answer(space, *scored) for scored in self._scores(pixels, space)]

    def label_indices(self, pixels: Tensor, space: LabelSpace) -> NDArray[np.int64]:
        """Index into `space.labels` of the answer for each picture, i64[B], as `classify` would say."""
        best = [columns[np.argmax(probabilities(scores))] for _, columns, scores in self._scores(pixels, space)]
        return np.array(best, dtype=np.int64)

    def label_space(
        self,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> LabelSpace:
        """The label space that `classify` uses for these arguments; raises what it raises. templates: of `labels`."""
        if task is not None and labels is not None:
            raise DataError(f"task {task} and labels are both given", "give the task, or labels, or neither")
        if labels is not None:
            given = LabelSpace.of_candidates(labels, templates)
            return given.as_learned(self.experts) if self._single else given
        if task is not None:
            return self._task_space(task)
        if not self.experts:
            raise NotFound(
                f"version {self.version} has learned no task", "give labels (--labels a,b,c) or learn a task first"
            )
        return self._union

    def _check_task(self, task: str) -> None:
        if task not in self._names:
            raise NotFound(f"task {task} is not in version {self.version}", nearest(task, self._names))

    def _task_space(self, task: str) -> LabelSpace:
        self._check_task(task)
        if task not in self._task_spaces:
            self._task_spaces[task] = LabelSpace.of_task(self.experts[self._names.index(task)])
        return self._task_spaces[task]

    @cached_property
    def _router(self) -> Router:
        return router_of(self.experts, self._vote, self._calibrated)

    def _prior(self, space: LabelSpace) -> Prior | None:
        if space.kind == "union" or not self.experts:
            return None
        return prior_of([label.name for label in space.labels], [expert.classes for expert in self.experts])

    @cached_property
    def _union(self) -> LabelSpace:
        return LabelSpace.of_union(self.experts)

    @torch.no_grad()
    def _scores(
        self, pixels: Tensor, space: LabelSpace
    ) -> list[tuple[_Ballot, NDArray[np.int64], NDArray[np.float64]]]:
        """For each picture: who votes, the indices of the labels that count, and their scores."""
        if not len(pixels):
            return []
        base: Tensor | None = None
        if space.kind == "task":
            base, ballots = self._named(pixels, str(space.labels[0].task))
        else:
            base, domains, _ = self.clip.features(pixels)
            routed = self._router.route(base.cpu().numpy(), domains.cpu().numpy(), self._prior(space))
            ballots = self._ballots(routed, space)
        spans = [np.arange(block.start, block.stop) for block in space.blocks]
        logits = self._logits(pixels, base, ballots, space)
        scored = []
        for picture, ballot in enumerate(ballots):
            columns = np.concatenate([spans[block] for block in ballot.blocks])
            rows = [
                np.concatenate([logits[vote.task, block][picture] for block in blocks])
                for vote, blocks in zip(ballot.votes, ballot.scored, strict=True)
            ]
            if ballot.evidence:
                told = zip(rows, ballot.evidence, strict=True)
                rows = [row if more is None else row + more for row, more in told]
            shares = np.array([vote.weight for vote in ballot.votes])
            if ballot.parts:
                own = [row[part.classes] for row, part in zip(rows, ballot.parts, strict=True)]
                scores = by_columns(own, [part.labels for part in ballot.parts], shares, len(columns))
            else:
                scores = side_by_side(rows, shares) if ballot.apart else combine(np.stack(rows), shares, self._vote)
            scored.append((ballot, columns, scores))
        return scored

    def _named(self, pixels: Tensor, task: str) -> tuple[Tensor | None, list[_Ballot]]:
        """(θ⁰'s unit features, where it has to look at the pictures; ballots, when the task is known beforehand)."""
        self._check_task(task)
        alone = _Ballot((Vote(task, None, 1.0),), (0,), ((0,),))
        if self._vote.within == "expert" or not self._router.tells_classes:  # the first spares making a router
            return None, [alone] * len(pixels)
        base, domains, _ = self.clip.features(pixels)
        told = self._router.evidence(domains.cpu().numpy())[self._names.index(task)]
        return base, [replace(alone, evidence=(row,)) for row in told]

    def _ballots(self, routed: Sequence[Routed], space: LabelSpace) -> list[_Ballot]:
        every = tuple(range(len(space.blocks)))
        union = self._vote.union if space.kind == "union" else None
        place = {block.task: index for index, block in enumerate(space.blocks)}
        parts = space.by_task(self.experts) if space.kind == "candidates" else {}
        asked = {task: part.classes for task, part in parts.items() if space.whole(part)}
        apart = bool(parts) and not asked and self._by_parts(space)
        ballots = []
        for one in routed:
            votes, blocks = self._votes(one, 0.0 if union == "own" else one.base), every
            if union == "own":
                own = tuple(place[vote.task] for vote in votes)
                ballots.append(_Ballot(votes, own, tuple((block,) for block in own), True, one.evidence or ()))
                continue
            if apart:
                ballots.append(self._in_parts(one, votes, parts, space))
                continue
            if union == "routed":
                blocks = tuple(sorted(place[self._names[task]] for task in one.experts))
            told: dict[str | None, NDArray[np.float64]] = {}
            if one.evidence:
                each = zip(one.experts, one.evidence, strict=True)
                named = ((self._names[task], said) for task, said in each)
                told = {task: said[asked[task]] for task, said in named if task in asked}
            ballots.append(
                _Ballot(votes, blocks, (blocks,) * len(votes), False, tuple(told.get(vote.task) for vote in votes))
            )
        return [replace(ballot, strange=one.strange) for ballot, one in zip(ballots, routed, strict=True)]

    def _by_parts(self, space: LabelSpace) -> bool:
        """Whether experts score only what is theirs of words that are all learned, as where no word is given."""
        return space.kind == "candidates" and self._vote.union == "own" and not self._single

    def _in_parts(
        self, routed: Routed, votes: tuple[Vote, ...], parts: Mapping[str, Part], space: LabelSpace
    ) -> _Ballot:
        """Each chosen expert scores those labels that are its task's, θ⁰ all of them; θ⁰ alone where none that has a
        say has any."""
        said: dict[str | None, NDArray[np.float64]] = {}
        if routed.evidence:
            said = {self._names[task]: row for task, row in zip(routed.experts, routed.evidence, strict=True)}
        every = np.arange(len(space.labels))
        votes = tuple(vote for vote in votes if vote.task is None or vote.task in parts)
        if not any(vote.weight for vote in votes):
            votes = (Vote(None, None, 1.0),)
        whole = sum(vote.weight for vote in votes)
        return _Ballot(
            tuple(replace(vote, weight=vote.weight / whole) for vote in votes),
            (0,),
            tuple((self._names.index(vote.task) + 1 if vote.task else 0,) for vote in votes),
            evidence=tuple(said.get(vote.task) for vote in votes),
            parts=tuple(parts[vote.task] if vote.task else Part(every, every) for vote in votes),
        )

    def _votes(self, routed: Routed, base: float) -> tuple[Vote, ...]:
        """The votes with a weight above 0, θ⁰'s last; θ⁰ alone where no task is learned. base: its weight."""
        if not routed.experts:
            return (Vote(None, None, 1.0),)
        shares = zip(routed.experts, routed.nearness, (1 - base) * routed.shares, strict=True)
        votes = [Vote(self._names[task], float(near), float(share)) for task, near, share in shares if base < 1]
        return (*votes, Vote(None, None, base)) if base else tuple(votes)

    def _logits(
        self, pixels: Tensor, base: Tensor | None, ballots: Sequence[_Ballot], space: LabelSpace
    ) -> dict[tuple[str | None, int], dict[int, NDArray[np.float32]]]:
        """(voter, block) -> picture -> logits f32[labels of the block]; each voter sees its own pictures, once."""
        places = (*space.blocks, *self._union.blocks) if self._by_parts(space) else space.blocks
        asked, scored = [], []
        for voter in dict.fromkeys(vote.task for ballot in ballots for vote in ballot.votes):
            pictures = [i for i, ballot in enumerate(ballots) if any(vote.task == voter for vote in ballot.votes)]
            blocks = list(dict.fromkeys(block for i in pictures for block in _scored_by(voter, ballots[i])))
            asked.append(Asked(voter, tuple(pictures), tuple(places[block] for block in blocks)))
            scored.append(blocks)
        logits: dict[tuple[str | None, int], dict[int, NDArray[np.float32]]] = {}
        for one, blocks, tables in zip(asked, scored, self.voters.logits(pixels, base, asked), strict=True):
            for block, values in zip(blocks, tables, strict=True):
                logits[one.voter, block] = dict(zip(one.pictures, values, strict=True))
        return logits

    def _answer(
        self, space: LabelSpace, ballot: _Ballot, columns: NDArray[np.int64], scores: NDArray[np.float64]
    ) -> Answer:
        shares = np.zeros(len(space.labels))
        shares[columns] = probabilities(scores)
        ranked = tuple((space.labels[i], float(shares[i])) for i in np.argsort(-shares, kind="stable"))
        label, probability = ranked[0]
        return Answer(label, probability, ranked, ballot.votes, space.kind, self.version, ballot.strange)


def _scored_by(voter: str | None, ballot: _Ballot) -> tuple[int, ...]:
    return next(blocks for vote, blocks in zip(ballot.votes, ballot.scored, strict=True) if vote.task == voter)
