"""Pictures like those learned are told from others, whatever the mixture of tasks, and not by chance."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import condu
from in_process_crew import learn_here, opened, settings
from numpy.typing import NDArray

from condu_ray.voting.classifier import TaskExpert
from condu_ray.voting.drift import FEWEST, drift
from condu_ray.voting.prototypes import FeatureSums, make_prototypes

WIDTH, CLASSES, HELD = 16, 3, 64


def unit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


class Domain:
    """Pictures around the class centres of one task."""

    def __init__(self, seed: int, spread: float = 0.1) -> None:
        self.random, self.spread = np.random.default_rng(seed), spread
        self.centres = self.random.normal(size=(CLASSES, WIDTH))
        self.centres /= np.linalg.norm(self.centres, axis=1, keepdims=True)

    def pictures(self, count: int, more: float = 0.0) -> NDArray[np.float32]:
        centres = self.centres[self.random.integers(0, CLASSES, count)]
        return unit(centres + self.random.normal(size=(count, WIDTH)) * (self.spread + more))

    def task(self, name: str) -> TaskExpert:
        labels = np.arange(90) % CLASSES
        features = unit(self.centres[labels] + self.random.normal(size=(90, WIDTH)) * self.spread)
        sums = FeatureSums.zero(CLASSES, WIDTH).add(features, labels)
        made = make_prototypes(sums, self.centres.astype(np.float32), self.pictures(HELD))
        return TaskExpert(name, ("a", "b", "c"), (), made)


@pytest.mark.parametrize("seed", range(20))
def test_what_was_learned_is_no_drift_in_any_mixture(seed: int) -> None:
    """One task's similarities are not another's: only like is compared with like."""
    one, two = Domain(2 * seed, 0.05), Domain(2 * seed + 1, 0.2)
    tasks = [one.task("one"), two.task("two")]
    for features in (one.pictures(100), two.pictures(100), np.concatenate([one.pictures(20), two.pictures(300)])):
        assert [row.drifted for row in drift(tasks, features)] == [False, False]


def test_pictures_of_nothing_learned_are_drift_of_the_task_they_are_nearest_to() -> None:
    one, two, strange = Domain(0), Domain(1), Domain(2)
    rows = drift([one.task("one"), two.task("two")], np.concatenate([one.pictures(100), strange.pictures(100)]))
    assert sum(row.pictures for row in rows) == 200
    assert any(row.drifted for row in rows)
    for row in rows:
        if row.drifted:
            assert row.similarity is not None and row.learned is not None and row.similarity < row.learned


def test_pictures_that_slowly_change_are_noticed() -> None:
    one = Domain(3)
    (row,) = drift([one.task("one")], one.pictures(200, more=0.15))
    assert row.drifted


def test_pictures_that_are_more_typical_than_before_are_no_drift() -> None:
    one = Domain(4, spread=0.2)
    (row,) = drift([one.task("one")], one.pictures(200, more=-0.15))
    assert (row.drifted, row.p) == (False, pytest.approx(1, abs=0.1))


def test_too_few_say_nothing() -> None:
    one, strange = Domain(5), Domain(6)
    (row,) = drift([one.task("one")], strange.pictures(FEWEST - 1))
    assert (row.p, row.distance, row.drifted) == (None, None, False)


def test_the_command(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path) -> None:
    data = Path(shutil.copytree(picture_tasks["colours"] / "train", tmp_path / "colours"))
    config = settings(tmp_path / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, "colours"))
    said = condu("drift", "--data", data, "--store", config.store, "--json")
    assert said.code == 0, said.err
    found = said.document
    assert (found["version"], found["pictures"], found["of"], found["drifted"]) == (1, 36, 36, 0)
    assert [row["name"] for row in found["tasks"]] == ["colours"]
    assert "too few pictures" in condu("drift", "--data", data, "--store", config.store).out  # 7 of 36 were held out
    assert condu("drift", "--data", tmp_path / "none", "--store", config.store).code == 2
