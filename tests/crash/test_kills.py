"""Killed at any instant: nothing published is lost, nothing half-done is seen, the same command finishes the work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("crash_driver.py")
SIGKILL = -9


def disturbed(
    model: Path, tasks: dict[str, Path], out: Path, at: str, seeds: int = 0, **settings: Any
) -> dict[str, Any]:
    folders = {name: str(tasks[name]) for name in ("colours", "stripes")}
    asked = {"model": str(model), "tasks": folders, "out": str(out), "at": at, "seeds": seeds, "settings": settings}
    done = subprocess.run([sys.executable, str(DRIVER), json.dumps(asked)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any]) -> None:
    """Every session that was killed and run again ended as the undisturbed one, without training a task again."""
    manifests = [name for name in found["expected"] if name.endswith(".json")]
    assert manifests == ["00000001.json", "00000002.json"]
    looked_at = [each for each in found["results"] if each["again"] is not None]
    assert looked_at
    for each in found["results"]:
        where = f"killed at call {each['index']}, {each['call']}"
        assert each["status"] in (SIGKILL, 0), where
        if each["again"] is None:
            continue  # left the very same files as another kill
        assert each["again"] == 0, where
        assert each["same"], f"{where}: another result"
        assert each["leftovers"] == [], where
        # A task whose delta was stored is not trained again; any other exactly once.
        assert Counter(each["kept"] + each["trained_after"]) == Counter(["colours", "stripes"]), where
        assert max(Counter(each["trained_before"]).values(), default=0) <= 1, where


def test_killed_at_every_call_of_the_store_and_every_step_of_the_spine(
    tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path
) -> None:
    found = disturbed(tiny_model_dir, picture_tasks, tmp_path, "store")
    seen = Counter(found["calls"])
    assert seen["store.commit"] == 2
    assert seen["store.create"] == 1
    assert seen["crew.train"] == 1
    assert seen["crew.fuse"] == 2
    assert len(found["results"]) == len(found["calls"]) >= 60
    assert all(each["status"] == SIGKILL for each in found["results"])
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_call_where_rescalers_are_trained(
    tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path
) -> None:
    signs = {"method": "condu-sign", "fusion__tune_rescalers": 2}
    found = disturbed(tiny_model_dir, picture_tasks, tmp_path, "store", **signs)
    assert Counter(found["calls"])["crew.rescalers"] == 2
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_step_of_training(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path) -> None:
    found = disturbed(tiny_model_dir, picture_tasks, tmp_path, "step", train__checkpoint_seconds=1e-6)
    assert sum(name.startswith("step ") for name in found["calls"]) == 8
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_change_of_a_file(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path) -> None:
    found = disturbed(tiny_model_dir, picture_tasks, tmp_path, "file", train__checkpoint_seconds=1e-6)
    assert {"os.link", "os.fsync", "os.unlink", "os.replace"} <= set(found["calls"])
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_times(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path) -> None:
    check(disturbed(tiny_model_dir, picture_tasks, tmp_path, "store", seeds=60, train__checkpoint_seconds=1e-6))
