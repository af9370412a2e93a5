"""MLflow can be rebuilt from the store: whatever it lacks is recorded later, once, and is the same."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from command_line import Learned, condu, free_port
from in_process_crew import learn_here, opened, settings

from condu_ray.engine.fold import fold
from condu_ray.engine.forget import forget
from condu_ray.engine.progress import stage
from condu_ray.errors import StoreError
from condu_ray.store import open_store
from condu_ray.store.history import rollback
from condu_ray.tracking import replay
from condu_ray.tracking.mlflow_run import model_name, open_tracking
from condu_ray.tracking.replay import record, track

Folders = dict[str, Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


@pytest.fixture(scope="module")
def stored(tiny_model_dir: Path, picture_tasks: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions that MLflow knows nothing of, the last without a task."""
    config = settings(tmp_path_factory.mktemp("replay") / "store", tiny_model_dir, method="condu")
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    forget(open_store(config.store), "colours")
    return Path(config.store)


def told(uri: str) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
    """What MLflow holds of each version, times aside."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {run.data.tags["condu.version"]: (run.data.metrics, run.data.params) for run in runs}


def test_what_is_missing_is_recorded_once_and_as_it_would_have_been(stored: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(stored, tmp_path / "store"))
    tracking = open_tracking(None, store)
    assert record(open_store(store), tracking, [2], stage, "condu-ray learn") == []
    at_once = told(tracking.uri)["2"]
    assert track(str(store), None, False, stage)["missing"] == [1, 3]
    said = condu("track", "--replay", "--store", store, "--json").document
    assert (said["recorded"], said["missing"]) == ([1, 2, 3], [])
    for name in ("mlflow.db", "mlruns"):  # nothing is lost with them
        shutil.move(store / name, tmp_path / name)
    assert track(str(store), None, True, stage)["missing"] == []
    mirror = told(tracking.uri)
    assert sorted(mirror) == ["1", "2", "3"]
    assert mirror["2"] == at_once
    assert "3 of 3 versions are recorded at sqlite" in condu("track", "--store", store).out


def test_a_version_that_cannot_be_read_keeps_no_other_from_being_recorded(stored: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(stored, tmp_path / "store"))
    (store / "versions" / "00000001.json").write_text("{", encoding="utf-8")
    tracking = open_tracking(None, store)
    assert record(open_store(store), tracking, [2], stage, "condu-ray learn") == []
    assert list(told(tracking.uri)) == ["2"]
    with pytest.raises(StoreError, match=r"00000001.json is not readable"):
        track(str(store), None, True, stage)


def test_versions_that_no_session_made_are_recorded_and_the_newest_is_one(stored: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = Path(shutil.copytree(stored, tmp_path / "store"))
    tracking, opened_store = open_tracking(None, store), open_store(store)
    assert record(opened_store, tracking, [1, 2, 3], stage, "condu-ray learn") == []
    assert rollback(opened_store, 2).version == 4
    assert (folded := fold(opened_store)) is not None and folded.version == 5
    client, name = MlflowClient(tracking.uri, tracking.uri), model_name(opened_store.header.id)

    def newest() -> str:
        return str(client.get_model_version_by_alias(name, "newest").tags["condu.version"])

    assert (track(str(store), None, False, stage)["missing"], newest()) == ([4, 5], "3")
    assert (track(str(store), None, True, stage)["missing"], newest()) == ([], "5")


def test_a_server_that_went_away_is_not_asked_for_every_version(
    stored: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = open_tracking(f"http://127.0.0.1:{port}", stored)
    first, rest = record(open_store(stored), tracking, [1, 2, 3], stage, "condu-ray learn")
    assert first.startswith("version 1 is published, but was not recorded")
    assert rest == "nor was it asked for the 2 versions after it, since it is away."


def test_a_full_disk_for_temporary_files_costs_a_warning(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(replay, "draw_history", full)
    said = record(open_store(stored), open_tracking(None, stored), [2], stage, "condu-ray learn")
    assert said[0].startswith("version 2 is published, but was not recorded (No space left on device)")


def server(port: int, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
        except OSError:
            assert child.poll() is None and time.monotonic() < end, "the tracking server did not start"
            time.sleep(0.2)
        else:
            return child


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_down_for_a_while_loses_nothing(
    learned: Learned, picture_tasks: Folders, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down before the session and at its end: it commits with a warning. Then two drivers replay at once."""
    import signal

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    store, uri = Path(shutil.copytree(learned.store, tmp_path / "store")), f"http://127.0.0.1:{port}"
    given = ["--train.steps=4", "--train.batch-size=8", "--workers=1", "--tracking", uri]
    said = condu("learn", "places", "--data", picture_tasks["places"], "--store", store, *given, "--json")
    assert said.code == 0, said.err
    assert said.document["version"] == 3
    assert said.err.count("condu-ray track --replay") == 2
    refused = condu("track", "--replay", "--store", store, "--tracking", uri)
    assert (refused.code, "cannot be reached" in refused.err) == (2, True)
    child = server(port, tmp_path / "server")
    try:
        command = [sys.executable, "-c", "from condu_ray.cli import main; main()", "track", "--replay"]
        command += ["--store", str(store), "--tracking", uri, "--json"]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outs = [each.communicate(timeout=300)[0] for each in both]
        assert [each.returncode for each in both] == [0, 0], outs
        found = track(str(store), uri, False, stage)
        assert (found["recorded"], found["missing"]) == ([1, 2, 3], [])
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)
