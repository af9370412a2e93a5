"""Class embeddings by the text tower of each expert, kept for the next picture.

An embedding is fixed for a version, so those of learned classes are kept for good (4 bytes times experts, classes and
width); those of callers' labels make room for newer ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from condu_ray.models import clip as models
from condu_ray.models.clip import Clip, Headed, class_embeddings
from condu_ray.voting.labels import Block

CANDIDATE_BYTES = 128 * 2**20
Voter = str | None
"""Who scores labels: a task's expert, by the task's name, or None for θ⁰."""


def rows_of(kept: Mapping[str, Tensor], block: Block) -> Tensor | None:
    """What is kept of the block's classes (task -> a row each), in the order of its labels; None if one has no row."""
    if block.task is not None:
        return kept.get(block.task)
    if not block.learned or any(task not in kept for task, _ in block.learned):
        return None
    return torch.stack([kept[task][place] for task, place in block.learned])


class Tables:
    """The class embeddings f32[C, D] of a block of labels, by the text tower of an expert or of θ⁰."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._learned: dict[tuple[Voter, str], Tensor] = {}
        self._candidates: OrderedDict[tuple[Voter, tuple[tuple[str, ...], ...]], Tensor] = OrderedDict()

    def of(self, voter: Voter, parameters: models.Expert | None, block: Block) -> Tensor:
        """Unit vectors f32[C, D] in the order of the block's labels; a head's own where it has some for these classes.

        parameters: those of the voter, None for θ⁰.
        """
        if isinstance(parameters, Headed):
            own = rows_of(parameters.head.texts, block)
            if own is not None:
                return own
            voter, parameters = voter if parameters.tower else None, parameters.tower
        if block.task is None:
            return self._of_candidates(voter, parameters, block)
        key = (voter, block.task)
        if key not in self._learned:
            self._learned[key] = class_embeddings(self._clip, block.prompts, parameters)
        return self._learned[key]

    def _of_candidates(self, voter: Voter, parameters: models.Expert | None, block: Block) -> Tensor:
        key = (voter, block.prompts)
        table = self._candidates.pop(key, None)
        if table is None:
            table = class_embeddings(self._clip, block.prompts, parameters)
        self._candidates[key] = table
        size = sum(kept.nbytes for kept in self._candidates.values())
        while size > CANDIDATE_BYTES and len(self._candidates) > 1:
            size -= self._candidates.popitem(last=False)[1].nbytes
        return table
