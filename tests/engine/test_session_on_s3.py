"""A session whose store is in a bucket does what it does in a folder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import boto3
import pytest
from command_line import condu, process
from in_process_crew import contents, files_of, learn_here, opened, settings

from condu_ray.engine.forget import forget
from condu_ray.engine.train import _storage
from condu_ray.engine.work import checkpoints
from condu_ray.errors import ConfigError
from condu_ray.store import open_store
from condu_ray.store.history import rollback
from condu_ray.tracking.mlflow_run import open_tracking

Folders = dict[str, Path]


def test_the_same_versions_and_bytes_as_in_a_folder(
    s3_bucket: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    stores = (str(tmp_path / "store"), f"s3://{s3_bucket}/store")
    for url in stores:
        config = settings(url, tiny_model_dir, train__checkpoint_seconds=1e-6)
        learn_here(config, opened(picture_tasks, "colours", "stripes"))
        assert learn_here(config, opened(picture_tasks, "stripes")) == []
        store = open_store(url)
        forget(store, "colours")
        rollback(store, 1)
        store.gc(in_use_s=0)
    there, here = (contents(url) for url in stores)
    assert there == here
    assert [path for path in files_of(stores[1]) if path.startswith(("work/", "marks/", "gc/", "probe/"))] == []


def test_what_reads_a_store_reads_a_bucket(
    s3_bucket: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    url = f"s3://{s3_bucket}/store"
    learn_here(settings(url, tiny_model_dir), opened(picture_tasks, "colours"))
    picture = next((picture_tasks["colours"] / "test").rglob("*.png"))
    assert condu("predict", picture, "--store", url, "--json").document[0]["version"] == 1
    assert condu("tasks", "--store", url, "--json").document[0]["name"] == "colours"
    found = condu("doctor", "--store", url, "--json").document
    assert (found["store"]["url"], found["store"]["damaged"]) == (url, {})
    assert "not-to-be-told" not in str(found)
    plan = condu("learn", "x", "--data", picture_tasks["places"], "--store", url, "--dry-run", "--json").document
    assert (plan["store"], plan["store_exists"]) == (url, True)


def test_mlflow_needs_a_place_of_its_own() -> None:
    with pytest.raises(ConfigError, match="give --tracking URI, or --tracking off"):
        open_tracking(None, "s3://bucket/store")
    assert open_tracking("http://127.0.0.1:5000", "s3://bucket/store").store == "s3://bucket/store"


def test_ray_train_keeps_its_notes_beside_without_credentials(s3_bucket: str, tmp_path: Path) -> None:
    import pickle

    assert _storage(str(tmp_path)) == {"storage_path": str(tmp_path)}
    found = _storage(f"s3://{s3_bucket}/store/work/run")
    assert found["storage_path"] == f"{s3_bucket}/store/work/run"
    assert b"not-to-be-told" not in pickle.dumps(found["storage_filesystem"])


@pytest.mark.parametrize("where", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "file"])
def test_ray_train_asks_the_server_that_the_store_is_on(
    where: str, s3_bucket: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever boto3 found its address: the store was reached, and the training then asked AWS for its bucket."""
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it has read the file
    if where == "file":
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {s3_endpoint}\n", encoding="utf-8")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    else:
        monkeypatch.setenv(where, s3_endpoint)
    (tmp_path / "authority.pem").touch()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    given = _storage(f"s3://{s3_bucket}/store/work/run")["storage_filesystem"].__reduce__()[1][0]
    host = s3_endpoint.removeprefix("http://")
    assert (given["scheme"], given["endpoint_override"], given["region"]) == ("http", host, "us-east-1")
    assert given["tls_ca_file_path"] == str(tmp_path / "authority.pem")


def test_ray_train_asks_aws_where_no_other_server_is_named(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    given = _storage(f"s3://{s3_bucket}/store/work/run")["storage_filesystem"].__reduce__()[1][0]
    assert (given["scheme"], given["endpoint_override"]) == ("https", "")


def test_checkpoints_cost_no_more_than_their_share(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that takes long to write to gets fewer."""
    from types import SimpleNamespace

    from condu_ray.engine import work

    clock, saved = [0.0], list[float]()
    store = SimpleNamespace(load_work=lambda *given: None)

    def slow(key: str, name: str, checkpoint: object) -> None:
        saved.append(clock[0])
        clock[0] += 1.0

    store.save_work = slow
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    resume = checkpoints(store, "key")  # type: ignore[arg-type]
    for _ in range(100):
        clock[0] += 1.0
        resume.save({})
    assert saved[0] == 1.0
    assert all(later - earlier >= 1 / work.CHECKPOINT_SHARE for earlier, later in pairwise(saved))
    assert len(saved) >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_with_a_bucket_on_ray(
    s3_bucket: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    url = f"s3://{s3_bucket}/store"
    given = [f"--task={name}={picture_tasks[name]}" for name in ("colours", "stripes")]
    given += ["--model", f"local-dir:{tiny_model_dir}", "--train.steps=4", "--train.batch-size=8"]
    given += ["--train.towers=image", "--workers=2", "--cpus-per-worker=1"]
    given += ["--tracking=off", "--store", url, "--json"]
    said = process("learn", *given)
    assert said.code == 0, said.err
    assert said.document["made"] == [1, 2]
    here = settings(tmp_path / "here", tiny_model_dir)
    learn_here(here, opened(picture_tasks, "colours", "stripes"), threads=1)
    open_store(url).gc(in_use_s=0)
    open_store(here.store).gc(in_use_s=0)
    assert contents(url) == contents(here.store)
