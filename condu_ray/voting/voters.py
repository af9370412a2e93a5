"""Who scores labels: θ⁰ and the experts, each once a batch; experts that are adapters all in one pass.

Legend: B pictures, C labels of a block, D width of the common space.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ray.models import clip as models
from condu_ray.models.clip import Clip, Headed
from condu_ray.models.lora import LowRank
from condu_ray.voting.labels import Block
from condu_ray.voting.tables import Tables, Voter, rows_of

ROWS = 16
"""Experts that are adapters share a pass until it has so many rows; one with as many pictures of its own fills a pass.

Larger passes gain nothing on a core: what they hold no longer fits its cache.
"""


@dataclass(frozen=True)
class Asked:
    """What one voter is asked: which pictures of the batch it sees, and the blocks of labels that it scores."""

    voter: Voter
    pictures: tuple[int, ...]
    blocks: tuple[Block, ...]


class Voters(Protocol):
    def logits(self, pixels: Tensor, base: Tensor | None, asked: Sequence[Asked]) -> list[list[NDArray[np.float32]]]:
        """For each of `asked` and each of its blocks the logits f32[pictures, C], at the model's own scale.

        pixels: f32[B, 3, H, W], the whole batch. base: θ⁰'s unit features f32[B, D], where it has seen the batch.
        """


class ExpertCache:
    """The experts used last. Those that are adapters all stay; of those that are as large as models, `limit`."""

    def __init__(self, expert_of: Callable[[str], models.Expert | None], limit: int) -> None:
        self._expert_of, self._limit = expert_of, limit
        self._kept: OrderedDict[str, models.Expert | None] = OrderedDict()
        self.hits = self.misses = 0

    def __call__(self, task: str) -> models.Expert | None:
        kept = self._kept
        if task in kept:
            self.hits += 1
            kept.move_to_end(task)
            return kept[task]
        self.misses += 1
        large = [name for name, each in kept.items() if not _small(each)]
        for name in large[: max(0, len(large) + 1 - self._limit)]:  # room first: two large experts are not held for one
            del kept[name]
        kept[task] = self._expert_of(task)
        return kept[task]

    def empty(self) -> None:
        """Lets all go, to be made again when they are asked for. Another thread that asks now keeps what it has."""
        self._kept = OrderedDict()

    def small(self, task: str) -> bool:
        """Whether the expert is adapters beside θ⁰, or θ⁰ itself, with or without a head."""
        return _small(self(task))


def _small(expert: models.Expert | None) -> bool:
    return expert is None or isinstance(expert, LowRank) or (isinstance(expert, Headed) and _small(expert.tower))


def _passes(together: Sequence[tuple[int, LowRank]], sizes: Sequence[int]) -> list[list[tuple[int, LowRank]]]:
    """Experts (with their place in `sizes`, numbers of pictures) dealt out to passes."""
    passes: list[list[tuple[int, LowRank]]] = []
    room = 0
    for place, expert in sorted(together, key=lambda one: -sizes[one[0]]):
        if room <= 0:
            passes.append([])
            room = ROWS
        passes[-1].append((place, expert))
        room -= sizes[place]
    return passes


class LocalVoters:
    """All voters in this process, which share θ⁰."""

    def __init__(self, clip: Clip, experts: ExpertCache) -> None:
        self.clip, self.experts = clip, experts
        self._tables = Tables(clip)

    @torch.no_grad()
    def logits(self, pixels: Tensor, base: Tensor | None, asked: Sequence[Asked]) -> list[list[NDArray[np.float32]]]:
        found: dict[int, list[NDArray[np.float32]]] = {}
        together: list[tuple[int, LowRank]] = []
        for place, one in enumerate(asked):
            expert = None if one.voter is None else self.experts(one.voter)
            if isinstance(expert, LowRank):
                together.append((place, expert))
                continue
            pictures = list(one.pictures)
            if base is not None and (expert is None or (isinstance(expert, Headed) and expert.tower is None)):
                features = base[pictures] if expert is None else expert.head(base[pictures])
            else:
                features = self.clip.images(pixels[pictures], expert)
            found[place] = self._by_block(one, expert, features)
        for part in _passes(together, [len(one.pictures) for one in asked]):
            segments = [(expert, len(asked[place].pictures)) for place, expert in part]
            rows = [picture for place, _ in part for picture in asked[place].pictures]
            parts = torch.split(self.clip.images_in_rows(pixels[rows], segments), [size for _, size in segments])
            for (place, expert), own in zip(part, parts, strict=True):
                found[place] = self._by_block(asked[place], expert, own)
        return [found[place] for place in range(len(asked))]

    def _by_block(self, one: Asked, expert: models.Expert | None, features: Tensor) -> list[NDArray[np.float32]]:
        name = None if expert is None else one.voter
        told = expert.head.discriminants if isinstance(expert, Headed) else {}
        kept = [{task: pair[each] for task, pair in told.items()} for each in (0, 1)]
        found = []
        for block in one.blocks:
            logits = self.clip.logit_scale * features @ self._tables.of(name, expert, block).T
            weights, bias = (rows_of(each, block) for each in kept)
            if weights is not None and bias is not None:
                logits = logits + features @ weights.T + bias
            found.append(logits.cpu().numpy())
        return found
