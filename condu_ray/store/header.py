"""What a store fixed when it was made, read without loading anything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.errors import NotFound
from condu_ray.sources import resolve
from condu_ray.store import Store, open_store


def open_existing(url: str) -> Store | None:
    """The store there, or None if there is none yet."""
    try:
        return open_store(url)
    except NotFound:
        return None


def fixed_settings(url: str) -> dict[str, Any] | None:
    """The settings (dotted names) that the store at `url` was made with; None if there is none yet."""
    store = open_existing(url)
    return None if store is None else store.header.settings


def session_settings(options: Mapping[str, Any], file: Path | None = None) -> tuple[SessionConfig, dict[str, str]]:
    """Merges settings as `sources.resolve` does, above those that the store they name was made with, if it exists.

    options: dotted name -> value. file: YAML. Returns the settings, and where each came from, by dotted name. Raises
    ConfigError that lists every fault at once, and for a value that is not the store's.
    """
    first, _ = resolve(options, file)
    return resolve(options, file, fixed_settings(first.store))
