"""What a session does not measure: what every version answers, beside the accuracy of its experts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from condu_ray.benchmark.systems import System
from condu_ray.data import Split, TaskData
from condu_ray.engine import figures as measure
from condu_ray.engine.crew import Crew
from condu_ray.engine.evaluate import snapshot_of
from condu_ray.engine.progress import Stage, Update
from condu_ray.engine.scoring import By
from condu_ray.store import Manifest, Store
from condu_ray.store.documents import read, write

BY: dict[str, By] = {"named": "named", "candidates": "vote", "union": "union"}
"""Label space -> who answers."""

Spaces = dict[str, dict[str, float]]
"""Accuracy in percent by label space and task: `candidates` of all tasks, `union` and `named` of those learned."""

Tests = Mapping[str, tuple[TaskData, Split]]
"""Task -> what it is, and the test pictures that its sessions use; tasks in the order of the stream."""


def spaces_of(system: System) -> tuple[str, ...]:
    """The label spaces to measure: one model for all answers alike whether the task is named or its classes given."""
    return tuple(BY) if system.votes else ("candidates", "union")


def evaluate_versions(
    store: Store,
    versions: Sequence[Manifest],
    tests: Tests,
    spaces: Sequence[str],
    crew: Crew,
    folder: Path,
    stage: Stage,
) -> None:
    """Writes what `read_evaluation` reads of each version, as far as it is not there."""
    for manifest in versions:
        before: Spaces = read(_path(folder, manifest)) or {}
        missing = [space for space in spaces if space not in before]
        if missing:
            with stage(f"{', '.join(missing)}, version {manifest.version}") as update:
                found = _evaluation(store, manifest, tests, missing, crew, update)
            write(_path(folder, manifest), before | found)


def read_evaluation(manifest: Manifest, spaces: Sequence[str], folder: Path) -> Spaces | None:
    """What was measured; None until all of `spaces` are."""
    found: Spaces = read(_path(folder, manifest)) or {}
    return {space: found[space] for space in spaces} if found.keys() >= set(spaces) else None


def _path(folder: Path, manifest: Manifest) -> Path:
    return folder / f"{manifest.version:08d}.json"


def _evaluation(
    store: Store, manifest: Manifest, tests: Tests, spaces: Sequence[str], crew: Crew, update: Update
) -> Spaces:
    learned = {card.name for card in manifest.tasks}
    # The session asked the same of tasks to come that its command named.
    known = {name: value for name, value in manifest.figures["accuracy"].items() if name not in learned}
    of = {space: [name for name in tests if name in learned] for space in spaces}
    if "candidates" in of:
        of["candidates"] = [name for name in tests if name not in known]
    asked = [(space, name) for space, names in of.items() for name in names]
    questions = [measure.ask(BY[space], *tests[name]) for space, name in asked]
    crew.hold(manifest)
    scores = crew.score(questions, snapshot_of(store, manifest), update)
    found: Spaces = {space: dict(known) if space == "candidates" else {} for space in spaces}
    for (space, name), score in zip(asked, scores, strict=True):
        found[space][name] = score
    return found
