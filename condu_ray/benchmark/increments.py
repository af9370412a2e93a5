"""Class-incremental streams: the classes of a set, in a fixed order, a few a session; and published settings by name.

Bm-IncN: m classes first, then N a session; B0 starts with N. Batch, bias of the fusion, distance of similar texts,
number of draws and shrinkage of the recipes are those of RAPF's public configurations (arXiv 2407.14143), B100-20 of
ImageNet-R and the like among them; UCF-101 has none there and takes those of CIFAR-100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from condu_ray.benchmark.protocols import FROM_TORCHVISION, places_of
from condu_ray.benchmark.stream import Stream
from condu_ray.data import classes_of
from condu_ray.data.part import ordered
from condu_ray.data.torchvision_sets import PREFIX
from condu_ray.errors import ConfigError, nearest
from condu_ray.paths import as_path

ORDER = "1993"
"""The seed of the class order that most of the field uses."""

_BASE = re.compile(r"b(?P<base>[0-9]+)")
_RECIPE = re.compile(r"(?P<set>.+)-b(?P<base>[0-9]+)-(?P<increment>[0-9]+)")


@dataclass(frozen=True)
class DataSet:
    """folders: how its folder may be called. torchvision: its name there, None without. classes: how many it has."""

    folders: tuple[str, ...]
    torchvision: str | None
    classes: int
    settings: dict[str, Any]


def _settings(batch: int, bias: float, distance: float, factor: float, shrinkage: str) -> dict[str, Any]:
    return {
        "model": "ViT-B-16-quickgelu",
        "pretrained": "openai",
        "adapter.epochs": 15,
        "adapter.batch_size": batch,
        "adapter.mix_bias": bias,
        "adapter.hinge_distance": distance,
        "memory.per_epoch": round(1000 * factor),
        "memory.shrinkage": shrinkage,
        "train.towers": "image",
    }


SETS = {
    "cifar100": DataSet(("cifar100",), "CIFAR100", 100, _settings(100, 0.6, 0.55, 2, "none")),
    "imagenet-r": DataSet(("imagenet-r", "imagenetr"), None, 200, _settings(64, 0.7, 0.65, 2, "rapf")),
    "cub200": DataSet(("cub200", "cub", "cub200_2011"), None, 200, _settings(32, 0.8, 0.65, 2, "rapf")),
    "ucf101": DataSet(("ucf101", "ucf"), None, 101, _settings(100, 0.6, 0.55, 2, "none")),
}

OF_ONE_CUT = {"cifar100-b50-5": {"adapter.batch_size": 50, "memory.per_epoch": 4000}}
"""What RAPF's configurations change for one cut of a set."""

RECIPES = (
    *("cifar100-b0-10", "cifar100-b50-10", "cifar100-b50-5"),
    *("imagenet-r-b0-20", "imagenet-r-b100-20", "cub200-b0-20", "ucf101-b0-10"),
)
"""Names that are understood besides; any other base and increment of these sets is one too."""


def is_incremental(name: str) -> bool:
    """Whether a protocol's name is one of class increments: `b0`, `b50`, or a set's, `cifar100-b0-10`."""
    found = _RECIPE.fullmatch(name)
    return bool(_BASE.fullmatch(name) or (found and found["set"] in SETS))


def increments(name: str, data: str, increment: int | None, order: str | None) -> Stream:
    """The stream of a protocol that `is_incremental` knows.

    data: for b0 and the like one source or several, separated by commas, as `data.open_task` takes them, one set after
    another; for a set by name the folder that holds it, or `torchvision`. order: a seed or a file, see data/part.py.
    Raises ConfigError for an increment that is missing or leaves a session with one class, DataError for the data.
    """
    order = order or ORDER
    if not order.isdecimal():
        order = str(as_path(order).absolute())
    if (base := _BASE.fullmatch(name)) is not None:
        if increment is None:
            raise ConfigError(f"--protocol {name} needs the number of classes a session", "give --increment N")
        return _stream([_whole(each) for each in data.split(",")], int(base["base"]), increment, order, {})
    recipe = _RECIPE.fullmatch(name)
    assert recipe is not None, "is_incremental knows the name"
    if increment is not None:
        raise ConfigError(f"--increment {increment} beside --protocol {name}", "leave one out: the name says it")
    chosen = SETS[recipe["set"]]
    source = _source(recipe["set"], chosen, data)
    settings = {**chosen.settings, **OF_ONE_CUT.get(name, {})}
    return _stream([source], int(recipe["base"]), int(recipe["increment"]), order, settings)


def _source(name: str, chosen: DataSet, data: str) -> str:
    if data != FROM_TORCHVISION:
        return places_of(data, {name: chosen.folders}, name)[name]
    if chosen.torchvision is None:
        known = ", ".join(each for each, found in SETS.items() if found.torchvision)
        raise ConfigError(f"torchvision has no {name} as pictures with one label", f"give its folder; it has {known}")
    return PREFIX + chosen.torchvision


def _whole(source: str) -> str:
    path = as_path(source)
    return str(path.absolute()) if path.exists() else source


def _stream(sources: Sequence[str], base: int, increment: int, order: str, settings: Mapping[str, Any]) -> Stream:
    """A session for each cut of each set; names count over all sets."""
    parts: list[tuple[str, list[str]]] = []
    for source in sources:
        classes = classes_of(source)
        names = [classes[place] for place in ordered(classes, order)]
        for first, last in cuts(len(classes), base, increment):
            parts.append((f"{source}#{first}-{last}@{order}", names[first - 1 : last]))
    digits = len(str(len(parts)))
    named = {f"session-{number:0{digits}d}": part for number, part in enumerate(parts, start=1)}
    return Stream(
        tasks={name: source for name, (source, _) in named.items()},
        settings=settings,
        classes={name: classes for name, (_, classes) in named.items()},
    )


def cuts(classes: int, base: int, increment: int) -> list[tuple[int, int]]:
    """(first, last) of each session, from 1: `base` classes (0: as many as an increment), then `increment` each.

    The last session takes what is left, with a single class left over going to the one before. Raises ConfigError for
    sessions of one class.
    """
    first = base or increment
    if min(first, increment) < 2:
        raise ConfigError(f"sessions of {min(first, increment)} classes", "give at least two classes a session")
    if first > classes:
        raise ConfigError(f"a first session of {first} of {classes} classes", "give a smaller one")
    ends = [*range(first, classes, increment), classes]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return list(zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True))


def unknown(name: str, others: Sequence[str]) -> ConfigError:
    """The error for a name that is no protocol."""
    known = [*others, "b0", "b50", *RECIPES]
    return ConfigError(f"--protocol {name} is not known", nearest(name, known))
