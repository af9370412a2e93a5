"""The work folder: what a benchmark has done so far, so that one that was killed goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from condu_ray.benchmark.settings import Benchmark, kept_settings
from condu_ray.errors import ConfigError, StoreError
from condu_ray.store import Manifest
from condu_ray.store.header import open_existing


def check(benchmark: Benchmark) -> None:
    """Raises ConfigError, naming what differs, where the work folder belongs to another stream or other settings."""
    asked, there = _terms(benchmark), read(_claim_of(benchmark))
    if there is None:
        return
    differ = [name for name in sorted({*asked, *there}) if asked.get(name) != there.get(name)]
    if differ:
        raise ConfigError(
            f"{benchmark.work} holds a benchmark with "
            + ", ".join(f"{name} {there.get(name)}, not {asked.get(name)}" for name in differ),
            "use another --work, or the same stream and settings",
        )


def claim(benchmark: Benchmark) -> None:
    """Makes the work folder and writes down whose it is. Raises ConfigError where it cannot be written."""
    write(_claim_of(benchmark), _terms(benchmark))


def _claim_of(benchmark: Benchmark) -> Path:
    return benchmark.work / "benchmark.json"


def _terms(benchmark: Benchmark) -> dict[str, Any]:
    """What must stay the same for as long as the folder is used."""
    return {
        "tasks": list(benchmark.stream.tasks),
        **kept_settings(benchmark),
        **_own("full", benchmark.stream.full),
        **_own("lora", benchmark.stream.lora),
    }


def _own(kind: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name} ({kind}, {task})": value for task, own in settings.items() for name, value in own.items()}


def read(path: Path) -> Any:
    """The JSON document, None if there is none. Raises StoreError for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error})", "remove it, and it is measured again") from error


def write(path: Path, document: Any) -> None:
    """Writes JSON, which appears whole or not at all. Raises ConfigError where it cannot be written."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--work: {path} cannot be written ({error.strerror})", "give another folder") from None


@contextmanager
def timed(path: Path) -> Iterator[None]:
    """Adds the seconds of the block, however it ends, to those in the file."""
    begun = time.monotonic()
    try:
        yield
    finally:
        write(path, {"seconds": seconds_in(path) + time.monotonic() - begun})


def seconds_in(path: Path) -> float:
    """What `timed` has added up so far."""
    return float((read(path) or {"seconds": 0.0})["seconds"])


def learned(store: str, tasks: Sequence[str]) -> list[Manifest] | None:
    """The versions that learned these tasks, in this order; None unless the store's newest holds just them."""
    opened = open_existing(store)
    if opened is None or not opened.versions():
        return None
    cards = opened.manifest().tasks
    if [card.name for card in cards] != list(tasks):
        return None
    return [opened.manifest(card.learned_in) for card in cards]
