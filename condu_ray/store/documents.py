"""Small JSON files of a work folder, which appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from condu_ray.errors import ConfigError, StoreError


def read(path: Path) -> Any:
    """The JSON document, None if there is none. Raises StoreError for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error})", "remove it, and that part is done again") from error


def write(path: Path, document: Any) -> None:
    """Writes JSON. Raises ConfigError where it cannot be written."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})", "give another folder") from None
