"""Paths as users write them, and the folder of what may be made again."""

from __future__ import annotations

import os
from pathlib import Path

from condu_ray.errors import ConfigError

_COPIES = f"{os.sep}runtime_resources{os.sep}working_dir_files{os.sep}"
"""In every path below such a copy (Ray 2.60)."""


def as_path(given: str | Path) -> Path:
    """The path with ~ as the home folder, or as it stands where there is no such user."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        return Path(given)


def cache_root() -> Path:
    """CONDU_CACHE, else ~/.cache/condu-ray. Raises ConfigError where there is no home folder."""
    if given := os.environ.get("CONDU_CACHE"):
        return as_path(given)
    try:
        return Path.home() / ".cache" / "condu-ray"
    except RuntimeError:
        raise ConfigError("this user has no home folder for the cache", "set CONDU_CACHE to a folder") from None


def check_lasting(place: str | Path, given: str) -> None:
    """Raises ConfigError for a path in the copy of a folder that Ray makes for a job (`--working-dir`): what is written
    there is out of reach when the job ends, is not on the other nodes, and is removed at last.

    place: absolute, or a URL, which is in none. given: the option as it was written.
    """
    if _COPIES in str(place):
        raise ConfigError(
            f"{given} lies in the copy of your folder that Ray made for this job, and would go with it",
            "give an absolute path that every node sees",
        )
