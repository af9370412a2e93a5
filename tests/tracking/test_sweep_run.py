"""A sweep is recorded once, with a nested run a trial, whatever a kill has left of an earlier try."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from condu_ray.tracking.mlflow_run import open_tracking
from condu_ray.tracking.sweep_run import Trial, record_sweep

pytestmark = [
    # As in test_mlflow_run.py.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


class Killed(BaseException):
    pass


def test_what_a_kill_left_of_a_record_is_replaced_with_its_trials(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracking = open_tracking(None, tmp_path)
    trials = [Trial(number, {"train.lr": 1e-3}, [(1, {"accuracy": 50.0})], "finished", None) for number in range(3)]

    def recorded() -> str | None:
        return record_sweep(tracking, "sweep", {"search": "grid"}, trials, trials[0], [])

    whole, ends = MlflowClient.set_terminated, list[str]()

    def killed(self: Any, run: str, *others: Any) -> None:
        if ends:
            raise Killed
        ends.append(run)
        whole(self, run, *others)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", killed)
        with pytest.raises(Killed):
            recorded()
    assert recorded() is None
    client = MlflowClient(tracking.uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert sorted(run.info.run_name for run in runs) == ["sweep", "trial 0", "trial 1", "trial 2"]
    assert {run.info.status for run in runs} == {"FINISHED"}
