"""A trial trains as `learn` does, on what is left of the training pictures, and does nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_crew import learn_here
from streams import SHARE, ended

from condu_ray.data import open_task
from condu_ray.errors import ConfigError
from condu_ray.methods.training import all_steps_for
from condu_ray.tuning import trial
from condu_ray.tuning.objectives import figures_of
from condu_ray.tuning.records import Report, Scores, Trials
from condu_ray.tuning.runs import assignment_of
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.space import applied

Written = Callable[..., tuple[Path, Sweep]]
SETTINGS = {"train.lr": 3e-3}
SPACE = {"train.lr": {"log": [1e-4, 1e-2]}}


class Killed(BaseException):
    pass


def assigned(sweep: Sweep, folder: Path) -> trial.Assignment:
    tasks = [open_task(name, source, validation=SHARE) for name, source in sweep.config.tasks.items()]
    return assignment_of(sweep, tasks, folder, {"CPU": 1})


def reports(assignment: trial.Assignment, settings: dict[str, Any] | None = None) -> list[Report]:
    found: list[Report] = []
    trial.run(assignment, 0, settings or SETTINGS, found.append)
    return found


def test_a_single_task_is_looked_at_thrice_and_ends_where_learning_ends(written: Written, tmp_path: Path) -> None:
    _, sweep = written(["colours"], SPACE)
    assignment = assigned(sweep, tmp_path / "sweep")
    found = reports(assignment)
    assert [(each.budget, each.steps) for each in found] == [(1, 1), (2, 3), (3, 9)]
    config = applied(sweep.config, SETTINGS).model_copy(update={"store": str(tmp_path / "store")})
    (manifest,) = learn_here(config, assignment.tasks)
    assert found[-1].values == (manifest.tasks[0].figures["own"],)


def test_a_stream_is_looked_at_after_each_version(written: Written, tmp_path: Path) -> None:
    _, sweep = written(["colours", "stripes"], SPACE, objectives=["average", "zero_shot_loss"])
    assignment = assigned(sweep, tmp_path / "sweep")
    found = reports(assignment)
    assert [each.budget for each in found] == [1, 2]
    config = applied(sweep.config, SETTINGS).model_copy(update={"store": str(tmp_path / "store")})
    first, last = learn_here(config, assignment.tasks)
    names = list(config.tasks)
    rows = [[version.figures["accuracy"][name] for name in names] for version in (first, last)]
    expected = figures_of(rows, [card.figures["zero_shot"] for card in last.tasks])
    assert found[-1].figures == pytest.approx(expected)
    assert found[-1].values == (found[-1].figures["average"], found[-1].figures["zero_shot_loss"])


@pytest.mark.parametrize("method", ["rapf", "dmc"])
def test_a_system_that_trains_in_its_own_way_is_looked_at_as_learning_leaves_it(
    written: Written, tmp_path: Path, method: str
) -> None:
    _, sweep = written(["colours"], SPACE, session={"method": method, "adapter": {"epochs": 1}})
    assignment = assigned(sweep, tmp_path / "sweep")
    (found,) = reports(assignment)
    config = applied(sweep.config, SETTINGS).model_copy(update={"store": str(tmp_path / "store")})
    (manifest,) = learn_here(config, assignment.tasks)
    assert found.values == (manifest.figures["accuracy"]["colours"],)
    assert found.steps == all_steps_for(len(assignment.tasks[0].train), config)


def test_what_ended_is_told_again_and_not_trained_again(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sweep = written(["colours"], SPACE)
    assignment = assigned(sweep, tmp_path / "sweep")
    first = reports(assignment)
    monkeypatch.setattr(trial, "train_task", lambda *given, **named: pytest.fail("trained again"))
    assert reports(assignment) == first
    (record,) = Trials(assignment.folder).all()
    assert (record.state, record.begun) == ("finished", 1)


def test_a_trial_that_was_killed_goes_on_to_the_same_end(written: Written, tmp_path: Path) -> None:
    _, sweep = written(["colours"], SPACE, session={"train": {"steps": 9, "batch_size": 8, "checkpoint_seconds": 1e-6}})
    whole = reports(assigned(sweep, tmp_path / "whole"))
    assignment = assigned(sweep, tmp_path / "sweep")

    def report(each: Report) -> None:
        if each.budget == 2:
            raise Killed

    with pytest.raises(Killed):
        trial.run(assignment, 0, SETTINGS, report)
    again = reports(assignment)
    assert [(each.budget, each.values, each.steps) for each in again] == [
        (each.budget, each.values, each.steps) for each in whole
    ]
    assert Trials(assignment.folder).all()[0].begun == 2


def test_settings_that_do_not_go_together_are_the_trials_own_fault(written: Written, tmp_path: Path) -> None:
    space = {"fusion.triggers": {"choice": ["mask", "sign"]}, "fusion.tune_rescalers": {"choice": [None, 3]}}
    _, sweep = written(["colours"], space)
    with pytest.raises(ConfigError, match="needs sign triggers"):
        reports(assigned(sweep, tmp_path), {"fusion.triggers": "mask", "fusion.tune_rescalers": 3})


def test_a_line_that_a_kill_cut_off_is_scored_again(tmp_path: Path) -> None:
    scores = Scores(tmp_path)
    scores.add([ended(0, {"vote.k": 1}, 1.0), ended(1, {"vote.k": 2}, 2.0)])
    path = tmp_path / "scores.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [record.number for record in scores.all()] == [0]
    scores.add([ended(2, {"vote.k": 3}, 2.0)])
    scores.add([ended(1, {"vote.k": 2}, 2.0)])  # a batch may end after one that was proposed later
    assert [record.number for record in scores.all()] == [0, 1, 2]
