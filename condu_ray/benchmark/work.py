"""The work folder: what a benchmark has done so far, so that one that was killed goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from condu_ray.benchmark.settings import Benchmark, kept_settings, store_of
from condu_ray.benchmark.systems import SYSTEMS
from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.part import split_part
from condu_ray.errors import ConfigError, DataError
from condu_ray.sources import flatten
from condu_ray.store import Manifest
from condu_ray.store.documents import read, write
from condu_ray.store.header import open_existing


def check(benchmark: Benchmark) -> None:
    """Raises ConfigError, naming what differs, where the work folder belongs to another stream or other settings."""
    asked, there = _terms(benchmark), read(_claim_of(benchmark))
    if there is None:
        return
    usual = flatten(SessionConfig().model_dump())  # a setting that is younger than the folder had its default
    there = {**{name: usual[name] for name in asked if name in usual}, **there}
    names = sorted({*asked, *there} - {name for name in _WHERE_KNOWN if not (asked.get(name) and there.get(name))})
    differ = [_differs(name, there.get(name), asked.get(name)) for name in names if asked.get(name) != there.get(name)]
    if differ:
        raise ConfigError(
            f"{benchmark.work} holds a benchmark with {', '.join(differ)}",
            "use another --work, or the same stream and settings",
        )


def check_data(benchmark: Benchmark, seed: int, tasks: Sequence[TaskData]) -> None:
    """Raises DataError where some system learned a task from other pictures: figures of the two would stand beside each
    other. With another seed it did where no split was to be made."""
    for system, other in product(SYSTEMS.values(), benchmark.seeds):
        prints = {task.name: task.fingerprint for task in tasks if other == seed or not task.split_made}
        store = open_existing(store_of(benchmark, system, other))
        for card in store.manifest().tasks if store and store.versions() else ():
            if prints.get(card.name, card.fingerprint) != card.fingerprint:
                raise DataError(
                    f"{benchmark.work}: task {card.name} has other pictures now than {system.name} learned it from",
                    "put them back, or use another --work",
                )


def claim(benchmark: Benchmark) -> None:
    """Makes the work folder and writes down whose it is. Raises ConfigError where it cannot be written."""
    write(_claim_of(benchmark), _terms(benchmark))


def _claim_of(benchmark: Benchmark) -> Path:
    return benchmark.work / "benchmark.json"


_WHERE_KNOWN = ("parts", "classes")
"""Terms that are compared where both have them: folders of earlier releases do not, nor does every stream."""


def _terms(benchmark: Benchmark) -> dict[str, Any]:
    """What must stay the same for as long as the folder is used. Where the data lie may change."""
    stream = benchmark.stream
    return {
        "tasks": list(stream.tasks),
        "parts": [_part(source) for source in stream.tasks.values()],
        "classes": [name for task in stream.tasks for name in stream.classes.get(task, ())],
        **kept_settings(benchmark),
        **_own("full", stream.full),
        **_own("lora", stream.lora),
    }


def _part(source: str) -> str:
    """Which part of a source's classes in whose order: '#1-20@1993', '' for all of them."""
    place, part = split_part(source)
    told, at, order = source.removeprefix(place).partition("@") if part else ("", "", "")
    return told + at + Path(order).name


def _differs(name: str, there: Any, asked: Any) -> str:
    if name == "classes":  # there may be hundreds: the first tells
        place, pair = next((at, pair) for at, pair in enumerate(zip_longest(there, asked), 1) if pair[0] != pair[1])
        name, (there, asked) = f"class {place}", pair
    return f"{name} {there}, not {asked}"


def _own(kind: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name} ({kind}, {task})": value for task, own in settings.items() for name, value in own.items()}


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
