"""Pretraining on Ray Train with two workers, in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pretrain_default import check_targets, configuration
from pretraining import Order

from condu_ray.errors import ConfigError

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
    command = [sys.executable, script, json.dumps(asdict(order))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    for phase in ("text", "image"):
        assert re.search(rf"^[\d:]{{8}} {phase}: done, \d+ steps", done.stderr, re.MULTILINE), done.stderr
    assert (Path(order.out) / "open_clip_model.safetensors").exists()
    assert not list(Path(order.work).glob("*-of-*.npy")), "the workers' parts were put together"


@pytest.mark.parametrize(
    ("text", "why"), [('{"embed_dim": 32}', "holds no model_cfg"), ("[]", "holds no model_cfg"), ("{", "JSON")]
)
def test_a_configuration_that_open_clip_cannot_build_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        configuration(path)


def test_targets_that_lack_words_of_the_generated_world_are_refused_before_training(order: Order) -> None:
    folder = Path(order.text_targets)
    check_targets(folder)
    names = json.loads((folder / "names.json").read_text())
    names["vocab_target256"][-1] = "else"
    (folder / "names.json").write_text(json.dumps(names))
    with pytest.raises(ConfigError, match=r"lacks words.*pretrain_sources"):
        check_targets(folder)
    (folder / "text_targets.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="holds no targets"):
        check_targets(folder)
