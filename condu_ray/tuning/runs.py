"""The search for training settings: Ray Tune runs the trials, Optuna proposes, ASHA ends those that lag behind.

The truth is in the trials' own files. A driver that was killed is given again: Tune starts anew, and trials that ended
report what they reported before, in a blink, so that search and early stopping know all that they knew.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # records.py writes what is kept
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune's takes the first Ctrl-C for the end of the search
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints a banner on standard output, whatever `verbose`

from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.placement import places
from condu_ray.errors import ConduError, TrainingError
from condu_ray.tuning.proposals import Proposals
from condu_ray.tuning.records import Record, Report, State, Trials
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.table import Table
from condu_ray.tuning.trial import Assignment, run

RUNGS = 3
"""How often a trial of a single task is looked at: at 1, 1 / reduction and 1 / reduction² of its steps."""

RESTARTS = 3
"""How often a trial whose process died, with its node perhaps, goes on from its last checkpoint."""


def resources(config: SessionConfig, cluster: Cluster) -> tuple[dict[str, float], int]:
    """(what a trial takes, how many run at once): as many as the cluster has places for, or `workers`.

    Raises TrainingError where there is no place, since Tune would wait for ever.
    """
    gpus = config.gpus_per_worker if config.gpu == "auto" and cluster.gpus > 0 else 0.0
    cpus = config.cpus_per_worker or 1
    room = places(cpus, gpus, cluster)
    if room < 1:
        raise TrainingError(f"a trial needs {cpus} CPU cores of one node", "use fewer cpus_per_worker")
    needs: dict[str, float] = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return needs, min(room, config.workers or room)


def assignment_of(sweep: Sweep, tasks: list[TaskData], folder: Path, needs: Mapping[str, float]) -> Assignment:
    shares = tuple(float(sweep.reduction) ** -place for place in reversed(range(RUNGS)))
    return Assignment(
        config=sweep.config,
        tasks=tuple(tasks),
        goals=sweep.goals,
        labels=sweep.asked,
        rungs=shares if sweep.stops_early else (1.0,),
        reduction=sweep.reduction,
        folder=folder,
        threads=max(1, int(needs["CPU"])),
        device="cuda" if needs.get("GPU") else "cpu",
    )


def search(sweep: Sweep, tasks: list[TaskData], folder: Path, cluster: Cluster, table: Table) -> list[Record]:
    """Runs what is missing of the sweep's trials and returns all, in the order proposed."""
    trials = Trials(folder)
    needs, most = resources(sweep.config, cluster)
    assignment = assignment_of(sweep, tasks, folder, needs)
    with workplace(folder) as place:
        trainable = tune.with_parameters(_trial, assignment=assignment)
        tuner = tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([needs])),
            tune_config=tune.TuneConfig(
                search_alg=_Search(Proposals(sweep, replayed=trials.all())),
                scheduler=_scheduler(sweep, assignment),
                num_samples=sweep.most,
                max_concurrent_trials=most,
                reuse_actors=True,  # a process's start costs more than many a trial, and than all that is told again
            ),
            run_config=tune.RunConfig(
                name=place.name,
                storage_path=str(place.parent),
                callbacks=[_Watch(trials, table)],
                failure_config=tune.FailureConfig(max_failures=RESTARTS),
                verbose=0,
            ),
        )
        tuner.fit()
    return trials.all()


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Where Tune keeps what nothing here reads; removed afterwards, but not what another run has beside it."""
    place = folder / "tune" / uuid.uuid4().hex[:12]
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # there is none, or it is not empty
            place.parent.rmdir()


def _trial(config: Mapping[str, Any], assignment: Assignment) -> None:
    """What each trial of Tune runs."""
    number, settings = config["number"], config["settings"]
    trials = Trials(assignment.folder)
    known = trials.read(settings)
    if known is not None and known.state == "failed":  # Tune starts again whatever failed; here its process did not die
        tune.report({"score": float("-inf")})
        return
    try:
        run(assignment, number, settings, lambda report: tune.report(_metrics(report, assignment)))
    except Exception as error:
        trials.end(settings, "failed", _reason(error))
        raise


def _reason(error: Exception) -> str:
    """One line: what a user can act on."""
    if isinstance(error, ConduError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__


def _metrics(report: Report, assignment: Assignment) -> dict[str, Any]:
    """score: the first objective, an accuracy, which the scheduler compares. The table reads the rest."""
    return {
        "budget": report.budget,
        "spent": assignment.spent(report.budget),
        "score": report.values[0],
        "values": list(report.values),
        "whole": report.budget == assignment.budget,
    }


def _scheduler(sweep: Sweep, assignment: Assignment) -> TrialScheduler:
    if not sweep.stops_early or assignment.budget < 2:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="spent",
        metric="score",
        mode="max",
        max_t=assignment.spent(assignment.budget),
        grace_period=1,
        reduction_factor=sweep.reduction,
    )


class _Search(Searcher):
    """Optuna's proposals as Tune asks for them."""

    def __init__(self, proposals: Proposals) -> None:
        super().__init__(metric="score", mode="max")
        self._proposals = proposals
        self._numbers: dict[str, int] = {}
        self._told: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        found = self._proposals.ask()
        if found is None:
            return Searcher.FINISHED
        number, settings = found
        self._numbers[trial_id] = number
        return {"number": number, "settings": settings}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        # One whose process died says again what it said before, and one that failed has nothing to say.
        if result.get("budget", 0) > self._told.get(trial_id, 0):
            self._told[trial_id] = result["budget"]
            self._proposals.report(self._numbers[trial_id], result["budget"], result["values"][0])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers[trial_id]
        if error or not result or "values" not in result:
            self._proposals.tell(number, None)
        else:
            self._proposals.tell(number, result["values"], result["whole"])


class _Watch(Callback):
    """Writes how trials end, and shows all of it."""

    def __init__(self, trials: Trials, table: Table) -> None:
        self._trials, self._table = trials, table

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickle of its callbacks, which nothing here reads; a terminal cannot be pickled."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._show(trial)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self._show(trial)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, "stopped", None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial, "failed", "its process died")

    def _show(self, trial: Any) -> None:
        number, settings = trial.config["number"], trial.config["settings"]
        self._table.show(self._trials.read(settings) or Record(number, settings))

    def _end(self, trial: Any, state: State, reason: str | None) -> None:
        settings = trial.config["settings"]
        if self._trials.read(settings) is None:
            self._trials.write(Record(trial.config["number"], settings))
        ended = self._trials.end(settings, state, reason)
        assert ended is not None
        self._table.show(ended)
