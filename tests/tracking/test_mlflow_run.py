"""A version is recorded once, can be loaded back by MLflow, and a server that is gone costs only a warning."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from condu_ray.engine.progress import stage
from condu_ray.errors import ConfigError
from condu_ray.store import Manifest, Store, StoreHeader, TaskCard, create_store
from condu_ray.tracking.matrix import AccuracyMatrix
from condu_ray.tracking.mlflow_run import Tracking, model_name, open_tracking, texts_of, version_alias
from condu_ray.tracking.replay import track

pytestmark = [
    # MLflow's own use of its database library, once, when its first client is made.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    # Of MLflow's own types, once, when it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

LOSSES = {"pets": [(step, 2.0 / (step + 1)) for step in range(5)]}
SETTINGS = {"train": {"steps": 5, "rate": 0.001}, "tasks": ["pets"], "note": "long " * 200}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(tmp_path / "store", StoreHeader(method="condu", model={}, model_sha256="", layout={}))


@pytest.fixture
def tracking(store: Store, empty_database: Path) -> Tracking:
    shutil.copy(empty_database, Path(store.url) / "mlflow.db")
    return open_tracking(None, store.url)


@pytest.fixture
def client(tracking: Tracking) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking.uri, registry_uri=tracking.uri)


@pytest.fixture
def commit(store: Store) -> Callable[[int], Manifest]:
    def make(version: int) -> Manifest:
        card = TaskCard(
            name="pets & co",
            uid=0,
            classes=["cat", "dog"],
            templates=[],
            source="pictures/pets",
            fingerprint="f" * 64,
            method="condu",
            train_key="train-pets",
            learned_in=1,
            pictures={"train": 8, "test": 4},
            figures={"accuracy": 90.0 + version, "fidelity": None},
        )
        manifest = Manifest(
            version=version,
            parent=version - 1 or None,
            kind="learn",
            tasks=[card],
            objects={"u": store.put("key", "u", {"u": np.ones(3, np.float32)})},
            settings=SETTINGS,
            figures={"zero_shot": {"kept": 61.5, "matrix": [[1.0]]}},
            message="pets",
            seconds={"train": 1.5},
        )
        store.commit(manifest)
        return manifest

    return make


def record(tracking: Tracking, manifest: Manifest, pictures: list[Path] | None = None) -> str | None:
    matrix = AccuracyMatrix(["pets"], [[91.0]])
    return tracking.record(manifest, LOSSES, matrix, pictures or [], "condu-ray learn pets --data pictures/pets")


def runs(client: Any) -> list[Any]:
    return list(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def test_a_run_holds_what_the_session_did(
    tracking: Tracking, client: Any, commit: Callable[[int], Manifest], store: Store, tmp_path: Path
) -> None:
    picture = tmp_path / "history.png"
    picture.write_bytes(b"picture")
    manifest = commit(1)
    assert record(tracking, manifest, [picture]) is None
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert run.data.tags["condu.store"] == store.header.id
    assert run.data.tags["condu.version"] == "1"
    assert run.data.tags["mlflow.source.name"] == "condu-ray learn pets --data pictures/pets"
    assert run.data.params["train.steps"] == "5"
    assert run.data.params["tasks"] == '["pets"]'
    expected = {"accuracy/pets _ co": 91.0, "zero_shot/kept": 61.5, "seconds/train": 1.5, "average": 91.0, "last": 91.0}
    assert {name: run.data.metrics.get(name) for name in expected} == expected
    assert "fidelity/pets _ co" not in run.data.metrics
    assert "transfer" not in run.data.metrics
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss/pets")]
    assert curve == LOSSES["pets"]
    files = Path(store.url) / "mlruns" / run.info.run_id / "artifacts"
    assert json.loads((files / "manifest.json").read_text())["version"] == 1
    assert json.loads((files / "accuracy_matrix.json").read_text())["values"] == [[91.0]]
    assert (files / "accuracy_matrix.png").stat().st_size > 1000
    assert (files / "pictures" / "history.png").read_bytes() == b"picture"
    assert not [path for path in files.rglob("*") if path.suffix in (".pkl", ".pickle")]


def test_a_password_in_the_command_is_not_recorded(
    tracking: Tracking, client: Any, commit: Callable[[int], Manifest]
) -> None:
    assert tracking.record(commit(1), {}, None, [], "condu-ray learn --tracking http://bob:secret@host") is None
    (run,), (model,) = runs(client), client.search_model_versions()
    assert run.data.tags["mlflow.source.name"] == model.description == "condu-ray learn --tracking http://(set)@host"


def test_a_version_is_recorded_once(tracking: Tracking, client: Any, commit: Callable[[int], Manifest]) -> None:
    manifest = commit(1)
    for _ in range(2):
        assert record(tracking, manifest) is None
    assert len(runs(client)) == 1
    assert len(client.search_model_versions()) == 1


def test_a_record_that_was_cut_off_is_made_anew(
    tracking: Tracking, client: Any, commit: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from condu_ray.tracking import mlflow_run

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    manifest = commit(1)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_run, "_register", killed)
        with pytest.raises(KeyboardInterrupt):
            record(tracking, manifest)
    assert [run.info.status for run in runs(client)] == ["RUNNING"]
    assert record(tracking, manifest) is None
    assert [run.info.status for run in runs(client)] == ["FINISHED"]
    assert [len(client.get_metric_history(run.info.run_id, "loss/pets")) for run in runs(client)] == [
        len(LOSSES["pets"])
    ]


def test_versions_are_models_that_predict(
    tracking: Tracking,
    client: Any,
    commit: Callable[[int], Manifest],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import mlflow
    import pandas as pd

    from condu_ray.voting import open as opening
    from condu_ray.voting import pictures as answering

    for version in (1, 2):
        assert record(tracking, commit(version)) is None
    opened: list[tuple[str, int]] = []

    def load_classifier(url: str, version: int) -> tuple[str, int]:
        opened.append((url, version))
        return url, version

    def classify_paths(classifier: tuple[str, int], paths: list[str]) -> list[dict[str, Any]]:
        return [{"image": path, "version": classifier[1]} for path in paths]

    monkeypatch.setattr(opening, "load_classifier", load_classifier)
    monkeypatch.setattr(answering, "classify_paths", classify_paths)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)  # put back afterwards
    mlflow.set_tracking_uri(tracking.uri)
    try:
        name = model_name(store.header.id)
        newest = mlflow.pyfunc.load_model(f"models:/{name}@newest")
        assert newest.predict(["a.png", "b.png"]) == [
            {"image": "a.png", "version": 2},
            {"image": "b.png", "version": 2},
        ]
        assert newest.predict(pd.DataFrame({"image": ["c.png"]})) == [{"image": "c.png", "version": 2}]
        assert opened == [(store.url, 2)]
        first = mlflow.pyfunc.load_model(f"models:/{name}@{version_alias(1)}", model_config={"store": "/moved"})
        assert first.predict(["a.png"]) == [{"image": "a.png", "version": 1}]
        assert opened[1:] == [("/moved", 1)]
    finally:
        mlflow.set_tracking_uri(None)


def test_an_older_version_recorded_late_is_not_the_newest(
    tracking: Tracking, client: Any, commit: Callable[[int], Manifest], store: Store
) -> None:
    first, second = commit(1), commit(2)
    assert record(tracking, second) is None
    assert record(tracking, first) is None
    name = model_name(store.header.id)
    tagged = {alias: client.get_model_version_by_alias(name, alias).tags for alias in ("newest", version_alias(1))}
    assert {alias: tags["condu.version"] for alias, tags in tagged.items()} == {"newest": "2", version_alias(1): "1"}


def test_a_model_that_somebody_registered_by_hand_is_left_alone(
    tracking: Tracking, client: Any, commit: Callable[[int], Manifest], store: Store
) -> None:
    name = model_name(store.header.id)
    client.create_registered_model(name)
    client.create_model_version(name, "file:///somewhere/else")
    assert record(tracking, commit(1)) is None
    assert client.get_model_version_by_alias(name, "newest").tags["condu.version"] == "1"


def test_a_server_that_many_share_is_asked_for_the_experiment_of_the_store(
    tracking: Tracking, client: Any, commit: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record(tracking, commit(1)) is None
    for number in range(3):
        client.create_experiment(f"another {number}")
    whole = type(client).search_experiments

    def short(self: Any, *given: Any, **others: Any) -> Any:
        return whole(self, *given, **{**others, "max_results": 2})  # a page, which has room for a thousand

    monkeypatch.setattr(type(client), "search_experiments", short)
    assert tracking.recorded() == {1}


def test_a_store_that_moved_keeps_its_files_with_it(
    tracking: Tracking, commit: Callable[[int], Manifest], store: Store, tmp_path: Path
) -> None:
    assert record(tracking, commit(1)) is None
    before = {path for path in Path(store.url).rglob("*") if "mlruns" in path.parts}
    moved = tmp_path / "moved"
    shutil.copytree(store.url, moved)
    assert record(open_tracking(None, moved), commit(2)) is None
    assert {path for path in Path(store.url).rglob("*") if "mlruns" in path.parts} == before
    assert len(list((moved / "mlruns").iterdir())) == 2


class TestCheck:
    @pytest.fixture
    def server(self) -> Iterator[Callable[[int], str]]:
        """Starts a server that answers every request with the given status; returns its address."""
        started: list[tuple[HTTPServer, threading.Thread]] = []

        def start(status: int) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    self.send_response(status)
                    self.end_headers()

                def log_message(self, *args: Any) -> None:
                    pass

            listening = HTTPServer(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            started.append((listening, thread))
            return f"http://127.0.0.1:{listening.server_address[1]}"

        yield start
        for listening, thread in started:
            listening.shutdown()
            thread.join(timeout=10)
            listening.server_close()

    @pytest.fixture
    def nobody(self) -> str:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{taken.getsockname()[1]}"

    @pytest.mark.parametrize("status", [200, 401, 404])
    def test_a_server_that_answers_is_there(self, server: Callable[[int], str], store: Store, status: int) -> None:
        assert open_tracking(server(status), store.url).check() is None

    @pytest.mark.parametrize("uri", ["http://host:port", "http://a b", "http://a..b", "http://"])
    def test_what_names_no_server_is_told_as_one_that_is_not_there(self, store: Store, uri: str) -> None:
        warning = open_tracking(uri, store.url).check()
        assert warning is not None
        assert warning.startswith(f"the tracking server {uri} cannot be reached (")

    def test_a_server_of_another_kind_is_told_as_one_that_is_not_there(self, store: Store) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def answer() -> None:
                with listening.accept()[0] as caller:
                    caller.recv(1000)
                    caller.sendall(b"220 mail\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            warning = open_tracking(f"http://127.0.0.1:{listening.getsockname()[1]}", store.url).check()
            thread.join()
        assert warning is not None
        assert "cannot be reached (220 mail" in warning

    @pytest.mark.parametrize("uri", ["http://[::1", "http://bob:secret@[::1"])
    def test_a_uri_that_cannot_be_read_is_refused(self, store: Store, uri: str) -> None:
        with pytest.raises(ConfigError, match=r"the tracking URI 'http.* cannot be read .*http://HOST:PORT") as caught:
            open_tracking(uri, store.url)
        assert "secret" not in str(caught.value)

    def test_a_password_in_the_address_is_not_printed(
        self,
        server: Callable[[int], str],
        nobody: str,
        store: Store,
        commit: Callable[[int], Manifest],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        there, away = (url.replace("//", "//bob:se@cret@") for url in (server(401), nobody))
        assert open_tracking(there, store.url).check() is None  # the host is what follows the user
        tracking, shown = open_tracking(away, store.url), nobody.replace("//", "//(set)@")
        with pytest.raises(ConfigError) as caught:
            tracking.recorded()
        with pytest.raises(ConfigError) as listed:
            track(store.url, away, False, stage)
        for said in (tracking.check(), record(tracking, commit(1)), str(caught.value), str(listed.value)):
            assert said is not None and shown in said and "cret" not in said, said

    def test_a_server_that_is_not_there_is_told_before_work_starts(self, nobody: str, store: Store) -> None:
        warning = open_tracking(nobody, store.url).check()
        assert warning is not None
        assert f"tracking server {nobody} cannot be reached" in warning
        assert "`condu-ray track --replay` records later what is missing" in warning

    def test_a_server_that_went_away_costs_a_warning(
        self, nobody: str, store: Store, commit: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        warning = record(open_tracking(nobody, store.url), commit(1))
        assert warning is not None
        assert warning.startswith(f"version 1 is published, but was not recorded at {nobody}")
        assert "condu-ray track --replay" in warning
        assert "\n" not in warning
        assert len(warning) < 400

    @pytest.mark.parametrize("uri", ["./mlruns", "/somewhere/mlruns", "file:///somewhere/mlruns"])
    def test_a_plain_folder_is_refused(self, store: Store, uri: str) -> None:
        with pytest.raises(ConfigError, match="plain folder .*sqlite:////FOLDER/mlflow.db or http://HOST:PORT"):
            open_tracking(uri, store.url).check()

    @pytest.mark.parametrize(
        "uri", ["localhost:5000", "127.0.0.1:5000", "bob:secret@localhost:5000", "my_host:5000/ml"]
    )
    def test_a_server_without_http_is_refused_with_what_to_write(self, store: Store, uri: str) -> None:
        address = uri.removeprefix("bob:secret@")
        with pytest.raises(ConfigError) as caught:
            open_tracking(uri, store.url)
        assert f"'{address}' does not begin with http:// or https://: give http://{address}." in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("uri", ["sqlite:mlflow.db", "sqlite://mlflow.db", "databricks:profile"])
    def test_what_is_no_uri_of_its_kind_is_refused(self, store: Store, uri: str) -> None:
        with pytest.raises(ConfigError, match="none that MLflow takes: give sqlite:////FOLDER/mlflow.db"):
            open_tracking(uri, store.url)

    @pytest.mark.parametrize("uri", ["postgresql+psycopg2://host/db", "databricks://profile", "HTTP://host:5000"])
    def test_other_kinds_of_uri_are_mlflow_s_to_judge(self, store: Store, uri: str) -> None:
        assert open_tracking(uri, store.url).uri == uri

    def test_a_database_in_no_folder_is_refused(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="has no folder .*nowhere"):
            open_tracking(f"sqlite:///{tmp_path}/nowhere/runs.db", store.url).check()
        open_tracking(f"sqlite:///{tmp_path}/runs.db", store.url).check()

    def test_the_default_needs_no_store_yet_and_makes_nothing(self, tmp_path: Path) -> None:
        tracking = open_tracking(None, tmp_path / "store")
        tracking.check()
        assert tracking.uri == f"sqlite:///{tmp_path}/store/mlflow.db"
        assert list(tmp_path.iterdir()) == []


def test_files_that_go_nowhere_cost_a_warning(
    store: Store,
    commit: Callable[[int], Manifest],
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server may name a place for files whose library is not installed, or does not let this user in."""
    from mlflow import MlflowClient

    shutil.copy(empty_database, tmp_path / "mlflow.db")
    MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment(
        model_name(store.header.id), artifact_location="wasbs://box@account.blob.core.windows.net/runs"
    )
    monkeypatch.setitem(sys.modules, "azure", None)
    tracking = replace(open_tracking(None, store.url), uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=None)
    warning = record(tracking, commit(1))
    assert warning is not None and warning.startswith("version 1 is published, but was not recorded at sqlite")
    assert "azure" in warning and "condu-ray track --replay" in warning


