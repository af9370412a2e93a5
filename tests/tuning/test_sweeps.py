"""`condu-ray sweep` on a Ray cluster: Tune, cached answers, kills, failures, test pictures that nobody opens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from command_line import condu
from streams import Stream

from condu_ray.data import open_task
from condu_ray.engine.cluster import connect
from condu_ray.errors import DataError
from condu_ray.tuning import answers
from condu_ray.tuning.records import Scores, Trials
from condu_ray.tuning.settings import Sweep

Written = Callable[..., tuple[Path, Sweep]]
BAD = {"fusion.triggers": "mask", "fusion.tune_rescalers": 3}
DEADLINE = 300.0


@pytest.fixture
def untestable(picture_tasks: dict[str, Path], tmp_path: Path) -> str:
    """A task whose test pictures cannot be read."""
    folder = tmp_path / "colours"
    shutil.copytree(picture_tasks["colours"], folder)
    for path in (folder / "test").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError):
        open_task("colours", folder)
    return str(folder)


def test_a_sweep_of_training_with_a_failure_and_an_unreadable_test_split(
    written: Written, untestable: str, tmp_path: Path, ray_cluster: None
) -> None:
    space = {"fusion.triggers": {"choice": ["mask", "sign"]}, "fusion.tune_rescalers": {"choice": [None, 3]}}
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    session = {"tasks": {"colours": untestable}, "tracking": tracking}
    file, _ = written(["colours"], space, session=session, search="grid")
    free = ray.available_resources().get("CPU")

    said = condu("sweep", file, "--json")

    assert said.code == 0, said.err
    found, folder = said.document, file.with_suffix("")
    assert found["trials"] == {"finished": 3, "stopped": 0, "failed": 1}
    ((failed),) = found["failed"]
    assert "fusion.tune_rescalers = 3 needs sign triggers" in failed["reason"]
    records = Trials(folder).all()
    assert [record.settings for record in records if record.state == "failed"] == [BAD]
    assert found["steps"] == 27
    assert {path.name for path in (folder / "pictures").iterdir()} == {"importance.png", "parallel_coordinates.png"}
    tables = ray.util.placement_group_table().values()
    assert {group["state"] for group in tables} <= {"REMOVED"}
    deadline = time.monotonic() + DEADLINE
    while ray.available_resources().get("CPU") != free and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == free
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["pictures", "trials"]
    assert [path.suffix for path in (folder / "trials").iterdir()] == [".json"] * 4

    runs = nested_runs(tracking)
    assert sorted(run["status"] for run in runs) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]

    before = {path: path.read_bytes() for path in (folder / "trials").iterdir()}
    again = condu("sweep", file, "--json")
    assert again.document == found
    assert {path: path.read_bytes() for path in (folder / "trials").iterdir()} == before
    assert len(nested_runs(tracking)) == 4

    stripes, store = f"stripes={untestable}/train", tmp_path / "store"
    planned = condu("learn", "--config", found["config"], "--store", store, "--task", stripes, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert planned.document["settings"]["train.steps"] == {"value": 9, "from": f"file {found['config']}"}

    file.write_text(file.read_text().replace("steps: 9", "steps: 8"))
    other = condu("sweep", file)
    assert (other.code, "holds a sweep with another session" in other.err) == (2, True)


def nested_runs(uri: str) -> list[dict[str, Any]]:
    from condu_ray.tracking.mlflow_run import client_of

    client = client_of(uri)
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    parents = [run for run in found if "condu.sweep" in run.data.tags]
    assert len(parents) == 1
    assert {artifact.path for artifact in client.list_artifacts(parents[0].info.run_id)} == {
        "best.yaml",
        "importance.png",
        "parallel_coordinates.png",
    }
    parent = parents[0].info.run_id
    return [{"status": run.info.status} for run in found if run.data.tags.get("mlflow.parentRunId") == parent]


def test_asha_ends_trials_that_lag_behind(written: Written, tmp_path: Path, ray_cluster: None) -> None:
    """Rates that move nothing fall behind; two trials at once are enough to compare."""
    rates = {"train.lr": {"choice": [3e-3, 2e-3, 1e-7, 2e-7, 3e-7, 4e-7]}}
    file, _ = written(["colours"], rates, session={"workers": 2}, trials=6)

    said = condu("sweep", file, "--json")

    assert said.code == 0, said.err
    found = said.document
    assert found["trials"]["stopped"] >= 1
    assert found["steps"] < 6 * 9
    assert found["best"]["settings"]["train.lr"] >= 2e-3


def test_settings_of_the_vote_are_searched_and_gone_on_with(
    written: Written, stream: Stream, tmp_path: Path, ray_cluster: None
) -> None:
    names = list(stream.config.tasks)
    space = {"vote.k": {"integer": [1, 3]}, "vote.coverage": {"uniform": [0.3, 0.99]}}
    _, sweep = written(names, space, session={"workers": 1}, trials=40, objectives=["average", "latency"])
    few = sweep.model_copy(update={"trials": 25})
    unseen = lambda done, total, note: None  # noqa: E731

    first = answers.search(few, stream.cached, tmp_path, connect(), unseen)
    both = answers.search(sweep, stream.cached, tmp_path, connect(), unseen)

    assert (len(first), len(both)) == (25, 40)
    assert [record.number for record in both] == list(range(40))
    assert both[:25] == first == Scores(tmp_path).all()[:25]
    one = both[7]
    expected = answers.Rescorer(stream.cached, sweep.config.vote, "union", unseen=True).figures(one.settings)
    assert one.figures == pytest.approx(expected)
    assert one.values == (one.figures["average"], one.figures["latency"])


def sweeping(file: Path) -> subprocess.Popen[str]:
    code = "from condu_ray.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", str(file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


def ended(folder: Path) -> dict[str, bytes]:
    trials = Trials(folder)
    return {str(each.number): trials.path(each.settings).read_bytes() for each in trials.all() if each.ended}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_sweep_that_is_ended_goes_on_and_repeats_nothing(written: Written, sent: signal.Signals, code: int) -> None:
    file, _ = written(["colours"], {"train.lr": {"log": [1e-4, 1e-2]}}, trials=8)
    folder = file.with_suffix("")
    with sweeping(file) as child:
        deadline = time.monotonic() + DEADLINE
        while len(ended(folder)) < 3 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(child.pid, sent)
        child.communicate(timeout=DEADLINE)
    assert child.returncode == code
    assert not (folder / "best.yaml").exists()
    before = ended(folder)
    assert 3 <= len(before) < 8

    again = sweeping(file)
    out, err = again.communicate(timeout=DEADLINE)

    assert again.returncode == 0, err
    after = ended(folder)
    assert {number: after[number] for number in before} == before
    assert len(after) == 8  # by number: none is given twice
    assert sum(json.loads(out)["trials"].values()) == 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_vote_of_a_whole_stream_from_pictures_to_best(written: Written) -> None:
    space = {"vote.router": {"choice": ["lda", "cosine"]}, "vote.union": {"choice": ["own", "joint"]}}
    file, _ = written(["colours", "stripes"], space, objectives=["last"], latency_ms=1000)

    said = condu("sweep", file, "--json")

    assert said.code == 0, said.err
    assert said.document["trials"] == {"finished": 4, "stopped": 0, "failed": 0}
    assert set(said.document["best"]["figures"]) == {"last", "latency"}
