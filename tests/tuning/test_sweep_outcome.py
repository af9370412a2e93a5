"""What a sweep says once its trials are done: nothing is searched for here, so no cluster is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from in_process_crew import silent
from streams import ended

from condu_ray.tuning import command
from condu_ray.tuning.proposals import Proposals
from condu_ray.tuning.records import Trials
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
