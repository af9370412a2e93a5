"""MTIL (ZSCL, arXiv 2303.06628): eleven data sets in two orders, and the training settings of ConDU's public scripts.

Class names and templates are those that stand beside each set's pictures; the split is the set's own where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from condu_ray.benchmark.stream import Stream
from condu_ray.data.torchvision_sets import PREFIX
from condu_ray.errors import ConfigError, DataError, nearest
from condu_ray.paths import as_path

SEED = 42
FROM_TORCHVISION = "torchvision"
"""Instead of a folder: every set by its torchvision name."""


@dataclass(frozen=True)
class DataSet:
    """torchvision: its name there. folders: how its folder may be called, besides its own name. lr, lora_lr: peak rates
    where all parameters are trained, and where adapters are."""

    torchvision: str
    folders: tuple[str, ...]
    lr: float
    lora_lr: float


SETS = {
    "Aircraft": DataSet("FGVCAircraft", ("fgvc_aircraft",), 5e-5, 1e-3),
    "Caltech101": DataSet("Caltech101", (), 1e-5, 5e-4),
    "CIFAR100": DataSet("CIFAR100", (), 1e-5, 2e-3),
    "DTD": DataSet("DTD", (), 1e-5, 2e-3),
    "EuroSAT": DataSet("EuroSAT", (), 1e-5, 1.5e-4),
    "Flowers": DataSet("Flowers102", ("flowers102", "oxford_flowers", "oxford_flowers102"), 1e-5, 1e-5),
    "Food": DataSet("Food101", ("food101",), 1e-5, 2e-3),
    "MNIST": DataSet("MNIST", (), 5e-5, 1e-3),
    "OxfordPet": DataSet("OxfordIIITPet", ("oxford_pets", "oxford_iiit_pet", "pets"), 1e-5, 1.5e-4),
    "StanfordCars": DataSet("StanfordCars", ("cars",), 1e-5, 2e-3),
    "SUN397": DataSet("SUN397", (), 1e-5, 1.5e-3),
}

ORDERS = {
    "mtil-1": tuple(SETS),  # by alphabet
    "mtil-2": (
        *("StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397"),
        *("Aircraft", "Caltech101", "DTD", "EuroSAT", "CIFAR100"),
    ),
}

SETTINGS: dict[str, Any] = {
    "model": "ViT-B-16-quickgelu",
    "pretrained": "openai",
    "train.steps": 1000,
    "train.batch_size": 64,
    "train.warmup": 0.1,
    "train.weight_decay": 0.0,
    "train.label_smoothing": 0.2,
    "train.towers": "both",
    "lora.rank": 64,
    "lora.targets": "mlp",
    "vote.k": 4,
}


def protocol(name: str, data: str) -> Stream:
    """The stream `mtil-1` or `mtil-2` over the sets below the folder `data`, or `torchvision`.

    Each set is a folder (or .csv file) that is called as the set, in any case, with or without `_` and `-`. Raises
    ConfigError for an unknown protocol, DataError that lists every set that is missing.
    """
    if name not in ORDERS:
        raise ConfigError(f"--protocol {name} is not known", nearest(name, ORDERS))
    order = ORDERS[name]
    return Stream(
        tasks=_sources(data, order),
        settings=SETTINGS,
        full={each: {"train.lr": SETS[each].lr} for each in order},
        lora={each: {"train.lr": SETS[each].lora_lr} for each in order},
    )


def _sources(data: str, order: tuple[str, ...]) -> dict[str, str]:
    if data == FROM_TORCHVISION:
        return {name: PREFIX + SETS[name].torchvision for name in order}
    return places_of(data, {name: (name, *SETS[name].folders) for name in order}, f"the {len(order)} sets of MTIL")


def places_of(data: str, called: Mapping[str, Sequence[str]], what: str) -> dict[str, str]:
    """Set -> its folder or .csv file below the folder `data`, by any of the names that it is called by.

    Raises DataError that lists every set that is missing. what: the sets, in words.
    """
    root = as_path(data)
    if not root.is_dir():
        raise DataError(f"--data {data} is not a folder", f"give the folder that holds {what}")
    there = {
        _plain(child.stem if child.suffix.lower() == ".csv" else child.name): child
        for child in sorted(root.iterdir())
        if child.is_dir() or child.suffix.lower() == ".csv"
    }
    found = {
        name: next((there[_plain(each)] for each in names if _plain(each) in there), None)
        for name, names in called.items()
    }
    missing = [" or ".join(called[name]) for name, place in found.items() if place is None]
    if missing:
        raise DataError(
            f"{data} lacks {len(missing)} of {what}: {', '.join(missing)}",
            "put each there as an image folder, a webdataset folder or a .csv file of that name",
        )
    return {name: str(place) for name, place in found.items()}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
