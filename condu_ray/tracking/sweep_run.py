"""A sweep in MLflow: one parent run with its pictures and best settings, and a nested run for each trial."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condu_ray.tracking.mlflow_run import (
    PARAMETER_LENGTH,
    Tracking,
    client_of,
    key_of,
    reason_of,
    runs_with,
    texts_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

SWEEP_TAG = "condu.sweep"
PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class Trial:
    """values: (budget, objective -> value) as it went on. state: finished, stopped (early) or failed; reason: why."""

    number: int
    settings: Mapping[str, Any]
    values: Sequence[tuple[int, Mapping[str, float]]]
    state: str
    reason: str | None


def record_sweep(
    tracking: Tracking, name: str, terms: Mapping[str, Any], trials: Sequence[Trial], best: Trial, files: Sequence[Path]
) -> str | None:
    """Records a sweep; one with the same terms, place and trials is recorded once.

    terms: what was asked. files: kept with the parent run. Returns None, or a sentence of warning: a sweep stands in
    its own folder, so tracking that fails costs nothing else.
    """
    try:
        _record(tracking, client_of(tracking.uri), name, terms, trials, best, files)
    except Exception as error:  # as of a version
        return f"the sweep is done, but was not recorded at {tracking.shown} ({reason_of(error)})."
    return None


def _record(
    tracking: Tracking,
    client: MlflowClient,
    name: str,
    terms: Mapping[str, Any],
    trials: Sequence[Trial],
    best: Trial,
    files: Sequence[Path],
) -> None:
    experiment = tracking.experiment(client, "condu-ray-sweeps")
    told = json.dumps([tracking.store, dict(terms), [(t.number, t.state) for t in trials]], sort_keys=True)
    tags = {SWEEP_TAG: hashlib.sha256(told.encode()).hexdigest()[:32]}
    for run in runs_with(client, experiment, tags):
        if run.info.status == "FINISHED":
            return
        # Of a sweep that was killed while it was recorded; its trials first, or a second kill would leave them.
        for each in [*runs_with(client, experiment, {PARENT_TAG: run.info.run_id}), run]:
            client.delete_run(each.info.run_id)
    parent = client.create_run(experiment, run_name=name, tags=tags).info.run_id
    _log(client, parent, best)
    for key, value in texts_of(dict(terms)):
        client.set_tag(parent, f"condu.{key_of(key)}", value[:PARAMETER_LENGTH])
    for file in files:
        client.log_artifact(parent, str(file))
    for trial in trials:
        own = {PARENT_TAG: parent, "condu.state": trial.state}
        own |= {"condu.reason": trial.reason} if trial.reason else {}
        run = client.create_run(experiment, run_name=f"trial {trial.number}", tags=own).info.run_id
        _log(client, run, trial)
        client.set_terminated(run, "FAILED" if trial.state == "failed" else "FINISHED")
    client.set_terminated(parent)


def _log(client: MlflowClient, run: str, trial: Trial) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    params = [Param(key_of(name), str(value)[:PARAMETER_LENGTH]) for name, value in trial.settings.items()]
    metrics = [
        Metric(key_of(name), value, now, budget) for budget, values in trial.values for name, value in values.items()
    ]
    client.log_batch(run, metrics=metrics, params=params)
