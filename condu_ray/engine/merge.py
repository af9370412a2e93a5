"""Fuses fine-tuned weights that are there already: any state dicts with a base's names and shapes, no pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from condu_ray.config import SessionConfig, check_task_name, fixed_by_store
from condu_ray.engine.fusing import Fuser
from condu_ray.engine.keys import PLACEMENT, content_key, state_key
from condu_ray.engine.progress import Stage
from condu_ray.errors import ConfigError, DataError, FusionError, StoreError
from condu_ray.fusion.layout import Layout, as_f32
from condu_ray.methods.stored import task_objects
from condu_ray.paths import as_path
from condu_ray.sources import resolve
from condu_ray.store import Manifest, Store, StoreHeader, TaskCard, create_store
from condu_ray.store.header import open_existing
from condu_ray.store.history import commit_next, newest

WEIGHTS = "weights:"
"""Stands before the path of the base in the header of a merged store, where other stores have a model's name."""

_CHUNK = 1 << 22


class Weights(Mapping[str, Any]):
    """The tensors of a safetensors file, or of all those in a folder (shards); mapped, and read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise DataError(f"{path}: no safetensors file there", "give a .safetensors file, or a folder of shards")
        self._files, self._stack = files, ExitStack()
        self._where: dict[str, Any] = {}
        owners = dict[str, Path]()
        for file in files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise DataError(f"{file} is not a safetensors file ({error})", "convert it with safetensors") from None
            if twice := sorted(owners.keys() & set(opened.keys())):  # a copy in another precision, say
                where = f"{owners[twice[0]]} and {file}"
                raise DataError(f"tensor {twice[0]!r} is in both {where}", "give one of the files")
            owners |= dict.fromkeys(opened.keys(), file)
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Any:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Any:
        return iter(sorted(self._where))

    def __len__(self) -> int:
        return len(self._where)

    @property
    def files(self) -> list[Path]:
        """Where the tensors are read from."""
        return list(self._files)

    def sha256(self) -> str:
        """sha256 (hex) over the bytes of all its files, in the order of their names."""
        total = hashlib.sha256()
        for file in self._files:
            with open(file, "rb") as opened:
                while chunk := opened.read(_CHUNK):
                    total.update(chunk)
        return total.hexdigest()

    def layout(self) -> Layout:
        """What is fused: tensors of floating type with at least one element, but for running statistics."""
        shapes = {name: self[name] for name in self if not _is_statistic(name)}
        return Layout.of({name: t for name, t in shapes.items() if t.is_floating_point() and t.numel()})

    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its running statistics, by name."""
        return {name: tuple(self[name].shape) for name in self if _is_statistic(name)}


