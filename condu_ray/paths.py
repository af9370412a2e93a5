"""Paths as users write them, and the folder of what may be made again."""

from __future__ import annotations

import os
from pathlib import Path

from condu_ray.errors import ConfigError


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
