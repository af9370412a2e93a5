"""The accuracy matrix of a store, read from its manifests, and pictures of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from condu_ray.store import Manifest
from condu_ray.tracking.matrix import AccuracyMatrix


def accuracy_matrix(manifests: Sequence[Manifest]) -> AccuracyMatrix | None:
    """Tasks of the last manifest in the order learned; each row is what the version that learned a task measured.

    manifests: all up to one version, oldest first. None where that version holds no task.
    """
    tasks = manifests[-1].tasks if manifests else []
    if not tasks:
        return None
    measured = {manifest.version: manifest.figures.get("accuracy", {}) for manifest in manifests}
    names = [card.name for card in tasks]
    return AccuracyMatrix(names, [[measured.get(card.learned_in, {}).get(name) for name in names] for card in tasks])


def draw(manifests: Sequence[Manifest], folder: Path) -> list[Path]:
    """Draws the accuracy matrix and each task's accuracy over the versions; returns the files (none without tasks)."""
    from condu_ray.tracking.pictures import draw_history, draw_matrix

    matrix = accuracy_matrix(manifests)
    drawn = [folder / "accuracy_matrix.png", folder / "accuracy_over_versions.png"]
    if matrix is None:
        return []
    draw_matrix(matrix, drawn[0])
    draw_history(histories(manifests), drawn[1])
    return drawn


def histories(manifests: Sequence[Manifest]) -> dict[str, list[tuple[int, float | None]]]:
    """Accuracy of each task of the last manifest over the versions that measured it, percent."""
    names = [card.name for card in manifests[-1].tasks] if manifests else []
    return {
        name: [
            (each.version, each.figures["accuracy"][name])
            for each in manifests
            if name in each.figures.get("accuracy", {})
        ]
        for name in names
    }
