"""What a session measures: accuracies before and after, zero-shot kept, fidelity; and the test pictures for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.config import SessionConfig
from condu_ray.data import Picture, Split, TaskData, sample
from condu_ray.data.picture import Unreadable, read_bytes
from condu_ray.engine.crew import Crew
from condu_ray.engine.fusing import Fused
from condu_ray.engine.progress import Update
from condu_ray.engine.scoring import By, Question, Snapshot
from condu_ray.store import Manifest, ObjectRef, Store, TaskCard

_DIGEST_BYTES = 16
_READERS = 8


@dataclass(frozen=True)
class Baseline:
    """Accuracy in percent on a task's test pictures by θ⁰ and by the delta as trained; neither depends on a version."""

    zero_shot: float
    own: float | None


def test_pictures(task: TaskData, config: SessionConfig) -> Split:
    """The test pictures that every evaluation of this task uses (stratified, seeded)."""
    return sample(task.test, config.eval_pictures, config.seed)


def pack_pictures(split: Split) -> dict[str, NDArray[Any]]:
    """Where the pictures are and what they show, so that later versions are measured on the same ones."""
    paths = json.dumps([str(Path(picture.path).absolute()) for picture in split.pictures])
    spans = np.array([(picture.offset, picture.size) for picture in split.pictures], np.int64).reshape(-1, 2)
    return {
        "paths": np.frombuffer(paths.encode(), np.uint8),
        "spans": spans,
        "labels": split.labels,
        "digests": _digests(split.pictures),
    }


def unpack_pictures(arrays: Mapping[str, NDArray[Any]]) -> Split | None:
    """The pictures again; None where some are no longer there, or are others now: figures would be of other things."""
    paths = json.loads(arrays["paths"].tobytes())
    if not all(Path(path).is_file() for path in set(paths)):
        return None
    pictures = tuple(Picture(path, int(at), int(size)) for path, (at, size) in zip(paths, arrays["spans"], strict=True))
    known = arrays.get("digests")  # stores of format 1 have none
    if known is not None and not np.array_equal(_digests(pictures), known):
        return None
    return Split(pictures, np.array(arrays["labels"]))


def _digests(pictures: Sequence[Picture]) -> NDArray[np.uint8]:
    """u8[n, 16]: blake2b of each picture's bytes, zeros for one that cannot be read."""

    def digest(picture: Picture) -> bytes:
        try:
            return hashlib.blake2b(read_bytes(picture), digest_size=_DIGEST_BYTES).digest()
        except (OSError, Unreadable):
            return bytes(_DIGEST_BYTES)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="condu-digest") as pool:
        found = b"".join(pool.map(digest, pictures))
    return np.frombuffer(found, np.uint8).reshape(-1, _DIGEST_BYTES)


def ask(
    by: By, task: TaskData | TaskCard, pictures: Split, own: ObjectRef | None = None, buffers: ObjectRef | None = None
) -> Question:
    """A question about pictures of a task; see `Question` for `by` and `own`. buffers: those that go with `own`."""
    return Question(by, task.name, tuple(task.classes), tuple(task.templates), pictures, own, buffers)


def learned_pictures(store: Store, manifest: Manifest | None) -> dict[str, Split]:
    """Test pictures of every task of a version whose pictures are still there."""
    found = {}
    for card in manifest.tasks if manifest else []:
        split = unpack_pictures(store.get(manifest.objects[f"tests-{card.uid}"]))  # type: ignore[union-attr]
        if split is not None:
            found[card.name] = split
    return found


def unmeasured(manifest: Manifest) -> list[str]:
    """Tasks that a version could not be measured on."""
    return [card.name for card in manifest.tasks if card.name not in manifest.figures["accuracy"]]


def baseline(
    crew: Crew, task: TaskData, pictures: Split, own: ObjectRef | None, buffers: ObjectRef | None, update: Update
) -> Baseline:
    """Measures a task's baseline. own: its delta as trained, None where nothing is trained; buffers: as in `ask`."""
    questions = [ask("base", task, pictures)]
    if own is not None:
        questions.append(ask("own", task, pictures, own, buffers))
    scores = crew.score(questions, None, update)
    return Baseline(scores[0], scores[1] if own is not None else None)


def accuracies(
    crew: Crew,
    snapshot: Snapshot,
    learned: Mapping[str, tuple[TaskCard, Split]],
    unseen: Mapping[str, tuple[TaskData, Split]],
    update: Update,
) -> dict[str, float]:
    """A row of the accuracy matrix, percent by task: learned tasks by their expert, tasks still to come by the vote."""
    questions = [ask("expert", card, pictures) for card, pictures in learned.values()]
    questions += [ask("vote", task, pictures) for task, pictures in unseen.values()]
    scores = crew.score(questions, snapshot, update)
    return dict(zip([*learned, *unseen], scores, strict=True))


def card_figures(
    card: TaskCard, accuracy: Mapping[str, float], fused: Fused, before: Mapping[str, float | None]
) -> dict[str, float | None]:
    """A task's figures in a new version; `before` holds those that never change."""
    figures: dict[str, float | None] = {**before, "expert": accuracy.get(card.name)}
    figures |= fused.fidelity.get(card.name, {})
    figures["gain_kept"] = gain_kept(figures.get("zero_shot"), figures.get("own"), figures["expert"])
    return figures


def gain_kept(zero_shot: float | None, own: float | None, expert: float | None) -> float | None:
    """Share (percent) of fine-tuning's gain over zero-shot that the expert still has; None without a gain."""
    if zero_shot is None or own is None or expert is None or own <= zero_shot:
        return None
    return 100 * (expert - zero_shot) / (own - zero_shot)


def fixed_figures(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a task that are measured once, when it is learned, and stand in every later version."""
    return {name: figures.get(name) for name in ("zero_shot", "own", "before")}
