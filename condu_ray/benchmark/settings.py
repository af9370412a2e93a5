"""What a benchmark is asked to do, and the settings of each of its sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from condu_ray.benchmark.stream import Stream
from condu_ray.benchmark.systems import LORA_BANK, System, plane_rank
from condu_ray.catalogue import info
from condu_ray.config import SessionConfig
from condu_ray.engine.keys import EXECUTION, PLACEMENT
from condu_ray.sources import flatten, resolve
from condu_ray.store.header import fixed_settings

# What may differ between two runs of one benchmark: where things are, and who does the work.
_FREE = PLACEMENT | EXECUTION | {"method", "seed"}


@dataclass(frozen=True)
class Benchmark:
    """stream: what is learned. methods: names of `systems.METHODS`. work: the folder that holds everything.

    options: settings by dotted name, which stand above the YAML file `file` and the environment.
    """

    stream: Stream
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    work: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None


def folder_of(benchmark: Benchmark, seed: int) -> Path:
    """Where everything of one seed is."""
    return benchmark.work / f"seed-{seed}"


def store_of(benchmark: Benchmark, system: System, seed: int) -> str:
    """The folder of a system's store."""
    return str(folder_of(benchmark, seed) / system.name)


def figures_of(benchmark: Benchmark, system: System, seed: int) -> Path:
    """The folder of what is measured of a system besides its sessions' own figures."""
    return folder_of(benchmark, seed) / "figures" / system.name


def shared_of(benchmark: Benchmark, system: System, seed: int) -> Path:
    """The file that says what the trainings took that a system did not do itself."""
    return figures_of(benchmark, system, seed) / "shared.json"


def routing_of(benchmark: Benchmark, seed: int) -> Path:
    """The file of the router's figures, which are those of every system that votes."""
    return folder_of(benchmark, seed) / "figures" / "routing.json"


def probe_of(benchmark: Benchmark, seed: int) -> Path:
    """The file of the linear probe's figures."""
    return folder_of(benchmark, seed) / "figures" / "linear-probe.json"


def sessions(benchmark: Benchmark, system: System, seed: int) -> list[tuple[SessionConfig, list[str]]]:
    """What a system's store learns, one `learn` after another: (settings, tasks), cut where a task has others.

    Raises ConfigError that lists every fault of the settings.
    """
    given = groupby(benchmark.stream.tasks, key=lambda task: _own(benchmark.stream, system, task))
    configs = [(_config(benchmark, system, seed, own), list(tasks)) for own, tasks in given]
    same = groupby(configs, key=lambda pair: pair[0])  # what is asked for may stand above what the tasks have
    return [(config, [task for _, tasks in part for task in tasks]) for config, part in same]


def common(benchmark: Benchmark) -> SessionConfig:
    """The settings that all sessions have, apart from what each method, seed and task adds."""
    return _resolved(benchmark, benchmark.options, benchmark.stream.settings, None)


def kept_settings(benchmark: Benchmark) -> dict[str, Any]:
    """Settings (dotted names) that must stay the same for as long as the work folder is used."""
    return {name: value for name, value in flatten(common(benchmark).model_dump()).items() if name not in _FREE}


def _own(stream: Stream, system: System, task: str) -> Mapping[str, Any]:
    if "dmc" in info(system.method).reads:
        return {}  # a stream's rates are of full fine-tuning, and these train adapters
    return (stream.lora if system.method == "condu-lora" else stream.full).get(task, {})


def _config(benchmark: Benchmark, system: System, seed: int, own: Mapping[str, Any]) -> SessionConfig:
    stream, store = benchmark.stream, store_of(benchmark, system, seed)
    fixed = fixed_settings(store)
    chosen = {
        **benchmark.options,
        "store": store,
        "tasks": dict(stream.tasks),
        "method": system.method,
        "seed": seed,
    }
    if system.name == LORA_BANK:
        chosen |= {"lora.mode": "exact", "lora.rank": fixed["lora.rank"] if fixed else _plane_rank(benchmark)}
    return _resolved(benchmark, chosen, {**stream.settings, **own}, fixed)


def _plane_rank(benchmark: Benchmark) -> int:
    config = common(benchmark)
    return plane_rank(config.model_spec, config.train.towers, config.lora.targets)


def _resolved(
    benchmark: Benchmark, chosen: Mapping[str, Any], stream: Mapping[str, Any], fixed: Mapping[str, Any] | None
) -> SessionConfig:
    """Merged settings; those of the stream stand where neither file, environment nor option says anything."""
    _, origin = resolve(chosen, benchmark.file)
    own = {name: value for name, value in stream.items() if origin[name] == "default"}
    if origin["model"] != "default":
        own.pop("pretrained", None)  # weights belong to their model
    return resolve({**own, **chosen}, benchmark.file, fixed)[0]
