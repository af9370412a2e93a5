"""Pretraining on Ray Train with two workers, in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pretraining import Order

JOBS = Path(__file__).resolve().parents[2] / "jobs"
# Workers find what stands beside the script that is run, so it is told where the job's modules are.
SCRIPT = """
import json, sys
from pretrain_default import train
from pretraining import Order, Recipe
given = json.loads(sys.argv[1])
train(Order(**{**given, "recipe": Recipe(**given["recipe"])}), workers=2, gpu=False)
"""


@pytest.mark.slow
def test_two_workers_train_one_model(order: Order, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(JOBS)}
    subprocess.run([sys.executable, script, json.dumps(asdict(order))], check=True, timeout=280, env=environment)
    assert (Path(order.out) / "open_clip_model.safetensors").exists()
    assert not list(Path(order.work).glob("*-of-*.npy")), "the workers' parts were put together"