def _is_statistic(name: str) -> bool:
    """Whether a tensor is a running mean or variance: it is measured, not learned, and fused could turn negative."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def named(given: Sequence[str]) -> dict[str, Path]:
    """'[NAME=]PATH' -> task name and path; without a name, that of the file. Raises ConfigError."""
    found = dict[str, Path]()
    for text in given:
        before, equals, after = text.partition("=")
        name, path = (before, after) if equals and "/" not in before else (Path(text).stem, text)
        try:
            check_task_name(name)
        except ValueError as error:
            raise ConfigError(f"{text}: {error}", "write NAME=PATH") from None
        if name in found:
            raise ConfigError(f"two files are called {name} ({found[name]}, {path})", "write NAME=PATH")
        found[name] = as_path(path)  # no shell has seen to the ~ of NAME=~/PATH
    return found


def merge(
    base: Path,
    tuned: Mapping[str, Path],
    url: str,
    granularity: str,
    triggers: str,
    stage: Stage,
    warn: Callable[[str], None] = lambda text: None,
) -> list[Manifest]:
    """Adds each of `tuned` (task name -> weights) to the store at `url`, one version a task; returns the new ones.

    What the store holds already is not added again. warn: told of tensors that the base lacks, which are not kept.
    Raises DataError for a file that is none, FusionError for one that does not fit the base, StoreError where the store
    was made from another base or otherwise.
    """
    start = Weights(base)
    settings = {"granularity": granularity, "triggers": triggers}
    given = {f"fusion.{name}": value for name, value in settings.items()}
    # Given, so that a CONDU_METHOD in the environment that does not fuse is not taken.
    given |= {"method": SessionConfig().method}
    sha256, model, there = start.sha256(), f"{WEIGHTS}{base.absolute()}", open_existing(url)
    if there and there.header.model_sha256 == sha256 and str(there.header.model["name"]).startswith(WEIGHTS):
        model = there.header.model["name"]  # the same bytes in another place, as on another machine
    config, _ = resolve({"store": url, "model": model, "tracking": "off", **given})
    opened = {name: Weights(path) for name, path in tuned.items()}
    layout = start.layout()
    shapes = {**{entry.name: entry.shape for entry in layout.entries}, **start.statistics()}
    for name, weights in opened.items():
        _check_fits(shapes, name, weights)
    for name, weights in opened.items():
        if more := [each for each in weights if each not in start]:
            such = more[0] if len(more) == 1 else f"{more[0]} and {len(more) - 1} more"
            warn(f"{name} has tensors that the base lacks, and they are not kept: {such}")
    store = create_store(
        url,
        StoreHeader(
            method=config.method,
            model={"name": config.model, "pretrained": None},
            model_sha256=sha256,
            layout=json.loads(layout.to_json()),
            settings=fixed_by_store(config),
        ),
    )
    merging, made = _Merging(store, config, start, layout), list[Manifest]()
    for name, weights in opened.items():
        with stage(f"fusing {name}"):
            manifest = merging.add(name, weights)
        if manifest is not None:
            made.append(manifest)
    return made


def _check_fits(shapes: Mapping[str, tuple[int, ...]], name: str, weights: Weights) -> None:
    for each, wanted in shapes.items():
        if each not in weights:
            raise FusionError(f"{name}: tensor {each!r} of the base is missing in {weights.path}")
        tensor = weights[each]
        if tuple(tensor.shape) != wanted:
            raise FusionError(f"{name}: tensor {each!r} has shape {tuple(tensor.shape)}, the base has {wanted}")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise FusionError(f"{name}: tensor {each!r} holds {kind}", "give weights that are not quantised")


class _Merging:
    """Adds fine-tuned weights to one store, one version a task. start: the base; layout: what of it is fused."""

    def __init__(self, store: Store, config: SessionConfig, start: Weights, layout: Layout) -> None:
        self._store, self._config, self._start, self._layout = store, config, start, layout
        self._fuser = Fuser(store.url)

    def add(self, name: str, weights: Weights) -> Manifest | None:
        """Commits the version with this task; None where the newest one holds it.

        Raises DataError for a name that other weights have.
        """
        fingerprint = weights.sha256()
        manifest = commit_next(self._store, lambda: self._next(name, weights, fingerprint))
        if manifest is not None:
            with suppress(StoreError):  # gc takes what is left
                self._store.discard(_key(fingerprint), "delta")
        return manifest

    def _next(self, name: str, weights: Weights, fingerprint: str) -> Manifest | None:
        parent = newest(self._store)
        known = parent.task(name) if parent else None
        if known is None:
            return self._version_after(parent, name, weights, fingerprint)
        if known.fingerprint == fingerprint:
            return None
        raise DataError(f"task {name} was merged from other weights ({known.source})", "choose another name")

    def _version_after(self, parent: Manifest | None, name: str, weights: Weights, fingerprint: str) -> Manifest:
        store, config, train = self._store, self._config, _key(fingerprint)
        version = parent.version + 1 if parent else 1
        delta = store.find(train, "delta")
        if delta is None:
            delta = store.put(train, "delta", {"delta": _delta(self._layout, weights, self._start)})
        fused = self._fuser.add(state_key(parent, config, name, train), parent, name, delta, None)
        own = {}
        if changed := _changed(weights, self._start):
            own = {f"buffers-{version}": store.put(content_key("buffers", changed), "buffers", changed)}
        card = TaskCard(
            name=name,
            uid=version,
            classes=[],
            templates=[],
            source=str(weights.path.absolute()),
            fingerprint=fingerprint,
            method=config.method,
            train_key=train,
            learned_in=version,
            pictures={"train": 0, "test": 0},
        )
        cards = [*(parent.tasks if parent else []), card]
        return Manifest(
            version=version,
            parent=parent.version if parent else None,
            kind="learn",
            tasks=[each.model_copy(update={"figures": dict(fused.fidelity[each.name])}) for each in cards],
            objects={**task_objects(parent), **own, **fused.objects},
            state={"method": fused.meta, "trained": train},
            settings=config.model_dump(exclude=PLACEMENT),
            message=f"merged {name}",
        )


def _key(fingerprint: str) -> str:
    return f"merge-{fingerprint[:24]}"


def _changed(weights: Weights, start: Weights) -> dict[str, Any]:
    """Running statistics that differ from the base's, f32 by name; a version keeps them for each task, not fused."""
    pairs = {name: (as_f32(weights[name]), as_f32(start[name])) for name in start.statistics()}
    return {name: own for name, (own, before) in pairs.items() if not np.array_equal(own, before)}


def _delta(layout: Layout, weights: Weights, start: Weights) -> Any:
    """f32[total]: tuned minus base in float32, one tensor at a time."""
    vector = np.zeros(layout.total, np.float32)
    for name, view in layout.views(vector).items():
        np.subtract(as_f32(weights[name]), as_f32(start[name]), out=view)
    return vector
