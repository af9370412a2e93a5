"""A stream of three tiny tasks, learned once in this process, and what every voter says of its validation pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process_crew import InProcessCrew, make_store, settings, silent
from streams import SHARE, Stream

from condu_ray.data import open_task
from condu_ray.tuning.cache import prepare
from condu_ray.tuning.objectives import Goals
from condu_ray.tuning.settings import Sweep, read_sweep


@pytest.fixture(scope="session")
def stream(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Stream:
    config = settings(tmp_path_factory.mktemp("stream") / "store", tiny_model_dir, train__steps=12, train__lr=3e-3)
    config = config.model_copy(update={"tasks": {name: str(path) for name, path in picture_tasks.items()}})
    tasks = [open_task(name, source, validation=SHARE) for name, source in config.tasks.items()]
    store = make_store(config)
    cached = prepare(config, tasks, Goals(("average", "latency")), store, InProcessCrew(store, config), silent)
    return Stream(config, store, tasks, cached)


@pytest.fixture
def written(tmp_path: Path, tiny_model_dir: Path, picture_tasks: dict[str, Path]) -> Callable[..., tuple[Path, Sweep]]:
    """Writes a sweep file over tasks of `picture_tasks`, with settings that train in a blink, and reads it."""

    def write(tasks: list[str], space: dict[str, Any], session: dict[str, Any] | None = None, **others: Any) -> Any:
        kept = {
            "tasks": {name: str(picture_tasks[name]) for name in tasks},
            "model": f"local-dir:{tiny_model_dir}",
            "train": {"steps": 9, "batch_size": 8, "towers": "image"},
            "tracking": "off",
        }
        path = tmp_path / "sweep.yaml"
        found = {"session": kept | (session or {}), "space": space, "validation_share": SHARE, **others}
        path.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
        return path, read_sweep(path)

    return write
