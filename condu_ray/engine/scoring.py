"""What a process with θ⁰ does: features of pictures, counts of right answers, trained rescalers. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ray.catalogue import info
from condu_ray.config import SessionConfig
from condu_ray.data import Split, TaskData
from condu_ray.data.loading import BATCH, PictureSet, in_batches
from condu_ray.data.templates import prompts
from condu_ray.methods import registry
from condu_ray.methods.experts import Buffers, Experts, expert_of
from condu_ray.methods.protocol import TaskState
from condu_ray.methods.rescaling import train_rescalers
from condu_ray.methods.states import FusedState
from condu_ray.methods.step import Step
from condu_ray.methods.stored import layout_of
from condu_ray.methods.training import memory_in
from condu_ray.models.clip import Clip, class_means
from condu_ray.store import ObjectRef, open_store
from condu_ray.voting.classifier import Classifier, TaskExpert
from condu_ray.voting.labels import LabelSpace
from condu_ray.voting.open import base_of
from condu_ray.voting.prototypes import FeatureSums, make_prototypes
from condu_ray.voting.router import Calibrated, router_of
from condu_ray.voting.voters import Asked

# A question that names the task is answered without routing.
_UNROUTED = make_prototypes(FeatureSums.zero(1, 1), np.ones((1, 1), np.float32), np.empty((0, 1), np.float32))


By = Literal["base", "own", "expert", "named", "vote", "union"]


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """torch computes with `count` threads while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Seen(NamedTuple):
    """`models.clip.Features` of many pictures as arrays: f32[N, D], f32[N, W], f32[N]."""

    unit: NDArray[np.float32]
    domains: NDArray[np.float32]
    lengths: NDArray[np.float32]

    @staticmethod
    def joined(parts: Iterable[Seen]) -> Seen:
        return Seen(*(np.concatenate(each) for each in zip(*parts, strict=True)))


