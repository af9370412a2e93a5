"""Who may import whom (docs/architecture.md): the contracts in pyproject.toml hold, and every module is under one."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import condu_ray

ROOT = Path(__file__).parents[1]
CONTRACTS = 6
# Thin modules that stand beside cli.py: they are given what they show, or are handed to the command line.
BESIDE_THE_COMMAND_LINE = {"doctor", "options", "reports"}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the contracts stand in a checkout")


def test_the_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept is not None, done.stdout
    assert int(kept[1]) == CONTRACTS


def test_every_module_has_a_floor() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = {name.strip().removeprefix("condu_ray.") for layer in layers for name in layer.split("|")}
    here = Path(condu_ray.__file__).parent
    modules = {path.stem for path in here.glob("*.py")} | {path.parent.name for path in here.glob("*/__init__.py")}
    assert modules - {"__init__"} == floors | BESIDE_THE_COMMAND_LINE
