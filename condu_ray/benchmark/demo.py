"""The demo: five small domains, learned one after another; what sequential fine-tuning forgets and condu-sign keeps."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from condu_ray.benchmark.worlds import WORLDS, write_worlds
from condu_ray.config import SessionConfig
from condu_ray.engine import command
from condu_ray.engine.cluster import connected
from condu_ray.engine.progress import Stage
from condu_ray.sources import resolve
from condu_ray.store import Manifest, open_store
from condu_ray.store.header import fixed_settings, open_existing
from condu_ray.tracking.history import accuracy_matrix, draw
from condu_ray.tracking.matrix import AccuracyMatrix
from condu_ray.tracking.pictures import draw_comparison, draw_votes

OURS = "condu-sign"  # as `learn` does by itself
METHODS = (OURS, "sequential")
# For few steps: the image tower alone, without smoothing and at a lower rate, is trained and kept better than both
# towers at the usual settings. Chosen on these worlds' own pictures, so the demo's figures are somewhat optimistic.
SETTINGS = {
    "train.steps": 40,
    "train.batch_size": 32,
    "train.lr": 3e-4,
    "train.label_smoothing": 0.0,
    "train.towers": "image",
}
VOTED_ON = ("shapes", "star")


def run(out: Path, stage: Stage) -> dict[str, Any]:
    """Makes the pictures, learns them with both methods, draws; given again, it does only what is missing.

    Writes OUT/data, OUT/condu-sign and OUT/sequential (stores), OUT/pictures. Settings of the environment
    (`CONDU_MODEL`, `CONDU_TRAIN__STEPS` ...) stand above the demo's own. Returns what `condu-ray demo --json` prints,
    accuracy in percent: {"tasks": names, "methods": {name: {"transfer", "average", "last", "matrix"}}, "alone": mean
    accuracy of fine-tuning each task by itself, "pictures": paths, "next": commands, "warnings": sentences, "seconds":
    {step: seconds}}. Raises ConduError as `learn` does.
    """
    seconds: dict[str, float] = {}
    configs = {method: _config(out, method) for method in METHODS}
    with _timed(seconds, "worlds"), stage("making pictures"):
        write_worlds(out / "data")
    warnings: list[str] = []
    with ExitStack() as held:
        cluster = None
        for method, config in configs.items():
            with _timed(seconds, method):
                if cluster is None and _unfinished(config):
                    cluster = held.enter_context(connected())
                done = command.run(config, _named(stage, method), "condu-ray demo", cluster)
            warnings += done.warnings
    histories = {method: _history(config) for method, config in configs.items()}
    cards = histories[OURS][-1].tasks
    matrices = {"zero-shot": _zero_shot(histories[OURS][-1])} | {
        method: matrix for method in reversed(METHODS) if (matrix := accuracy_matrix(histories[method])) is not None
    }
    with _timed(seconds, "pictures"), stage("drawing"):
        pictures = _draw(out, histories, matrices)
    own = [value for card in cards if (value := card.figures.get("own")) is not None]
    return {
        "tasks": [card.name for card in cards],
        "methods": {
            name: {
                "transfer": matrix.transfer(),
                "average": matrix.average(),
                "last": matrix.last(),
                "matrix": matrix.to_json()["values"],
            }
            for name, matrix in matrices.items()
        },
        "alone": math.fsum(own) / len(own) if len(own) == len(cards) else None,
        "pictures": [str(path) for path in pictures],
        "next": _next(out),
        "warnings": warnings,
        "seconds": {step: round(value, 1) for step, value in seconds.items()},
    }


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[step] = time.monotonic() - begun


def _config(out: Path, method: str) -> SessionConfig:
    _, origin = resolve({})
    own = {name: value for name, value in SETTINGS.items() if origin[name] != "environment"}
    store = str(out / method)
    tasks = {world.name: str(out / "data" / world.name) for world in WORLDS}
    return resolve({**own, "store": store, "tasks": tasks, "method": method}, fixed=fixed_settings(store))[0]


def _named(stage: Stage, method: str) -> Stage:
    return lambda name: stage(f"{method}: {name}")


def _unfinished(config: SessionConfig) -> bool:
    store = open_existing(config.store)
    learned = {card.name for card in store.manifest().tasks} if store and store.versions() else set()
    return not learned.issuperset(config.tasks)


def _history(config: SessionConfig) -> list[Manifest]:
    """The demo's own versions, oldest first, without what was learned on top of them since."""
    store = open_store(config.store)
    last = max(card.learned_in for card in store.manifest().tasks if card.name in config.tasks)
    return [store.manifest(version) for version in store.versions() if version <= last]


def _zero_shot(manifest: Manifest) -> AccuracyMatrix:
    """θ⁰ never changes, so every row is the same."""
    row = [card.figures.get("zero_shot") for card in manifest.tasks]
    return AccuracyMatrix([card.name for card in manifest.tasks], [row] * len(row))


def _draw(out: Path, histories: dict[str, list[Manifest]], matrices: dict[str, AccuracyMatrix]) -> list[Path]:
    from condu_ray.voting.open import load_classifier
    from condu_ray.voting.pictures import classify_paths

    folder = out / "pictures"
    compared, votes = folder / "comparison.png", folder / "votes.png"
    drawn = [path for method in METHODS for path in draw(histories[method], folder / method)]
    draw_comparison(matrices, compared)
    picture = _voted_on(out)
    (answer,) = classify_paths(load_classifier(str(out / OURS), histories[OURS][-1].version), [picture])
    draw_votes(answer, picture, votes)
    return [compared, *drawn, votes]


def _voted_on(out: Path) -> Path:
    task, label = VOTED_ON
    return out / "data" / task / "test" / label / "0.png"


def _next(out: Path) -> list[str]:
    store = str(out / OURS)
    commands: Sequence[Sequence[str]] = (
        ("condu-ray", "predict", str(_voted_on(out)), "--store", store),
        ("condu-ray", "tasks", "--store", store),
        ("condu-ray", "learn", "mine", "--data", "FOLDER", "--store", store),
    )
    return [shlex.join(words) for words in commands]