class Sent(NamedTuple):
    """Where the router sends pictures. order i64[N, T]: the version's tasks by number, the likeliest first. score
    f64[N]: how surely a picture is of one of them, without a unit. nearest i64[N]: the class that is nearest, its place
    among those of all tasks, one task after another."""

    order: NDArray[np.int64]
    score: NDArray[np.float64]
    nearest: NDArray[np.int64]

    @staticmethod
    def joined(parts: Iterable[Sent]) -> Sent:
        return Sent(*(np.concatenate(each) for each in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Snapshot:
    """What answers besides the state itself: a version, or one that is about to be committed."""

    key: str
    experts: tuple[TaskExpert, ...] = ()
    buffers: Mapping[str, Buffers] = field(default_factory=dict)
    calibrated: Calibrated = field(default_factory=Calibrated)


@dataclass(frozen=True)
class Question:
    """How many of these pictures are answered rightly, among the classes of their own task?

    by: `base` (θ⁰), `own` (the delta as trained), `expert` (what is left of it in the state, and nothing beside it),
    `named` (what the version answers when it is told the task), `vote` (θ⁰ and the nearest experts, told the task's
    classes), `union` (the same, and all learned classes compete; the right answer names task and class). own: where the
    delta is, and the buffers that training changed.
    """

    by: By
    task: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    pictures: Split
    own: ObjectRef | None = None
    own_buffers: ObjectRef | None = None


class Scorer:
    """Holds θ⁰ on one device; answers about any snapshot that is handed to it. decoders: threads that read pictures."""

    def __init__(self, url: str, config: SessionConfig, device: str = "cpu", decoders: int = 1) -> None:
        self._store = open_store(url)
        header = self._store.header
        self._device, self._decoders = device, decoders
        self._layout, self._config = layout_of(header), config
        self._method = registry.get(header.method)
        self._vote = registry.vote_of(header.method, config.vote)
        self._newest: tuple[str, Classifier] | None = None

    @cached_property
    def _clip(self) -> Clip:
        """Loaded by the first question: what is wrong with the model is then its answer, not an actor that died."""
        return base_of(self._store.header, self._device)

    def features(self, pictures: Split) -> Seen:
        """What θ⁰ sees, with the evaluation transform."""
        with torch.no_grad():
            parts = [self._clip.features(pixels) for pixels, _ in self._batches(pictures)]
        return Seen(*(torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True)))

    def text_means(self, classes: Sequence[str], templates: Sequence[str]) -> NDArray[np.float32]:
        """Mean of the unit vectors of each class's prompts by θ⁰, f32[C, D]."""
        return class_means(self._clip, [prompts(name, templates) for name in classes]).cpu().numpy()

    def routed(self, pictures: Split, snapshot: Snapshot) -> Sent:
        """Where the router sends pictures; it needs no state, since θ⁰ alone routes."""
        router = router_of(snapshot.experts, self._vote, snapshot.calibrated)
        seen = self.features(pictures)
        near, sure = router.ranked(seen.unit, seen.domains)
        order = np.argsort(-near, axis=1, kind="stable").astype(np.int64)
        return Sent(order, sure, router.nearest(seen.unit, seen.domains))

    def right(self, asked: Question, snapshot: Snapshot | None, state: TaskState | None) -> int:
        """Number of right answers."""
        classifier = self._alone(asked) if asked.by in ("base", "own") else self._together(snapshot, state)
        if asked.by == "expert":
            classifier = classifier.by_experts()
        if asked.by == "vote":
            space = classifier.label_space(labels=asked.classes, templates=asked.templates)
        else:
            space = classifier.label_space(None if asked.by == "union" else asked.task)
        first = next(i for i, label in enumerate(space.labels) if label.task in (None, asked.task))
        right = 0
        for pixels, labels in self._batches(asked.pictures):
            right += int((classifier.label_indices(pixels, space) == first + labels.numpy()).sum())
        return right

    def logits(
        self, pictures: Split, voter: str | None, space: LabelSpace, snapshot: Snapshot, state: TaskState
    ) -> NDArray[np.float32]:
        """What one voter (a task's expert, None: θ⁰) says of every label, f32[N, C], at the model's own scale."""
        voters = self._together(snapshot, state).voters
        found = []
        for pixels, _ in self._batches(pictures):
            (blocks,) = voters.logits(pixels, None, [Asked(voter, tuple(range(len(pixels))), space.blocks)])
            found.append(np.concatenate(blocks, axis=1))
        return np.concatenate(found)

    def rescalers(
        self,
        task: TaskData,
        state: TaskState,
        buffers: ObjectRef | None,
        threads: int,
        on_step: Callable[[Step], None],
    ) -> NDArray[np.float32]:
        """The task's rescalers in `state`, trained further on its training pictures by so many threads, f32[G]."""
        assert isinstance(state, FusedState), "only fused tasks have rescalers"
        self._newest = None  # experts as large as models, of a version that is about to be replaced
        with threads_of(threads):
            own = self._store.get(buffers) if buffers else {}
            return train_rescalers(self._clip, self._method, state, task, self._config, own, on_step)

    def _together(self, snapshot: Snapshot | None, state: TaskState | None) -> Classifier:
        if snapshot is None or state is None:
            raise ValueError("experts are asked for without a state")
        if self._newest is None or self._newest[0] != snapshot.key:
            # One snapshot at a time: its experts are as large as models.
            experts = Experts(self._clip, self._method, self._layout, self._config, state, snapshot.buffers)
            self._newest = (
                snapshot.key,
                Classifier(
                    self._clip,
                    snapshot.experts,
                    experts,
                    self._vote,
                    snapshot.calibrated,
                    version=0,
                    cache=self._vote.k,  # what a picture asks: each may be as large as a model
                    single=info(self._store.header.method).single,
                ),
            )
        return self._newest[1]

    def _alone(self, asked: Question) -> Classifier:
        overrides = None
        if asked.own is not None:
            trained = self._store.get(asked.own)
            buffers = self._store.get(asked.own_buffers) if asked.own_buffers else {}
            overrides = expert_of(
                self._clip, self._method, self._layout, self._config, trained["delta"], buffers, memory_in(trained)
            )
        card = TaskExpert(asked.task, asked.classes, asked.templates, _UNROUTED)
        return Classifier(self._clip, [card], lambda task: overrides, self._vote, Calibrated(), version=0)

    def _batches(self, pictures: Split) -> Iterator[tuple[Tensor, Tensor]]:
        return in_batches(PictureSet(pictures, self._clip.eval_transform), BATCH, self._decoders)
