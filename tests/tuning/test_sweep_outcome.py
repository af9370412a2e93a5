"""What a sweep says once its trials are done: nothing is searched for here, so no cluster is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_crew import silent
from streams import ended

from condu_ray.errors import ConfigError
from condu_ray.store.documents import write
from condu_ray.tuning import command
from condu_ray.tuning.proposals import Proposals
from condu_ray.tuning.records import Record, Report, Scores, Trials
from condu_ray.tuning.settings import Sweep

Written = Callable[..., tuple[Path, Sweep]]
GRID = {"train.steps": {"integer": [3, 12]}, "train.towers": {"choice": ["both", "image"]}}


def outcome(file: Path, sweep: Sweep) -> dict[str, Any]:
    """The report of a sweep whose trials are all on record already."""
    proposals, trials = Proposals(sweep), Trials(file.with_suffix(""))
    while one := proposals.ask():
        proposals.tell(one[0], (float(one[0]),))
        trials.write(ended(*one, float(one[0])))
    return command.run(file, file.with_suffix(""), silent)


def test_a_grid_that_was_tried_in_part_says_so(written: Written) -> None:
    said = outcome(*written(["colours"], GRID, search="grid", trials=16))
    assert said["trials"]["finished"] == 16
    assert ["16 of 20 combinations: raise `trials`" in each for each in said["warnings"]] == [True]
    file, whole = written(["colours"], GRID, search="grid")
    assert outcome(file, whole)["warnings"] == []


def test_a_bound_that_nothing_meets_is_said(written: Written) -> None:
    file, sweep = written(["colours", "stripes"], {"vote.k": {"integer": [1, 2]}}, latency_ms=5)
    for number, ms in enumerate((6.5, 8.0)):
        figures = {"last": 90.0, "latency": ms}
        report = Report(1, sweep.goals.values(figures), figures, 0, 0.0)
        Scores(file.with_suffix("")).add([Record(number, {"vote.k": number + 1}, (report,), "finished")])
    said = command.run(file, file.with_suffix(""), silent)
    assert said["best"]["number"] == 0
    assert ["within latency_ms 5: the best is the fastest, at 6.5 ms" in each for each in said["warnings"]] == [True]
    assert "trial 0 of 2: 6.5 ms a picture, more than latency_ms 5" in Path(said["config"]).read_text()


def test_a_folder_of_a_release_with_fewer_settings_goes_on(written: Written) -> None:
    file, sweep = written(["colours"], GRID, search="grid", trials=1)
    terms = json.loads(json.dumps(sweep.terms()))
    del terms["reduction"], terms["session"]["fusion.tune_rescalers"], terms["session"]["train.warmup"]
    write(file.with_suffix("") / "sweep.json", terms)
    assert outcome(file, sweep)["trials"]["finished"] == 1
    terms["session"]["train.lr"] = 0.5
    write(file.with_suffix("") / "sweep.json", terms)
    with pytest.raises(ConfigError, match="holds a sweep with another session"):
        outcome(file, sweep)
