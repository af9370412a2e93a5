"""Two real processes that share every batch (gloo) train as one does, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.methods import registry
from condu_ray.methods.training import Checkpoint, Resume, train_task
from condu_ray.models.clip import Clip

WORKER = Path(__file__).with_name("data_parallel_worker.py")
# An odd batch: the shares, and the parts that accumulation cuts them into, differ from process to process.
GIVEN = {
    "train.steps": 2,
    "train.batch_size": 5,
    "train.accumulate": 3,
    "train.lr": 1e-3,
    "train.checkpoint_seconds": 1e-9,
}


@pytest.fixture(scope="module")
def results(tiny_model_dir: Path, colours: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what the two processes wrote."""
    out = tmp_path_factory.mktemp("two-processes")
    paths = [picture.path for picture in colours.train.pictures]
    given = json.dumps({"pictures": paths, "labels": colours.train.labels.tolist(), "settings": GIVEN})
    command = [sys.executable, str(WORKER), str(tiny_model_dir), given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen([*command, str(rank), "2", str(out)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    return out


def test_both_processes_end_with_the_same_bits(results: Path) -> None:
    first, second = (np.load(results / f"delta-{rank}.npy") for rank in range(2))
    assert first.any()
    assert np.array_equal(first, second)


def test_the_gradient_is_that_of_the_whole_batch(
    results: Path, tiny_clip: Clip, colours: TaskData, settings: Callable[..., SessionConfig]
) -> None:
    config = settings(**{name.replace(".", "__"): value for name, value in GIVEN.items()})
    method = registry.get("condu")
    saved: list[Checkpoint] = []
    resume = Resume(save=lambda checkpoint: saved.append({name: each.copy() for name, each in checkpoint.items()}))
    alone = train_task(tiny_clip, method, method.layout(tiny_clip, config), colours, config, resume=resume)
    expected = np.concatenate([values.ravel() for name, values in saved[0].items() if name.startswith("first/")])
    found = np.load(results / "gradient.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    apart = np.linalg.norm(np.load(results / "delta-0.npy") - alone.delta) / np.linalg.norm(alone.delta)
    assert apart < 0.05


def test_a_bad_loss_in_one_process_stops_both_at_the_same_step(results: Path) -> None:
    told = [(results / f"error-{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]
    assert "the gradient is nan at step 1 of 2" in told[0]
    assert "the loss is nan at step 1 of 2" in told[1]
