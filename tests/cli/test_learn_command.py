"""`condu-ray learn`: what it prints, what it records, where settings come from, and that a plan writes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Learned, condu, process
from in_process_crew import named_accuracy

from condu_ray.store import open_store
from condu_ray.tracking.mlflow_run import model_name

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_of_a_session(learned: Learned) -> None:
    said = learned.said
    assert list(said) == ["data", "made", "version", "tasks", "seconds", "pictures"]
    assert (said["made"], said["version"]) == ([1, 2], 2)
    assert [each["name"] for each in said["data"]] == [each["name"] for each in said["tasks"]] == learned.tasks
    assert said["data"][0]["classes"] == ["blue", "green", "red"]
    assert set(said["seconds"]["1"]) >= {"train", "features", "fuse", "evaluate"}
    figures = said["tasks"][0]["figures"]
    assert set(figures) >= {"zero_shot", "before", "own", "expert", "gain_kept", "relative_l2", "cosine"}


def test_given_again_there_is_nothing_to_do(learned: Learned, picture_tasks: dict[str, Path]) -> None:
    given = [f"--task={name}={picture_tasks[name]}" for name in learned.tasks]
    given += ["--train.steps=4", "--train.batch-size=8", "--store", str(learned.store)]
    before = [path.stat().st_mtime_ns for path in sorted(learned.store.rglob("*.safetensors"))]
    said = condu("learn", *given)
    assert said.code == 0
    assert "nothing to do: version 2 holds these tasks already" in said.out
    assert "colours: 3 classes, 36 pictures to train on (12 to 12 a class), 18 to test on" in said.out
    assert condu("learn", *given, "--json").document["made"] == []
    assert [path.stat().st_mtime_ns for path in sorted(learned.store.rglob("*.safetensors"))] == before


def test_evaluate_says_how_often_the_answer_is_right(learned: Learned) -> None:
    found = condu("evaluate", "--store", learned.store, "--json").document
    assert list(found) == ["version", "labels", "tasks", "mean"]
    assert [list(row) for row in found["tasks"]] == [["name", "pictures", "accuracy"]] * 2
    assert {row["name"]: row["accuracy"] for row in found["tasks"]} == pytest.approx(named_accuracy(str(learned.store)))


# --- tracking


def test_each_version_is_a_run_and_a_model(learned: Learned) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{learned.store}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name = model_name(open_store(learned.store).header.id)
    (experiment,) = [each for each in client.search_experiments() if each.name == name]
    runs = {run.data.tags["condu.version"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"1", "2"}
    last = runs["2"]
    assert last.info.status == "FINISHED"
    assert last.data.params["train.steps"] == "4"
    assert last.data.params["method"] == "condu-sign"
    assert last.data.metrics["expert/stripes"] == learned.said["tasks"][1]["figures"]["expert"]
    assert {"average", "last", "seconds/fuse"} <= set(last.data.metrics)
    assert len(client.get_metric_history(last.info.run_id, "loss/stripes")) == 4
    files = {each.path for each in client.list_artifacts(last.info.run_id)}
    assert {"manifest.json", "accuracy_matrix.json", "accuracy_matrix.png", "model", "pictures"} <= files


def test_mlflow_loads_a_version_that_predicts(learned: Learned, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    uri = f"sqlite:///{learned.store}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    name = model_name(open_store(learned.store).header.id)
    said = mlflow.pyfunc.load_model(f"models:/{name}@newest").predict([str(picture)])
    assert said == condu("predict", picture, "--store", learned.store, "--json").document


# --- plan and settings


def test_a_plan_writes_nothing(tmp_path: Path, tiny_model_dir: Path, picture_tasks: dict[str, Path]) -> None:
    given = ["colours", "--data", picture_tasks["colours"], "--model", f"local-dir:{tiny_model_dir}"]
    plan = condu("learn", *given, "--store", tmp_path / "store", "--dry-run", "--json").document
    assert not (tmp_path / "store").exists()
    assert (plan["store_exists"], plan["newest_version"]) == (False, None)
    assert plan["tasks"] == [{"name": "colours", "action": "learn", "steps": 100, "learning_rate": 5e-4}]
    need = plan["need"]
    assert need["parameters"] > need["fused"] > 0
    assert all(need[name] > 0 for name in ("worker", "fusion", "scorer", "version", "passing"))
    text = condu("learn", *given, "--store", tmp_path / "store", "--dry-run").out
    assert "will be made" in text
    assert "train.batch_size" in text


def test_a_plan_for_a_store_knows_what_is_learned(store: Path, picture_tasks: dict[str, Path]) -> None:
    tasks = [f"--task={name}={picture_tasks[name]}" for name in ("colours", "places")]
    given = ["--train.steps=4", "--train.batch-size=8", "--store", store, "--dry-run", "--json"]
    plan = condu("learn", *tasks, *given).document
    assert plan["newest_version"] == 2
    assert [each["action"] for each in plan["tasks"]] == ["already learned", "learn"]
    assert plan["settings"]["train.towers"] == {"value": "image", "from": "store"}


def test_an_option_beats_the_environment_which_beats_the_file(
    tmp_path: Path, tiny_model_dir: Path, picture_tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "session.yaml"
    file.write_text(
        f"model: local-dir:{tiny_model_dir}\ntasks:\n  colours: {picture_tasks['colours']}\n"
        "train:\n  steps: 11\n  batch_size: 11\n  warmup: 0.3\n"
    )
    monkeypatch.setenv("CONDU_TRACKING", "http://me:hunter2@tracking:5000")
    monkeypatch.setenv("CONDU_TRAIN__STEPS", "22")
    monkeypatch.setenv("CONDU_TRAIN__BATCH_SIZE", "22")
    plan = condu("learn", "--config", file, "--train.steps=33", "--store", tmp_path / "s", "--dry-run", "--json")
    found = plan.document["settings"]
    assert "hunter2" not in plan.out
    assert found["train.steps"] == {"value": 33, "from": "option"}
    assert found["train.batch_size"] == {"value": 22, "from": "environment"}
    assert found["train.warmup"] == {"value": 0.3, "from": f"file {file}"}
    assert found["train.label_smoothing"] == {"value": 0.2, "from": "default"}
    assert plan.document["tasks"][0]["steps"] == 33


def test_more_workers_than_cores_are_refused_and_no_store_is_made(
    tmp_path: Path, tiny_model_dir: Path, picture_tasks: dict[str, Path], ray_cluster: None
) -> None:
    given = ["--model", f"local-dir:{tiny_model_dir}", "--workers", "64", "--parallel", "data"]
    said = condu("learn", "colours", "--data", picture_tasks["colours"], "--store", tmp_path / "new", *given)
    assert said.code == 2
    assert "64 workers need 64 CPU cores, the cluster has 4: use --workers 4" in said.err
    assert not (tmp_path / "new").exists()


# --- the job


def test_the_job_does_what_learn_does(tmp_path: Path, tiny_model_dir: Path, picture_tasks: dict[str, Path]) -> None:
    """As a process with a cluster of its own; zero-shot trains nothing, so it is quick."""
    given = ["--model", f"local-dir:{tiny_model_dir}", "--method", "zero-shot", "--tracking", "off", "--workers", "1"]
    store = tmp_path / "store"
    command = [sys.executable, ROOT / "jobs" / "session.py", "colours", "--data", picture_tasks["colours"], *given]
    done = subprocess.run(
        [*map(str, command), "--store", store, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["message"] for row in condu("versions", "--store", store, "--json").document] == ["learned colours"]
    assert condu("predict", picture_tasks["colours"] / "test" / "red", "--store", store).code == 0


def test_a_command_that_is_wrong_leaves_a_process_with_code_2(tmp_path: Path) -> None:
    said = process("learn", "x", "--data", tmp_path / "nowhere", "--store", tmp_path / "store")
    assert (said.code, said.out) == (2, "")
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
