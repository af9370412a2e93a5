"""A pretraining order small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_world import WORDS
from PIL import Image
from pretraining import Order, Recipe
from safetensors.torch import save_file

NAMES = ("apple", "boat", "cloud", "door", "engine", "forest", "garden", "house", "island", "jacket", "kettle", "lamp")
TRANSFORMER = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def _targets(folder: Path, width: int) -> Path:
    names = [*NAMES, *WORDS]
    vectors = torch.randn(len(names), width, generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    save_file({"vocab_target256": vectors}, folder / "text_targets.safetensors")
    (folder / "names.json").write_text(
        json.dumps({"vocab_target256": names, "common": list(WORDS), "head": len(names)})
    )
    return folder


@pytest.fixture
def order(tmp_path: Path) -> Order:
    """A transformer that starts from nothing, two classes of plain pictures, a second a phase."""
    for name, colour in (("night", 20), ("day", 230)):
        for k in range(30):
            path = tmp_path / "images" / "train" / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(k).integers(-15, 15, (40, 32, 3))
            Image.fromarray((colour + noise).astype(np.uint8)).save(path)
            if k < 4:
                test = tmp_path / "images" / "test" / name / f"{k}.png"
                test.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((colour - noise).astype(np.uint8)).save(test)
    return Order(
        config=TRANSFORMER,
        images=str(tmp_path / "images"),
        trunk=None,
        text_targets=str(_targets(tmp_path / "targets", 32)),
        minutes_text=0.02,
        minutes_image=0.03,
        work=str(tmp_path / "work"),
        out=str(tmp_path / "out"),
        seed=0,
        compiled=False,
        recipe=Recipe(world_pictures=64, image_batch=16, world_batch=4, text_batch=24),
    )
