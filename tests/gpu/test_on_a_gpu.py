"""A GPU learns and answers what a CPU does, to rounding, and is used where there is one.

Only on a machine that has one: CONDU_RAY_TEST_GPU=1 uv run pytest tests/gpu
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from command_line import condu, free_port, process
from in_process_crew import contents, learn_here, opened, settings
from numpy.typing import NDArray
from trainings import first_gradient

from condu_ray.catalogue import METHODS, info
from condu_ray.config import ModelSpec, ServeConfig
from condu_ray.data.loading import PictureSet
from condu_ray.methods import registry
from condu_ray.methods.objective import precision
from condu_ray.methods.training import train_task
from condu_ray.models.clip import Clip
from condu_ray.models.load import load
from condu_ray.serving.start import serving
from condu_ray.store import open_store
from condu_ray.voting.open import base_of, load_classifier

pytestmark = [
    pytest.mark.skipif("CONDU_RAY_TEST_GPU" not in os.environ, reason="needs a GPU: CONDU_RAY_TEST_GPU=1"),
    pytest.mark.xdist_group("ray"),
]

Folders = dict[str, Path]
SYSTEMS = pytest.mark.parametrize("method", sorted(METHODS))
SHORT = {"adapter__epochs": 2, "adapter__batch_size": 12, "memory__per_epoch": 60, "train__lr": 1e-3}


@pytest.fixture(scope="module")
def model_dirs(tiny_model_dir: Path, conv_clip: Clip) -> dict[str, Path]:
    return {"transformer": tiny_model_dir, "convolutional": Path(conv_clip.spec.name.removeprefix("local-dir:"))}


TOWERS = pytest.mark.parametrize("tower", ["transformer", "convolutional"])


def on(device: str, folder: Path) -> Clip:
    return load(ModelSpec(name=f"local-dir:{folder}"), device)


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@TOWERS
def test_the_base_model_sees_what_it_sees_on_a_cpu(
    model_dirs: dict[str, Path], picture_tasks: Folders, tower: str
) -> None:
    (task,) = opened(picture_tasks, "stripes")
    clips = [on(device, model_dirs[tower]) for device in ("cpu", "cuda")]
    assert clips[0].sha256 == clips[1].sha256
    assert clips[1].device.type == "cuda"
    pixels = torch.stack([PictureSet(task.test, clips[0].eval_transform)[i][0] for i in range(6)])
    with torch.no_grad():
        seen = [clip.features(pixels) for clip in clips]
        texts = [clip.texts(["a photo of a cat", "stripes"]) for clip in clips]
    for here, there in [*zip(*seen, strict=True), tuple(texts)]:
        assert torch.allclose(here, there.cpu(), rtol=0.02, atol=0.005)  # TF32 has ten bits


@TOWERS
@pytest.mark.parametrize("method", ["condu", "condu-lora"])
@pytest.mark.parametrize(("asked", "least"), [("fp32", 0.999), ("auto", 0.97)])
def test_a_step_goes_where_a_cpu_would_go(
    model_dirs: dict[str, Path],
    picture_tasks: Folders,
    tmp_path: Path,
    tower: str,
    method: str,
    asked: str,
    least: float,
) -> None:
    given = {"lora__targets": "linear"} if (tower, method) == ("convolutional", "condu-lora") else {}
    (task,) = opened(picture_tasks, "colours")
    found = []
    for device in ("cpu", "cuda"):
        config = settings(
            tmp_path, model_dirs[tower], method=method, train__precision=asked, train__checkpoint_seconds=1e-6, **given
        )
        found.append(first_gradient(on(device, model_dirs[tower]), task, config))
    assert cosine(*found) > least


def test_half_precision_is_used_where_it_is_not_asked_otherwise(tiny_model_dir: Path, tmp_path: Path) -> None:
    for asked, expected in {"auto": torch.bfloat16, "fp32": torch.float32}.items():
        with precision(on("cuda", tiny_model_dir), settings(tmp_path, tiny_model_dir, train__precision=asked))():
            assert torch.nn.functional.linear(*torch.ones(2, 4, 4, device="cuda")).dtype == expected


@SYSTEMS
def test_each_system_learns_and_answers_on_a_gpu(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, method: str
) -> None:
    own = {"dmc__prompt_steps": 4} if "dmc" in info(method).reads else {}
    config = settings(tmp_path / "store", tiny_model_dir, method=method, **SHORT, **own)
    learn_here(config, opened(picture_tasks, "colours", "stripes"), device="cuda")
    header = open_store(config.store).header
    (task,) = opened(picture_tasks, "stripes")
    here, there = (load_classifier(config.store, clip=base_of(header, device)) for device in ("cpu", "cuda"))
    pixels = torch.stack([PictureSet(task.test, here.clip.eval_transform)[i][0] for i in range(12)])
    for asked in ({"task": "stripes"}, {}, {"labels": ["red", "across", "a cat"]}):
        shares = [
            [
                {(label.task, label.name): share for label, share in answer.ranked}
                for answer in each.classify(pixels, **asked)
            ]
            for each in (here, there)
        ]
        for one, other in zip(*shares, strict=True):
            assert one == pytest.approx(other, abs=0.03)


@pytest.mark.parametrize("precision_asked", ["fp32", "bf16"])
@TOWERS
def test_the_same_gpu_gives_the_same_bits(
    model_dirs: dict[str, Path], picture_tasks: Folders, tmp_path: Path, tower: str, precision_asked: str
) -> None:
    (task,) = opened(picture_tasks, "colours")
    config = settings(tmp_path, model_dirs[tower], train__precision=precision_asked, train__steps=12)
    method, clip = registry.get("condu"), on("cuda", model_dirs[tower])
    one, same = (train_task(clip, method, method.layout(clip, config), task, config).delta for _ in range(2))
    assert one.tobytes() == same.tobytes()


def session(model: Path, folders: Folders, store: Path, *placed: str) -> dict[str, Any]:
    """Learns two tasks on Ray; returns the digests of their magnitudes."""
    given = [f"--task={name}={folders[name]}" for name in ("colours", "stripes")]
    given += ["--model", f"local-dir:{model}", "--train.steps=4", "--train.batch-size=8", "--tracking=off"]
    said = process("learn", *given, *placed, "--store", store, "--json")
    assert said.code == 0, said.err
    assert said.document["made"] == [1, 2]
    return {name: sha for name, sha in contents(store).items() if "magnitudes" in name}


@pytest.fixture(scope="module")
def without_a_gpu(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return session(tiny_model_dir, picture_tasks, tmp_path_factory.mktemp("cpu") / "store", "--gpu=no")


@pytest.mark.parametrize("placed", [[], ["--gpus-per-worker=0.5"], ["--parallel=data"]])
def test_a_session_on_ray_uses_the_gpu(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, without_a_gpu: dict[str, Any], placed: list[str]
) -> None:
    """Also with two workers on one GPU, and with a group that shares each task. Half precision tells them apart."""
    found = session(tiny_model_dir, picture_tasks, tmp_path / "store", *placed)
    assert found
    assert not set(found.values()) & set(without_a_gpu.values())


def test_serve_answers_from_a_gpu(
    ray_cluster: None, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    picture = next((picture_tasks["stripes"] / "test").rglob("*.png"))
    with serving(ServeConfig(store=config.store, port=free_port(), cpus=0.01, gpus=0.5)) as url:
        said = httpx.post(f"{url}/v1/predict", files={"image": picture.read_bytes()}, timeout=60)
        assert said.status_code == 200, said.text


def test_predict_and_drift_say_on_a_gpu_what_they_say_on_a_cpu(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    folder = picture_tasks["stripes"] / "test"
    shares, similarities = [], []
    for asked in ([], ["--gpu=no"]):
        answers = condu("predict", folder, *asked, "--store", config.store, "--json").document
        shares.append([{(each["task"], each["label"]): each["probability"] for each in a["labels"]} for a in answers])
        seen = condu("drift", "--data", folder, *asked, "--store", config.store, "--json").document
        similarities.append({row["name"]: row["similarity"] for row in seen["tasks"] if row["pictures"]})
    for one, other in zip(*shares, strict=True):
        assert one == pytest.approx(other, abs=0.03)
    assert similarities[0] == pytest.approx(similarities[1], abs=0.01)
