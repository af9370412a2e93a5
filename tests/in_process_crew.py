"""Sessions in this process, without Ray, and what a store holds after them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData, load_picture, open_task
from condu_ray.engine.figures import learned_pictures
from condu_ray.engine.in_process import InProcessCrew
from condu_ray.engine.plan import header_of
from condu_ray.engine.progress import silent
from condu_ray.engine.session import learn
from condu_ray.sources import resolve
from condu_ray.store import Manifest, Store, create_store, open_store
from condu_ray.store.bucket import Bucket
from condu_ray.store.header import open_existing
from condu_ray.voting.open import load_classifier

FAST = {"train.steps": 4, "train.batch_size": 8, "train.towers": "image", "tracking": "off"}
"""Settings under which a task trains in a blink."""


def settings(store: Any, model: Any, **others: Any) -> SessionConfig:
    """Settings for a store at `store` with the model in folder `model`; `others` by dotted names, `__` for the dot."""
    given = {name.replace("__", "."): value for name, value in others.items()}
    return resolve({**FAST, "store": str(store), "model": f"local-dir:{model}", **given})[0]


def opened(folders: Mapping[str, Any], *names: str) -> list[TaskData]:
    """The tasks of these names, opened."""
    return [open_task(name, folders[name]) for name in names]


def make_store(config: SessionConfig) -> Store:
    """The store of these settings, made if it is not there."""
    return open_existing(config.store) or create_store(config.store, header_of(config)[0])


def learn_here(
    config: SessionConfig, tasks: Sequence[TaskData], threads: int = 1, device: str = "cpu"
) -> list[Manifest]:
    """Learns in this process; makes the store if needed and returns the new versions."""
    store = make_store(config)
    return learn(store, config, tasks, InProcessCrew(store, config, threads, device), silent)


def contents(store: str | Path) -> dict[str, Any]:
    """What must be the same in two stores after the same work: manifests without times, objects' sha256."""
    files = files_of(store)
    manifests = {Path(name).name: json.loads(body) for name, body in files.items() if name.startswith("versions/")}
    for manifest in manifests.values():
        del manifest["created"], manifest["seconds"]
    objects = {name: hashlib.sha256(body).hexdigest() for name, body in files.items() if name.startswith("objects/")}
    return {**manifests, **objects}


def files_of(store: str | Path) -> dict[str, bytes]:
    """Everything in a store, by path: of a folder, or below an s3:// URL."""
    if str(store).startswith("s3://"):
        place = Bucket(str(store))
        return {entry.path: place.read(entry.path) or b"" for entry in place.entries("")}
    root = Path(store)
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def named_accuracy(store: str) -> dict[str, float]:
    """Percent of the test pictures of each task that the newest version answers rightly when it is told the task."""
    classifier, found = load_classifier(store), {}
    for name, pictures in learned_pictures(open_store(store), open_store(store).manifest()).items():
        pixels = torch.stack([classifier.clip.eval_transform(load_picture(each)) for each in pictures.pictures])
        said = classifier.label_indices(pixels, classifier.label_space(name))
        found[name] = 100 * float((said == pictures.labels).mean())
    return found
