"""Before anything is written: what a session will do, in which store, and what memory and disk it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from condu_ray.config import SessionConfig, fixed_by_store, fuses, rescales
from condu_ray.data import TaskData, open_task
from condu_ray.errors import ConfigError
from condu_ray.fusion.layout import Layout
from condu_ray.methods import registry
from condu_ray.methods.stored import layout_of
from condu_ray.methods.training import all_steps_for, learning_rate_for
from condu_ray.models.load import load
from condu_ray.store import Store, StoreHeader, absolute_url, create_store
from condu_ray.store.header import open_existing


@dataclass(frozen=True)
class Need:
    """What a session needs: numbers of parameters, and estimates in bytes of memory or disk.

    parameters: of the base model. fused: those that are fused, without padding. worker: memory of a training process,
    without activations. fusion: of the fusion actor at its peak. scorer: of a process that evaluates. version: what a
    new version adds to the disk. passing: deltas, on disk until their task is committed.
    """

    parameters: int
    fused: int
    worker: int
    fusion: int
    scorer: int
    version: int
    passing: int


def open_data(config: SessionConfig, stage: Any, validation: float | None = None) -> list[TaskData]:
    """Opens and checks every task's pictures; validation: as for `open_task`, of all tasks.

    Raises ConfigError without tasks, DataError for bad data.
    """
    if not config.tasks:
        raise ConfigError("there is no task to learn", "give NAME --data PATH, or --task NAME=PATH")
    found = []
    for name, source in config.tasks.items():
        with stage(f"reading {name}") as update:
            progress = lambda done, total, update=update: update(done, total, "")  # noqa: E731
            split = partial(open_task, seed=config.seed, test_share=config.test_share, validation=validation)
            found.append(split(name, source, progress=progress))
    return found


def header_of(config: SessionConfig) -> tuple[StoreHeader, int]:
    """The header of a new store and the base model's number of parameters; loads the model, writes nothing."""
    clip = load(config.model_spec)
    layout = registry.get(config.method).layout(clip, config)
    header = StoreHeader(
        method=config.method,
        model=config.model_spec.model_dump(),
        model_sha256=clip.sha256,
        layout=json.loads(layout.to_json()),
        settings=fixed_by_store(config),
        domains=clip.domains,
    )
    return header, clip.parameter_count()


def need(config: SessionConfig, layout: Layout, parameters: int, tasks: Sequence[TaskData], learned: int) -> Need:
    """What this session needs. parameters: of the base model. learned: how many tasks the store holds already."""
    fused, total = layout.total, learned + len(tasks)
    plane = fused // 8
    fused_together = fuses(config)
    asked = min(config.vote.k, total)  # experts that an evaluation process holds
    # Four bytes a number. docs/limits.md has these estimates as a table.
    return Need(
        parameters=parameters,
        fused=layout.parameters,
        # θ⁰, the copy that is trained, and one more to take the delta from; gradients, and AdamW's two moments.
        worker=4 * (3 * parameters + 3 * fused),
        # u, the new u and the delta, and of each task two planes of bits: its mask, and what older tasks lost.
        fusion=(12 * fused + total * 2 * plane) if fused_together else 8 * fused,
        # θ⁰, the delta and each expert that a vote asks; or θ⁰, a copy, ±u, and the weights and gradients of a step.
        scorer=4 * max(parameters + (1 + asked) * fused, (2 * parameters + 3 * fused) if rescales(config) else 0),
        version=(4 * fused + 2 * plane) if fused_together else 4 * fused,
        passing=4 * fused * len(tasks) if config.system.trains else 0,
    )


def plan(config: SessionConfig, tasks: Sequence[TaskData]) -> dict[str, Any]:
    """The plan as JSON: what each task will do, and the need. Writes nothing."""
    store = open_existing(config.store)
    header, parameters = header_of(config)
    manifest = store.manifest() if store and store.versions() else None
    learned = {card.name for card in manifest.tasks} if manifest else set()
    return {
        "store": absolute_url(config.store),
        "store_exists": store is not None,
        "newest_version": manifest.version if manifest else None,
        "tasks": [
            {
                "name": task.name,
                "action": "already learned" if task.name in learned else "learn",
                "steps": all_steps_for(len(task.train), config) if config.system.trains else 0,
                "learning_rate": learning_rate_for(parameters, config),
            }
            for task in tasks
        ],
        "need": asdict(need(config, layout_of(header), parameters, tasks, len(learned))),
    }


def store_for(config: SessionConfig) -> Store:
    """The store of these settings, made if it is not there."""
    return open_existing(config.store) or create_store(config.store, header_of(config)[0])
