"""Classification data sets of torchvision by name, written once as picture files into the cache.

The only place that imports torchvision; `KNOWN` answers without it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from PIL import Image

from condu_ray.data.cache import cache_folder, fill
from condu_ray.data.folder import list_folder
from condu_ray.data.listing import CLASS_FILE, Listing
from condu_ray.errors import DataError, nearest

PREFIX = "torchvision:"
_Arguments = tuple[dict[str, Any], ...]
_FLAG: tuple[_Arguments, _Arguments] = ({"train": True},), ({"train": False},)
_SPLIT: tuple[_Arguments, _Arguments] = ({"split": "train"},), ({"split": "test"},)
_THREE: tuple[_Arguments, _Arguments] = ({"split": "train"}, {"split": "val"}), ({"split": "test"},)
_TRAINVAL: tuple[_Arguments, _Arguments] = ({"split": "trainval"},), ({"split": "test"},)
_NO_TEST: tuple[_Arguments, _Arguments] = ({"split": "train"},), ({"split": "val"},)
_WHOLE: tuple[_Arguments, _Arguments] = ({},), ()

# Arguments that make the training and the test part of each data set.
KNOWN: dict[str, tuple[_Arguments, _Arguments]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "CLEVRClassification": _NO_TEST,
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": (({"split": "train"}, {"split": "valid"}), ({"split": "test"},)),
    "DTD": _THREE,
    "EMNIST": (({"split": "letters", "train": True},), ({"split": "letters", "train": False},)),
    "EuroSAT": _WHOLE,
    "FGVCAircraft": _TRAINVAL,
    "FakeData": _WHOLE,
    "FashionMNIST": _FLAG,
    "Flowers102": _THREE,
    "Food101": _SPLIT,
    "GTSRB": _SPLIT,
    "Imagenette": _NO_TEST,
    "KMNIST": _FLAG,
    "MNIST": _FLAG,
    "OxfordIIITPet": _TRAINVAL,
    "PCAM": _SPLIT,
    "QMNIST": _FLAG,
    "RenderedSST2": _SPLIT,
    "SEMEION": _WHOLE,
    "STL10": _SPLIT,
    "SUN397": _WHOLE,
    "SVHN": _SPLIT,
    "StanfordCars": _SPLIT,
    "USPS": _FLAG,
}
# Larger pictures come from JPEG files, and as PNG would take ten times their room.
_LARGEST_PNG = 128


def list_torchvision(name: str, tests: bool = True) -> Listing:
    """Lists a data set of torchvision; the first time it is downloaded and written as pictures into the cache.

    Class names are the data set's own, or the label numbers where it has none. Raises DataError if the name is not
    known or the data set cannot be had.
    """
    if name not in KNOWN:
        raise DataError(f"{name!r} is not a data set of torchvision with one label a picture", nearest(name, KNOWN))
    folder = fill(cache_folder("torchvision") / name, lambda partial: _write(name, partial))
    return list_folder(folder, tests)


def _write(name: str, folder: Path) -> None:
    names: list[str] = []
    labels: set[int] = set()
    for part, arguments in zip(("train", "test"), KNOWN[name], strict=True):
        count = itertools.count()
        for chosen in arguments:
            dataset = _construct(name, chosen)
            names = names or _class_names(dataset)
            for number in range(len(dataset)):
                picture, label = dataset[number]
                labels.add(int(label))
                _save(picture, folder / part / f"{int(label):05d}", next(count))
    # A line a class folder: some count labels from 1 or 3.
    lines = [names[label] if names else str(label) for label in sorted(labels)]
    (folder / CLASS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _construct(name: str, chosen: dict[str, Any]) -> Any:
    import inspect

    import torchvision.datasets

    kind = getattr(torchvision.datasets, name)
    accepted = inspect.signature(kind).parameters
    arguments = dict(chosen)
    if "root" in accepted:
        arguments["root"] = str(cache_folder("downloads") / name)
    if "download" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        arguments["download"] = True
    try:
        return kind(**arguments)
    except Exception as error:  # network, disk, checksum, a missing package: whatever the data set's own code meets
        said = str(error).strip().splitlines()
        raise DataError(
            f"torchvision could not get {name} ({said[0][:160] if said else type(error).__name__})",
            f"check the network, or put its files into {cache_folder('downloads') / name}",
        ) from error


def _class_names(dataset: Any) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or []
    # Imagenette has several names a class.
    return [str(name[0] if isinstance(name, tuple) else name).replace("\n", " ") for name in names]


def _save(picture: Image.Image, folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if max(picture.size) <= _LARGEST_PNG:
        picture.save(folder / f"{number:07d}.png")
    else:
        picture.convert("RGB").save(folder / f"{number:07d}.jpg", quality=95)
