"""What users see, as lists: a change of a command, a setting, a method or a shipped file has to be made here too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
import yaml
from command_line import process
from pydantic import BaseModel

from condu_ray.catalogue import METHODS, MethodName
from condu_ray.cli import app
from condu_ray.config import ServeConfig, SessionConfig, fields
from condu_ray.sources import resolve, resolve_serving

ROOT = Path(__file__).parents[1]

COMMANDS = [
    "learn",
    "sweep",
    "predict",
    "serve",
    "tasks",
    "versions",
    "show",
    "diff",
    "rollback",
    "forget",
    "merge",
    "export",
    "evaluate",
    "drift",
    "track",
    "methods",
    "gc",
    "doctor",
    "demo",
]

SETTINGS = [
    "store",
    "tasks",
    "method",
    "model",
    "pretrained",
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "train.lr",
    "train.warmup",
    "train.weight_decay",
    "train.label_smoothing",
    "train.towers",
    "train.batch_norm",
    "train.precision",
    "train.checkpoint_seconds",
    "train.loader_processes",
    "lora.rank",
    "lora.targets",
    "lora.mode",
    "lora.seed",
    "fusion.granularity",
    "fusion.triggers",
    "fusion.tune_rescalers",
    "fusion.shards",
    "adapter.basis",
    "adapter.weights",
    "adapter.mix_bias",
    "adapter.calibration",
    "adapter.mix",
    "adapter.share",
    "adapter.share_start",
    "adapter.share_end",
    "adapter.share_sessions",
    "adapter.share_pull",
    "adapter.init",
    "adapter.epochs",
    "adapter.batch_size",
    "adapter.lr",
    "adapter.hinge",
    "adapter.hinge_distance",
    "adapter.hinge_margin",
    "adapter.hinge_pairs",
    "adapter.distillation",
    "adapter.temperature",
    "memory.covariance",
    "memory.shrinkage",
    "memory.gamma",
    "memory.per_epoch",
    "memory.discriminant",
    "dmc.rank",
    "dmc.shared_prompt",
    "dmc.task_prompt",
    "dmc.distillation",
    "dmc.prompt_steps",
    "dmc.prompt_lr",
    "dmc.replay",
    "dmc.classes_per_step",
    "dmc.memory_calibration",
    "dmc.shrinkage",
    "dmc.strength",
    "dmc.compared",
    "vote.k",
    "vote.router",
    "vote.combine",
    "vote.average",
    "vote.temperature",
    "vote.base_weight",
    "vote.adaptive",
    "vote.coverage",
    "vote.gap",
    "vote.prototypes",
    "vote.union",
    "vote.within",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "node_wait_seconds",
    "parallel",
    "gpu",
    "seed",
    "test_share",
    "eval_pictures",
    "tracking",
]

SERVE_SETTINGS = [
    "store",
    "host",
    "port",
    "token",
    "version",
    "shadow_version",
    "shadow_share",
    "replicas",
    "expert_replicas",
    "fronts",
    "cpus",
    "gpus",
    "precision",
    "experts",
    "versions",
    "poll_seconds",
    "batch",
    "batch_wait_ms",
    "queue",
    "timeout_seconds",
    "body_mb",
    "pictures",
    "megapixels",
    "labels",
    "origins",
]

CONFIGS = [
    ".github/ISSUE_TEMPLATE/bug.yml",
    ".pre-commit-config.yaml",
    "clusters/aws.yaml",
    "clusters/grafana-serving.json",
    "clusters/kuberay/raycluster.yaml",
    "clusters/kuberay/rayjob.yaml",
    "clusters/kuberay/rayservice.yaml",
    "clusters/serve.yaml",
    "condu_ray/models/shipped/open_clip_config.json",
]

# Packages that cost seconds to import: help must not wait for them.
HEAVY = ("torch", "ray", "open_clip", "mlflow", "matplotlib", "sklearn", "torchvision", "numpy")

HELP = """
import contextlib, io, sys
from condu_ray.cli import main

for command in sys.argv[1:]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([command, "--help"])
    except SystemExit as end:
        assert not end.code, (command, end.code)
    assert "Usage: condu-ray " + command in said.getvalue(), said.getvalue()
print(*sys.modules)
"""


def test_the_commands() -> None:
    assert list(typer.main.get_command(app).commands) == COMMANDS  # type: ignore[attr-defined]  # it is a group


def test_help_of_every_command_works_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(set(done.stdout.split()) & set(HEAVY)) == []


def test_the_settings() -> None:
    assert [name for name, _ in fields()] == SETTINGS
    assert [name for name, _ in fields(ServeConfig)] == SERVE_SETTINGS


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, info in [*fields(), *fields(ServeConfig)] if not info.description] == []


@pytest.mark.parametrize(("command", "settings"), [("learn", SessionConfig), ("serve", ServeConfig)])
def test_help_says_what_each_setting_may_be_and_is(command: str, settings: type[BaseModel]) -> None:
    lines = [line for line in process(command, "--help", COLUMNS="400").out.splitlines() if line.startswith("│ --")]
    said = {line.split()[1]: line for line in lines}
    for name, info in fields(settings):
        if name in ("tasks", "token"):  # --task; of the environment only
            continue
        line = said[f"--{name.replace('_', '-')}"]
        choices = [each for each in (info.annotation, *get_args(info.annotation)) if get_origin(each) is Literal]
        assert not choices or "|".join(get_args(choices[0])) in line
        if info.default not in (None, ()) and not isinstance(info.default, bool):
            assert f"[default: {info.default}" in line


def test_every_command_but_the_server_answers_a_program() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    without = [name for name, each in commands.items() if not any("--json" in given.opts for given in each.params)]
    assert without == ["serve"]


def test_every_method_can_be_chosen() -> None:
    assert list(METHODS) == list(get_args(MethodName))


def tracked() -> list[str]:
    """Paths of the files that belong to the project; what its user writes beside them does not."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


def test_every_shipped_config_is_read() -> None:
    found = [name for name in tracked() if name.endswith((".json", ".yaml", ".yml")) and not name.startswith("tests/")]
    assert found == CONFIGS
    for name in found:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        assert isinstance(content, dict), name
        assert content, name
        if name == "clusters/serve.yaml":
            (application,) = content["applications"]
            config = resolve_serving(application["args"] | {"token": "a-token-of-the-test"})
            given = application["deployments"][0]["user_config"]
            assert given == {name: getattr(config, name) for name in given}
        elif name.startswith("jobs/"):
            resolve({}, path)


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile(
        r"(py" + r"pi|python" + r"hosted|npm" + r"js|deb\." + r"debian|conda\.ana" + r"conda)\.(org|com)"
    )
    seen, naming = 0, []
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and arrays
        seen += 1
        naming += [name] if hosts.search(text) else []
    assert naming == []
    assert seen > 100


def test_the_lock_file_is_not_tracked() -> None:
    assert [name for name in tracked() if name.endswith("uv.lock")] == []
