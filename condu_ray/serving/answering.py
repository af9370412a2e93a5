"""From the bytes of pictures to answers: decoding, and batches in which requests of several clients go together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from condu_ray.data.picture import Unreadable, decode
from condu_ray.errors import DataError
from condu_ray.serving.messages import Question
from condu_ray.voting.answer import Answer
from condu_ray.voting.classifier import Classifier


@dataclass(frozen=True, eq=False)
class Asked:
    """One picture of a request on its way through a batch. pixels: f32[3, H, W]. until: on the monotonic clock."""

    classifier: Classifier
    question: Question
    pixels: Tensor
    until: float
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Timed:
    """An answer, the seconds that it waited for its batch, and those that the batch took."""

    answer: Answer
    waited: float
    took: float


class TooLate(Exception):
    """Nobody waits for this answer any more."""


def pixels_of(body: bytes, transform: Callable[[Any], Tensor], most: int) -> Tensor:
    """The picture as the base model sees it, f32[3, H, W]. Raises DataError for bytes that are no picture of at most
    `most` pixels."""
    try:
        return transform(decode(body, most))
    except Unreadable as error:
        raise DataError(f"cannot be read ({error})", "send a JPEG, PNG or WebP picture") from error


def answer_batch(batch: Sequence[Asked]) -> list[Timed | Exception]:
    """One answer a picture, in their order; those that ask the same of the same version go through it together."""
    found: list[Timed | Exception] = [TooLate()] * len(batch)
    groups: dict[Any, list[int]] = {}
    for place, asked in enumerate(batch):
        one = asked.question
        groups.setdefault((id(asked.classifier), one.task, one.labels, one.k), []).append(place)
    for places in groups.values():
        begun = time.monotonic()
        live = [place for place in places if batch[place].until > begun]
        if not live:
            continue
        first = batch[live[0]]
        classifier = first.classifier if first.question.k is None else first.classifier.asking(k=first.question.k)
        try:
            pixels = torch.stack([batch[place].pixels for place in live])
            answers = classifier.classify(pixels, first.question.task, first.question.labels)
        except Exception as error:  # others in the batch asked something else: they are answered
            for place in live:
                found[place] = error
            continue
        took = time.monotonic() - begun
        for place, answer in zip(live, answers, strict=True):
            found[place] = Timed(answer, begun - batch[place].since, took)
    return found


def warm(classifier: Classifier) -> None:
    """Embeds every learned class by its own expert, and lets θ⁰ route once, so that the first request does not wait."""
    pixels = classifier.clip.eval_transform(Image.new("RGB", (64, 64)))[None]
    for expert in classifier.experts:
        classifier.classify(pixels, task=expert.name)
    if classifier.experts:
        classifier.classify(pixels)
