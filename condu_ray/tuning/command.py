"""One run of `sweep` from start to end: file, pictures, cluster, search, best, pictures, tracking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from condu_ray.engine.cluster import Cluster, connected
from condu_ray.engine.plan import open_data, store_for
from condu_ray.engine.progress import Stage
from condu_ray.engine.ray_crew import RayCrew
from condu_ray.engine.reach import check_reached, one_of
from condu_ray.errors import ConfigError, TrainingError
from condu_ray.paths import check_lasting
from condu_ray.store.documents import read, write
from condu_ray.tracking.mlflow_run import open_tracking
from condu_ray.tracking.pictures import draw_importance, draw_parallel
from condu_ray.tracking.sweep_run import Trial, record_sweep
from condu_ray.tuning import answers, runs
from condu_ray.tuning.best import write_best
from condu_ray.tuning.cache import prepare
from condu_ray.tuning.objectives import UNITS
from condu_ray.tuning.records import Record, Scores, Trials, finished
from condu_ray.tuning.settings import Sweep, read_sweep, with_defaults
from condu_ray.tuning.summary import advice, best_of, cautions
from condu_ray.tuning.table import shown

MOST_DRAWN = 100
"""Trials in a picture and in the tracking, the best: more are no longer told apart."""


def run(file: Path, folder: Path, stage: Stage, cluster: Cluster | None = None) -> dict[str, Any]:
    """Runs what is missing of a sweep and returns its report, which `sweep --json` prints.

    folder: holds all of it; given again, what is finished is not done again. cluster: as for `engine.command.run`.
    Raises ConduError for bad input, before anything is written.
    """
    sweep = read_sweep(file)
    check_lasting(folder.absolute(), f"--work {folder}")
    folder = folder.absolute()
    if folder.is_file():
        raise ConfigError(f"{folder} is a file", "give a folder by --work")
    _check(sweep, folder)
    tracking = None if sweep.config.tracking == "off" else open_tracking(sweep.config.tracking, folder)
    away = tracking.check() if tracking else None
    records = _known(sweep, folder)
    if sum(record.ended for record in records) < sweep.most:
        records = _search(sweep, folder, stage, cluster)
    best = best_of(sweep, records)
    if not best:
        raise TrainingError(
            f"none of the {len(records)} trials came to an end ({_first_reason(records)})",
            "mend what the reason names; trials that failed are not tried again in this folder",
        )
    found = advice(sweep, records, best[0])
    paths = _files(sweep, file, folder, records, best, found["importance"], stage)
    report = _report(sweep, folder, records, best, found, paths)
    warnings = [*([away] if away else []), *cautions(sweep, best[0])]
    if tracking:
        with stage("recording"):
            trials = [_trial_of(sweep, record) for record in _worth_drawing(records)]
            said = record_sweep(tracking, folder.name, sweep.terms(), trials, _trial_of(sweep, best[0]), [*paths])
            warnings += [said] if said else []
    report["warnings"] = warnings
    write(folder / "report.json", report)
    return report


def _check(sweep: Sweep, folder: Path) -> None:
    """Raises ConfigError where the folder holds another sweep."""
    there, asked = read(folder / "sweep.json"), json.loads(json.dumps(sweep.terms()))
    if there is None:
        return
    there = with_defaults(there)  # of a release that had fewer entries and settings
    if there == asked:
        return
    differ = [name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name)]
    raise ConfigError(
        f"{folder} holds a sweep with another {', '.join(differ)}", "use another --work, or what it was started with"
    )


def _known(sweep: Sweep, folder: Path) -> list[Record]:
    return Trials(folder).all() if sweep.kind == "training" else Scores(folder).all()


def _search(sweep: Sweep, folder: Path, stage: Stage, cluster: Cluster | None) -> list[Record]:
    tasks = open_data(sweep.config, stage, sweep.validation_share)
    for task in tasks:
        if not len(task.test):
            raise ConfigError(
                f"no picture of {task.name} can be set aside: every class has one training picture only", "add pictures"
            )
    with connected(cluster) as found:
        if sweep.kind == "training":
            runs.resources(sweep.config, found)  # too small a cluster is said before anything is written
        write(folder / "sweep.json", sweep.terms())
        pictures = one_of({task.name: task.train for task in tasks})
        # A trial on a node that lacks the folder would train, and write what it found where nobody looks.
        check_reached(found, {"the folder of the sweep": str(folder / "sweep.json"), **pictures})
        if sweep.kind == "training":
            with shown(sweep) as table:
                return runs.search(sweep, tasks, folder, found, table)
        config = sweep.config.model_copy(update={"store": str(folder / "stream"), "tracking": "off"})
        store = store_for(config)
        crew = RayCrew(store, config, found)
        try:
            cached = prepare(config, tasks, sweep.goals, store, crew, stage)
        finally:
            crew.dismiss()
        with stage("re-scoring") as update:
            return answers.search(sweep, cached, folder, found, update)


def _first_reason(records: list[Record]) -> str:
    return next((record.reason for record in records if record.reason), "no reason is known")


def _worth_drawing(records: list[Record]) -> list[Record]:
    """All, or of thousands the best."""
    if len(records) <= MOST_DRAWN:
        return records
    return sorted(records, key=lambda record: record.reached or (0, 0.0), reverse=True)[:MOST_DRAWN]


def _files(
    sweep: Sweep,
    file: Path,
    folder: Path,
    records: list[Record],
    best: list[Record],
    importance: dict[str, float],
    stage: Stage,
) -> list[Path]:
    """best.yaml, for a front of several one file each, and the pictures."""
    for place, record in enumerate(best):
        path = folder / "best.yaml" if place == 0 else folder / "front" / f"{place}.yaml"
        write_best(sweep, record, path, str(file), len(records))
    pictures = [folder / "pictures" / "parallel_coordinates.png", folder / "pictures" / "importance.png"]
    with stage("drawing"):
        drawn = _worth_drawing(finished(records))
        unit = UNITS[sweep.goals.names[0]]
        rows = [(record.settings, record.values[0]) for record in drawn if record.values is not None]
        draw_parallel(rows, unit, pictures[0])
        draw_importance(importance, unit, pictures[1])
    return [folder / "best.yaml", *pictures]


def _report(
    sweep: Sweep, folder: Path, records: list[Record], best: list[Record], found: dict[str, Any], paths: list[Path]
) -> dict[str, Any]:
    states = [record.state for record in records]
    return {
        "kind": sweep.kind,
        "objectives": list(sweep.goals.names),
        "trials": {state: states.count(state) for state in ("finished", "stopped", "failed")},
        "steps": sum(record.reports[-1].steps for record in records if record.reports),
        "best": _row(sweep, best[0]),
        "front": [_row(sweep, record) for record in best],
        "failed": [{"number": each.number, "reason": each.reason} for each in records if each.state == "failed"],
        **found,
        "config": str(paths[0]),
        "pictures": [str(path) for path in paths[1:]],
        "folder": str(folder),
    }


def _row(sweep: Sweep, record: Record) -> dict[str, Any]:
    values = dict(zip(sweep.goals.names, record.values or (), strict=True))
    return {"number": record.number, "settings": record.settings, "values": values, "figures": record.figures}


def _trial_of(sweep: Sweep, record: Record) -> Trial:
    return Trial(
        record.number,
        record.settings,
        [(each.budget, dict(zip(sweep.goals.names, each.values, strict=True))) for each in record.reports],
        record.state,
        record.reason,
    )
