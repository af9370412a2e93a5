"""Answers for picture files, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from condu_ray.data import Skipped, open_pictures
from condu_ray.data.loading import BATCH, in_batches, unlabelled
from condu_ray.voting.answer import Answer
from condu_ray.voting.classifier import Classifier


def classify_paths(
    classifier: Classifier,
    paths: Sequence[str | Path],
    task: str | None = None,
    labels: Sequence[str] | None = None,
    top: int = 5,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    on_skipped: Callable[[Skipped], None] | None = None,
) -> list[dict[str, Any]]:
    """The published JSON object for each picture of these files and folders; `task` and `labels` as in `classify`.

    Every path is checked before the first answer; raises DataError that names the first that is no picture. progress:
    called with (done, total, "") after each batch. on_skipped: as in `open_pictures`.
    """
    classifier.label_space(task, labels)
    pictures, answers = open_pictures(paths, on_skipped), list[Answer]()
    for pixels, _ in in_batches(unlabelled(pictures, classifier.clip.eval_transform), BATCH, torch.get_num_threads()):
        answers += classifier.classify(pixels, task, labels)
        progress(len(answers), len(pictures), "")
    return [answer.to_json(picture.path, top) for picture, answer in zip(pictures, answers, strict=True)]
