"""What several test folders share. The settings on top must stand before anything imports Ray, MLflow or torch."""

from __future__ import annotations

import os
import secrets

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32))}
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "CONDU_RAY_TEST_GPU" not in os.environ:  # what is promised to the bit is promised of a CPU; see tests/gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import logging
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

import condu_ray  # noqa: F401  (sets what Ray reads when it is imported)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment
    from command_line import Learned

    from condu_ray.models.clip import Clip

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)  # before the name of the group goes into the name of the test
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps all that needs the one Ray cluster in one process of the run, and what serves there at its end: Serve's
    controller, once shut down, comes back as often as somebody's handle asks for it (Ray 2.60)."""
    items.sort(key=lambda item: "serving" in item.path.parts)
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))


TINY: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}
CONVOLUTIONAL: dict[str, Any] = {
    "model_cfg": {
        **TINY["model_cfg"],
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_efficientnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
    },
    "preprocess_cfg": {},
}


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """Makes the folder of a random open_clip model, always the same; returns it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**config["model_cfg"])
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def _load(folder: Path) -> Clip:
    from condu_ray.config import ModelSpec
    from condu_ray.models.load import load

    return load(ModelSpec(name=f"local-dir:{folder}"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random open_clip model (32 px, 32 wide), the same in every run; its name is 'local-dir:FOLDER'."""
    return write_model(tmp_path_factory.mktemp("tiny-clip"), TINY)


@pytest.fixture(scope="session")
def tiny_clip(tiny_model_dir: Path) -> Clip:
    """The base model of `tiny_model_dir`."""
    return _load(tiny_model_dir)


@pytest.fixture(scope="session")
def conv_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model whose image tower is a small EfficientNet: BatchNorm, 1x1 and depthwise convolutions."""
    return write_model(tmp_path_factory.mktemp("conv-clip"), CONVOLUTIONAL)


@pytest.fixture(scope="session")
def conv_clip(conv_model_dir: Path) -> Clip:
    """The base model of `conv_model_dir`."""
    return _load(conv_model_dir)


@pytest.fixture(scope="session")
def residual_clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A random base model whose image tower is a small ResNet of CLIP's own, with its attention pool."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None}
    config = {**TINY, "model_cfg": {**TINY["model_cfg"], "vision_cfg": vision}}
    return _load(write_model(tmp_path_factory.mktemp("residual-clip"), config))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server of this machine: CONDU_RAY_TEST_S3_ENDPOINT, with its credentials in the environment, else moto."""
    if given := os.environ.get("CONDU_RAY_TEST_S3_ENDPOINT"):
        yield given
        return
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ:
            return moto(environ, start)
        with one_at_a_time:  # moto looks and then writes: of two writes at once, both could be made
            return moto(environ, start)

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3_bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Name of a new bucket, which boto3 finds by the environment; the cache of what is read lies in tmp_path."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("CONDU_CACHE", str(tmp_path / "cache"))
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "not-to-be-told"}.items():
        if "CONDU_RAY_TEST_S3_ENDPOINT" not in os.environ:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"condu-{uuid.uuid4().hex[:16]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


TASKS = {
    "colours": ("red", "green", "blue"),
    "stripes": ("across", "upright", "slanted"),
    "places": ("corner", "middle", "edge"),
}
TRAIN_EACH, TEST_EACH, SIDE = 12, 6, 32


@pytest.fixture(scope="session")
def picture_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny tasks of 3 classes as image folders: name -> folder with train/ and test/; always the same bytes."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def write_pictures(root: Path) -> dict[str, Path]:
    """Makes the folders of `picture_tasks` below `root`."""
    for task, classes in TASKS.items():
        for label, name in enumerate(classes):
            for number in range(TRAIN_EACH + TEST_EACH):
                part = "train" if number < TRAIN_EACH else "test"
                file = root / task / part / name / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(task, label, number)).save(file)
    return {task: root / task for task in TASKS}


def draw(task: str, label: int, number: int) -> np.ndarray:
    """One picture u8[SIDE, SIDE, 3]: what tells the classes apart, with noise drawn from `number`."""
    random = np.random.RandomState(1000 * list(TASKS).index(task) + 100 * label + number)
    pixels = np.full((SIDE, SIDE, 3), 60.0)
    row, column = np.mgrid[:SIDE, :SIDE]
    if task == "colours":
        pixels[..., label] += 120
    elif task == "stripes":
        pixels += 100 * (((row, column, row + column)[label] // 4) % 2)[..., None]
    else:
        top, left = ((0, 0), (12, 12), (0, 12))[label]
        pixels[top : top + 8, left : left + 8] += 140
    return np.clip(pixels + random.uniform(-25, 25, pixels.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for the whole run, which engine.cluster.connect joins; with more logical cores than there are."""
    import ray

    from condu_ray.engine.cluster import PRIVATE

    os.environ |= PRIVATE
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="condu-ray",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def learned(
    tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Learned:
    """A store with two versions; tests that change it take a copy."""
    from command_line import Learned, condu

    store, tasks = tmp_path_factory.mktemp("learned") / "store", ["colours", "stripes"]
    given = [f"--task={name}={picture_tasks[name]}" for name in tasks]
    settings = ["--model", f"local-dir:{tiny_model_dir}", "--train.steps=4", "--train.batch-size=8"]
    settings += ["--train.towers=image", "--workers=2"]
    said = condu("learn", *given, *settings, "--store", store, "--json")
    assert said.code == 0, said.err
    return Learned(store, said.document, tasks)
