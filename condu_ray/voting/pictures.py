"""Answers for picture files, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from condu_ray.data import Picture, load_picture, open_pictures
from condu_ray.voting.answer import Answer
from condu_ray.voting.classifier import Classifier

BATCH = 64


def classify_pictures(
    classifier: Classifier,
    pictures: Sequence[Picture],
    batch: int = BATCH,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """One answer a picture, in their order; `task` and `labels` as in `Classifier.classify`, which says what raises.

    progress: called with (done, total) after each batch. Raises DataError for a picture that cannot be read.
    """
    classifier.label_space(task, labels)
    answers: list[Answer] = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        pixels = torch.stack([classifier.clip.eval_transform(load_picture(picture)) for picture in part])
        answers += classifier.classify(pixels, task, labels)
        if progress is not None:
            progress(len(answers), len(pictures))
    return answers


def classify_paths(
    classifier: Classifier,
    paths: Sequence[str | Path],
    task: str | None = None,
    labels: Sequence[str] | None = None,
    top: int = 5,
) -> list[dict[str, Any]]:
    """The published JSON object for each picture of these files and folders; `task` and `labels` as in `classify`.

    Every path is checked before the first answer; raises DataError that names the first that is no picture.
    """
    classifier.label_space(task, labels)
    pictures = open_pictures(paths)
    answers = classify_pictures(classifier, pictures, task=task, labels=labels)
    return [answer.to_json(picture.path, top) for picture, answer in zip(pictures, answers, strict=True)]