def test_a_long_command_is_cut(tracking: Tracking, client: Any, commit: Callable[[int], Manifest]) -> None:
    """Databases other than SQLite refuse descriptions that are longer, for ever."""
    command = "condu-ray learn " + " ".join(
        f"--task task{number}=/a/place/for/pictures/{number}" for number in range(300)
    )
    assert tracking.record(commit(1), {}, None, [], command) is None
    (model,) = client.search_model_versions("")
    assert model.description == command[:5000]
    assert runs(client)[0].data.tags["mlflow.source.name"] == command[:5000]


def test_a_kill_while_the_database_is_made_leaves_none_that_is_half_made(store: Store, tmp_path: Path) -> None:
    tracking, aside = open_tracking(None, store.url), tmp_path / "aside"
    aside.mkdir()
    code = "import sys; from condu_ray.tracking.mlflow_run import client_of; client_of(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, tracking.uri], env={**os.environ, "TMPDIR": str(aside)})
    while process.poll() is None and not any(path.stat().st_size for path in aside.rglob("mlflow.db")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (Path(store.url) / "mlflow.db").exists()
    tracking.prepare()
    assert tracking.recorded() == set()
    assert [path.name for path in Path(store.url).glob("mlflow*")] == ["mlflow.db"]


def test_checking_does_not_wait_for_mlflow(tmp_path: Path) -> None:
    program = (
        "import sys; from condu_ray.tracking.mlflow_run import open_tracking; "
        "open_tracking(None, sys.argv[1]).check(); "
        "print(*sorted({'mlflow', 'matplotlib', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_settings_become_dotted_names() -> None:
    settings = {"train": {"steps": 5, "rates": {"head": 1e-3}}, "task": "pets", "none": None, "empty": {}}
    assert dict(texts_of(settings)) == {
        "train.steps": "5",
        "train.rates.head": "0.001",
        "task": "pets",
        "none": "null",
        "empty": "{}",
    }
