"""What a session does not measure: every version's accuracy where the task is not named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from condu_ray.benchmark.work import read, write
from condu_ray.data import Split, TaskData
from condu_ray.engine import figures as measure
from condu_ray.engine.crew import Crew
from condu_ray.engine.evaluate import snapshot_of
from condu_ray.engine.progress import Stage, Update
from condu_ray.store import Manifest, Store

Tests = Mapping[str, tuple[TaskData, Split]]
"""Task -> what it is, and the test pictures that its sessions use; tasks in the order of the stream."""


def evaluate_versions(
    store: Store, versions: Sequence[Manifest], tests: Tests, crew: Crew, folder: Path, stage: Stage
) -> None:
    """Writes what `read_evaluation` reads of each version, unless it is there."""
    for manifest in versions:
        path = _path(folder, manifest)
        if read(path) is None:
            with stage(f"candidates and union, version {manifest.version}") as update:
                write(path, _evaluation(store, manifest, tests, crew, update))


def read_evaluation(manifest: Manifest, folder: Path) -> dict[str, dict[str, float]] | None:
    """Accuracy in percent by label space (`candidates`: all tasks, `union`: those learned) and task; None: not yet."""
    found: dict[str, dict[str, float]] | None = read(_path(folder, manifest))
    return found


def _path(folder: Path, manifest: Manifest) -> Path:
    return folder / f"{manifest.version:08d}.json"


def _evaluation(
    store: Store, manifest: Manifest, tests: Tests, crew: Crew, update: Update
) -> dict[str, dict[str, float]]:
    learned = {card.name for card in manifest.tasks}
    # The session asked the same of tasks to come that its command named.
    known = {name: value for name, value in manifest.figures["accuracy"].items() if name not in learned}
    asked = [("candidates", name) for name in tests if name not in known]
    asked += [("union", name) for name in tests if name in learned]
    questions = [measure.ask("vote" if space == "candidates" else "union", *tests[name]) for space, name in asked]
    crew.hold(manifest)
    scores = crew.score(questions, snapshot_of(store, manifest), update)
    found: dict[str, dict[str, float]] = {"candidates": known, "union": {}}
    for (space, name), score in zip(asked, scores, strict=True):
        found[space][name] = score
    return found
