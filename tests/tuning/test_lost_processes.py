"""Processes that score or train for a sweep and are lost with their node; plain objects stand for them here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from condu_ray.engine import pool as pools
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.progress import no_update
from condu_ray.errors import TrainingError
from condu_ray.tuning import answers, runs
from condu_ray.tuning.records import Record, Report, Trials
from condu_ray.tuning.settings import Sweep

Written = Callable[..., tuple[Path, Sweep]]
SPACE = {"vote.k": {"integer": [1, 3]}, "vote.coverage": {"uniform": [0.3, 0.99]}}


class Scoring:
    """Takes so many calls, and is gone with the last one. options: what Ray was asked for."""

    def __init__(self, options: dict[str, Any], left: int | None) -> None:
        self.options, self._left = options, left
        self.__ray_ready__ = SimpleNamespace(remote=lambda: self._answer(True))
        self.scored = SimpleNamespace(remote=self._scored)

    def _scored(self, batch: list[Any]) -> Callable[[], Any]:
        if self._left is not None:
            self._left -= 1
        return self._answer([({"last": 50.0}, 0.01) for _ in batch])

    def _answer(self, what: Any) -> Callable[[], Any]:
        def answer() -> Any:
            if self._left == 0:
                raise RayActorError
            return what

        return answer


@pytest.fixture
def hire(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Scoring]]:
    """Says how many calls each process takes, in the order in which they are made (None: all); returns those made."""

    def wait(refs: Sequence[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        return list(refs[:num_returns]), list(refs[num_returns:])

    def lives(*each: int | None) -> list[Scoring]:
        made, left = list[Scoring](), list(each)

        def remote(**options: Any) -> Callable[[type], Any]:
            def new(*given: Any) -> Scoring:
                made.append(Scoring(options, left.pop(0)))
                return made[-1]

            return lambda kind: SimpleNamespace(remote=new)

        stand_in = SimpleNamespace(wait=wait, kill=lambda actor: None, remote=remote)
        for module in (answers, pools):
            monkeypatch.setattr(module, "ray", stand_in)
            monkeypatch.setattr(module, "answer_of", lambda ref: ref())
        return made

    return lives


def search(written: Written, folder: Path, cores: int) -> list[Any]:
    _, sweep = written(["colours"], SPACE, trials=100, objectives=["last"])
    return answers.search(sweep, None, folder, Cluster(((cores, 0),), joined=True), no_update)  # type: ignore[arg-type]


def test_batches_of_a_node_that_is_lost_are_scored_elsewhere(written: Written, hire: Any, tmp_path: Path) -> None:
    """Ray would start its processes again as soon as there is another node, and the search wait for them till then."""
    made = hire(None, 1, 2, 1)
    records = search(written, tmp_path, cores=4)
    assert [record.number for record in records] == list(range(100))
    assert {record.state for record in records} == {"finished"}
    assert len(made) == 4
    assert not any("max_restarts" in each.options for each in made)


def test_where_all_are_lost_another_is_started(written: Written, hire: Any, tmp_path: Path) -> None:
    made = hire(2, None)
    assert len(search(written, tmp_path, cores=1)) == 100
    assert len(made) == 2


def test_a_batch_that_ends_every_process_ends_the_search(written: Written, hire: Any, tmp_path: Path) -> None:
    hire(1, 1, 1, 1)
    with pytest.raises(TrainingError, match="a process of this session is gone"):
        search(written, tmp_path, cores=1)


def test_a_trial_whose_process_dies_goes_on_and_one_that_failed_does_not(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune starts both again; a process that was taken away with its node ended the trial for good."""
    _, sweep = written(["colours"], {"train.lr": {"choice": [1e-3, 1e-4]}}, search="grid")
    asked = dict[str, Any]()

    def tuner(trainable: Any, **given: Any) -> Any:
        asked.update(given)
        return SimpleNamespace(fit=lambda: None)

    monkeypatch.setattr(runs.tune, "Tuner", tuner)
    runs.search(sweep, [], tmp_path, Cluster(((2, 0),), joined=True), None)  # type: ignore[arg-type]
    assert asked["run_config"].failure_config.max_failures == runs.RESTARTS

    told, calls = list[dict[str, Any]](), list[int]()
    one, other = {"train.lr": 1e-3}, {"train.lr": 1e-4}
    trials, assignment = Trials(tmp_path), runs.assignment_of(sweep, [], tmp_path, {"CPU": 1})
    trials.write(Record(0, one, (Report(1, (50.0,), {}, 3, 0.1),)))

    def run(assignment: Any, number: int, settings: Any, report: Callable[[Report], None]) -> None:
        calls.append(number)
        record = trials.read(settings) or Record(number, settings)
        trials.write(record)
        if number == 1:
            raise TrainingError("the loss is not finite")
        for each in record.reports:
            report(each)

    monkeypatch.setattr(runs.tune, "report", told.append)
    monkeypatch.setattr(runs, "run", run)
    runs._trial({"number": 0, "settings": one}, assignment)
    with pytest.raises(TrainingError):
        runs._trial({"number": 1, "settings": other}, assignment)
    runs._trial({"number": 1, "settings": other}, assignment)
    assert calls == [0, 1]
    assert [each.get("values") for each in told] == [[50.0], None]
    assert [record.state for record in trials.all()] == ["running", "failed"]

    again = asked["tune_config"].search_alg
    for trial in ("a", "b"):
        again.suggest(trial)
    for result in (told[0], told[0], told[1]):  # Optuna warns of what it is told twice
        again.on_trial_result("a", result)
    again.on_trial_complete("b", told[1])
