"""What several test folders share. The settings on top must stand before anything imports Ray, MLflow or torch."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import condu_ray  # noqa: F401  (sets what Ray reads when it is imported)

if TYPE_CHECKING:
    from condu_ray.models.clip import Clip

TINY = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random open_clip model (32 px, 32 wide), the same in every run; its name is 'local-dir:FOLDER'."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny-clip")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**TINY["model_cfg"])
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tiny_model_dir: Path) -> Clip:
    """The base model of `tiny_model_dir`."""
    from condu_ray.config import ModelSpec
    from condu_ray.models.load import load

    return load(ModelSpec(name=f"local-dir:{tiny_model_dir}"))
