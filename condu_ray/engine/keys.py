"""Names of finished work, derived from its input: a session that died finds its steps again by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from condu_ray.config import SessionConfig, fields, fixed_by_store, fuses
from condu_ray.data import TaskData
from condu_ray.store import Manifest, StoreHeader

FEATURES = "features"
"""Object with θ⁰'s features of a task's pictures, where a method learns on them: kept until its session is over."""

SEEN = ("prototypes", "domain", FEATURES)
"""Objects made of θ⁰'s features of a task's pictures; the first two stand in every version with the task."""

PLACEMENT = {
    "store",
    "tasks",
    "tracking",
    "workers",
    "cpus_per_worker",
    "gpus_per_worker",
    "node_wait_seconds",
    "parallel",
    "gpu",
}
"""Settings that say where a session runs, not what it does: no version keeps them."""

EXECUTION = {"train.checkpoint_seconds", "train.loader_processes", "fusion.shards"}
"""Settings that change how the work of a session is done, not its result."""


def unread(config: SessionConfig) -> set[str]:
    """Settings (dotted names) that do not change the results of the session's method."""
    reads = {section for section in config.system.reads if section != "fusion" or fuses(config)}
    idle = {name for name, _ in fields() if "." in name and name.partition(".")[0] not in reads}
    if "dmc" in reads:  # draws its adapters by that seed, tunes the image tower alone, and replays in its own way
        idle = idle - {"lora.seed"} | {"train.towers", "train.batch_norm", "memory.per_epoch"}
    return idle - EXECUTION


def forgotten(trained: str, task: str) -> str:
    """Names the training that a version goes on from once it was made to forget a task."""
    return _key("forgot", trained, task)


def _key(kind: str, *parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def training_settings(config: SessionConfig) -> dict[str, Any]:
    """The settings that the result of a training depends on."""
    train = {name: value for name, value in config.train.model_dump().items() if f"train.{name}" not in EXECUTION}
    # Whether Gaussians answer changes nothing that is trained.
    memory = {**config.memory.model_dump(exclude={"discriminant"}), "shrinkage": config.choices.shrinkage}
    if "dmc" in config.system.reads:
        return {"train": train, "dmc": config.dmc.model_dump(), "memory": memory, "seed": config.seed}
    if not config.system.on_features:
        return {"train": train, "seed": config.seed}
    chosen = {name: getattr(config.choices, name) for name in ("basis", "calibration", "distillation")}
    adapter = {**config.adapter.model_dump(), **chosen}
    return {"adapter": adapter, "memory": memory, "seed": config.seed}


def train_key(model_sha256: str, config: SessionConfig, task: TaskData, start: str) -> str:
    """Names a task's delta. start: what training starts from, 'base' for θ⁰."""
    lora = config.lora.model_dump() if {"lora", "dmc"} & set(config.system.reads) else None
    return _key("train", model_sha256, training_settings(config), lora, task.name, task.fingerprint, start)


def features_key(header: StoreHeader, config: SessionConfig, task: TaskData) -> str:
    """Names a task's prototypes and domain."""
    kind = [] if header.domains == "means" else [header.domains]  # older releases did not name it
    return _key("features", header.model_sha256, config.seed, task.fingerprint, *kind)


def content_key(kind: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Names an object by what it holds: a list of test pictures (the same ones in another place are another list), or
    buffers, which other hardware rounds otherwise."""
    return _key(kind, {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in arrays.items()})


def state_key(parent: Manifest | None, config: SessionConfig, task: str, given: str, rescaled: int = 0) -> str:
    """Names the state after a version was changed. rescaled: steps that train the task's rescalers.

    given: what it is made from, by its bytes: a training that is done again on other hardware gives others.
    """
    before = sorted((name, ref.sha256) for name, ref in parent.objects.items()) if parent else []
    meta = parent.state if parent else {}
    return _key("state", before, meta, fixed_by_store(config), rescaled, task, given)
