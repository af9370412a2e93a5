"""A store with two learned tasks, made in this process: most commands only read it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from in_process_crew import learn_here, opened, settings


@pytest.fixture(scope="session")
def store(tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with colours (version 1) and stripes (version 2). Not to be changed."""
    config = settings(tmp_path_factory.mktemp("cli") / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    return Path(config.store)


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of that store, to change."""
    return Path(shutil.copytree(store, tmp_path / "store"))


@pytest.fixture(scope="session")
def picture(picture_tasks: dict[str, Path]) -> Path:
    """A test picture of colours that shows red."""
    return sorted((picture_tasks["colours"] / "test" / "red").iterdir())[0]
