"""Paths as users write them, and the folder of what may be made again."""

from __future__ import annotations

import os
from pathlib import Path


def as_path(given: str | Path) -> Path:
    """The path with ~ as the home folder, or as it stands where there is no such user."""
    try:
        return Path(given).expanduser()
    except RuntimeError:
        return Path(given)


def cache_root() -> Path:
    """CONDU_CACHE, else ~/.cache/condu-ray."""
    return as_path(os.environ.get("CONDU_CACHE") or "~/.cache/condu-ray")
