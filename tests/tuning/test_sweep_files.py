"""A sweep's file is checked whole before anything starts; every fault is one sentence that names its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import condu

from condu_ray.errors import ConfigError
from condu_ray.sources import resolve
from condu_ray.tuning.best import write_best
from condu_ray.tuning.records import Record, Report
from condu_ray.tuning.settings import Sweep, read_sweep

LR = {"train.lr": {"log": [1e-4, 1e-2]}}
K = {"vote.k": {"integer": [1, 4]}}
Written = Callable[..., tuple[Path, Sweep]]


@pytest.mark.parametrize(
    ("tasks", "space", "others", "said"),
    [
        (1, {"train.rate": {"log": [1e-4, 1e-2]}}, {}, "no setting 'train.rate' (did you mean train."),
        (1, {"workers": {"integer": [1, 2]}}, {}, "put it under session"),
        (1, {"train.lr": {"logg": [1e-4, 1e-2]}}, {}, "no kind of entry 'logg' (did you mean log?)"),
        (1, {"train.lr": [1e-4, 1e-2]}, {}, "write one of"),
        (1, {"train.lr": {"log": [1e-2, 1e-4]}}, {}, "from a smaller number to a larger (found 0.01 to 0.0001)"),
        (1, {"train.lr": {"log": [0, 1e-2]}}, {}, "starts above 0"),
        (1, {"train.lr": {"log": [1e-4, 2.0]}}, {}, "less than 1"),
        (1, {"train.towers": {"choice": ["both", "text"]}}, {}, "train.towers"),
        (1, {"train.towers": {"choice": ["both", "both"]}}, {}, "each once"),
        (1, {"train.steps": {"uniform": [10, 20]}}, {}, "use integer or choice"),
        (1, {"train.lr": {"integer": [1, 2]}}, {}, "train.lr"),
        (2, {**LR, **K}, {}, "one kind at a time"),
        (1, LR, {"search": "grid"}, "grid needs entries of the kinds choice and integer"),
        (1, LR, {"latency_ms": 5}, "latency follows from the vote"),
        (1, LR, {"objectives": ["average"]}, "need two tasks"),
        (2, LR, {"objectives": ["accuracy"]}, "of a single task"),
        (1, LR, {"labels": "union"}, "labels union asks what was fused"),
        (
            1,
            {"method": {"choice": ["condu", "dmc"]}},
            {"objectives": ["accuracy"]},
            "dmc trains in its own way: use last",
        ),
        (2, K, {"objectives": ["latency", "last"]}, "must be an accuracy"),
        (2, K, {"objectives": ["accuracy"]}, "asks no vote"),
        (2, K, {"labels": "task"}, "asks no vote"),
        (1, LR, {"objective": "last"}, "no entry 'objective' (did you mean objectives?)"),
        (1, LR, {"trials": 0}, "trials"),
        (1, LR, {"session": {"method": "zero-shot"}}, "trains nothing"),
        (2, K, {"session": {"method": "sequential"}}, "nobody votes"),
        (0, LR, {}, "names no task"),
    ],
)
def test_what_is_wrong_is_said(
    written: Written, tasks: int, space: dict[str, Any], others: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        written(["colours", "stripes"][:tasks], space, **others)
    assert said in str(refused.value)


def test_all_faults_at_once(written: Written) -> None:
    with pytest.raises(ConfigError) as refused:
        written(["colours"], LR, trials=0, reduction=1, latency=3)
    assert all(name in str(refused.value) for name in ("trials", "reduction", "latency"))


def test_numbers_may_be_written_as_yaml_reads_them(written: Written) -> None:
    path, _ = written(["colours"], LR)
    path.write_text(path.read_text().replace("0.0001", "1e-4"))
    assert read_sweep(path).space["train.lr"].corners() == [1e-4, 1e-2]


def test_a_file_or_folder_that_cannot_be_one_is_a_sentence(written: Written, tmp_path: Path) -> None:
    file, _ = written(["colours"], LR)
    for given, sentence in (
        ([tmp_path], "cannot be read (Is a directory)"),
        (["."], "cannot be read (Is a directory)"),
        ([file.rename(tmp_path / "sweep")], "sweep is a file: give a folder by --work"),
    ):
        said = condu("sweep", *given)
        assert (said.code, sentence in said.err) == (2, True), said.err


def test_the_same_tasks_in_another_order_are_another_sweep(written: Written) -> None:
    one, other = (
        written(names, {"vote.k": {"choice": [1, 2]}})[1] for names in (["colours", "places"], ["places", "colours"])
    )
    assert one.terms() != other.terms()


def test_what_a_file_leaves_open(written: Written) -> None:
    _, one = written(["colours"], LR)
    _, two = written(["colours", "stripes"], LR)
    _, vote = written(["colours", "stripes"], K)
    _, own_way = written(["colours"], {"adapter.lr": {"log": [1e-4, 1e-2]}}, session={"method": "rapf"})
    assert [(each.kind, each.goals.names, each.asked) for each in (one, own_way, two, vote)] == [
        ("training", ("accuracy",), "task"),
        ("training", ("last",), "task"),
        ("training", ("last",), "task"),
        ("inference", ("last",), "union"),
    ]
    assert (one.most, vote.most) == (16, 4)  # there are no more than four


def test_the_environment_stands_above_the_file(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_TRAIN__STEPS", "7")
    _, sweep = written(["colours"], LR)
    assert (sweep.config.train.steps, sweep.config.train.batch_size) == (7, 8)


def test_the_best_is_a_file_of_settings_that_says_where_it_comes_from(written: Written, tmp_path: Path) -> None:
    file, sweep = written(["colours"], {**LR, "fusion.tune_rescalers": {"choice": [None, 3]}})
    report = Report(3, (87.5,), {"accuracy": 87.5}, 9, 1.0)
    record = Record(4, {"train.lr": 0.0025, "fusion.tune_rescalers": 3}, (report,), "finished")
    path = tmp_path / "best.yaml"
    write_best(sweep, record, path, str(file), 16)
    config, origin = resolve({}, path)
    assert (config.train.lr, config.fusion.tune_rescalers, config.train.steps) == (0.0025, 3, 9)
    assert config.tasks == sweep.config.tasks
    assert origin["train.lr"] == f"file {path}"
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert all(word in " ".join(comments) for word in (str(file), "trial 4 of 16", "87.50", "34 %"))
    assert set(yaml.safe_load(path.read_text())) == {"tasks", "model", "train", "tracking", "fusion"}


def best(sweep: Sweep, folder: Path, **settings: Any) -> Path:
    path = folder / "best.yaml"
    write_best(sweep, Record(0, settings, (Report(3, (87.5,), {}, 9, 1.0),), "finished"), path, "sweep.yaml", 1)
    return path


def test_a_password_is_not_in_the_best(written: Written, tmp_path: Path) -> None:
    _, sweep = written(["colours"], LR, session={"tracking": "http://bob:secret@host:5000"})
    said = best(sweep, tmp_path).read_text()
    assert "secret" not in said
    assert "give it by --tracking or CONDU_TRACKING" in said
    _, sweep = written(["colours"], LR, session={"tracking": "http://host:5000"})
    assert resolve({}, best(sweep, tmp_path))[0].tracking == "http://host:5000"


def test_the_best_holds_what_the_environment_had(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where it ran; what was searched for stands as it was found."""
    given = {"CONDU_TRAIN__STEPS": "7", "CONDU_SEED": "5", "CONDU_WORKERS": "1", "CONDU_TRAIN__LR": "0.5"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _, sweep = written(["colours"], LR)
    path = best(sweep, tmp_path, **{"train.lr": 0.0025})
    for name in given:
        monkeypatch.delenv(name)
    config, _ = resolve({}, path)
    assert (config.train.steps, config.seed, config.train.lr, config.workers) == (7, 5, 0.0025, None)
