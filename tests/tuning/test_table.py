"""What is seen of a sweep while it runs, and at its end."""

from __future__ import annotations

import io
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
from streams import ended

from condu_ray import reports
from condu_ray.tuning.records import Record, Trials
from condu_ray.tuning.runs import _Watch, workplace
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.table import Table

Written = Callable[..., tuple[Path, Sweep]]
SPACE = {"train.lr": {"log": [1e-4, 1e-2]}, "train.towers": {"choice": ["both", "image"]}}


def settings(lr: float) -> dict[str, Any]:
    return {"train.lr": lr, "train.towers": "both"}


def test_a_line_a_trial_where_there_is_no_terminal(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    _, sweep = written(["colours"], SPACE)
    table = Table(sweep, None)
    table.show(Record(0, settings(0.001)))
    table.show(ended(0, settings(0.001), 87.5))
    table.show(ended(0, settings(0.001), 87.5))
    table.show(Record(1, settings(0.01), (), "failed", "the loss is nan"))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "trial 0 finished (train.lr 0.001, train.towers both) accuracy % 87.50",
        "trial 1 failed (train.lr 0.01, train.towers both) the loss is nan",
    ]


def test_a_terminal_shows_what_runs_and_the_best_and_can_be_left_behind(written: Written, tmp_path: Path) -> None:
    _, sweep = written(["colours"], SPACE, trials=40)
    screen = io.StringIO()
    with Live(console=Console(file=screen, force_terminal=True, width=120), auto_refresh=False) as live:
        table = Table(sweep, live)
        for number in range(20):
            table.show(ended(number, settings(0.001 + number / 10_000), float(number)))
        table.show(ended(21, settings(0.0098), 99.0, state="stopped", budget=1))
        table.show(Record(20, settings(0.0099)))
        live.refresh()
        pickle.dumps(_Watch(Trials(tmp_path), table))  # as Tune does with its callbacks
    last = screen.getvalue()
    assert "21 of 40 trials" in last
    shown = [row[0] for row in zip(*(column.cells for column in table.drawn().columns), strict=True)]
    assert shown == ["20", *(str(number) for number in range(19, 8, -1))]


def test_a_run_that_ends_leaves_what_another_one_needs(tmp_path: Path) -> None:
    with workplace(tmp_path) as one:
        one.mkdir(parents=True)
        with workplace(tmp_path) as other:
            other.mkdir(parents=True)
        assert (one.is_dir(), other.exists()) == (True, False)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_command_and_not_the_search_alone() -> None:
    """With Tune's own handler the first Ctrl-C makes a sweep under way look like one that is finished."""
    from ray.tune.tune import _setup_signal_catching

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGUSR1)}
    try:
        _setup_signal_catching()
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_summary_says_what_matters_and_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"number": 3, "settings": {"train.lr": 0.002, "train.towers": None}, "values": {"last": 81.25}, "figures": {}}
    reports.show_sweep(
        {
            "trials": {"finished": 5, "stopped": 9, "failed": 1},
            "steps": 1234,
            "failed": [{"number": 7, "reason": "the loss is nan"}],
            "objectives": ["last"],
            "front": [row],
            "importance": {"train.lr": 0.97, "train.towers": 0.03},
            "matters": ["train.lr"],
            "hardly": ["train.towers"],
            "try": ["a larger train.lr"],
            "pictures": ["importance.png"],
            "config": "best.yaml",
        }
    )
    said = capsys.readouterr().out
    for words in (
        "5 trials finished, 9 stopped early, 1 failed; 1,234 steps trained",
        "trial 7 failed: the loss is nan",
        "0.002",
        "unset",
        "81.25",
        "matters: train.lr (97 %)",
        "hardly matters: train.towers (3 %)",
        "try: a larger train.lr",
        "next: condu-ray learn --config best.yaml",
    ):
        assert words in said
