"""Small generated pictures, and the folders and tars that hold them; tests reach the functions through `make`."""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

_THIS = sys.modules[__name__]  # now: other folders' conftest modules take the same name later


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CONDU_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def make() -> ModuleType:
    """This module: a test folder is not a package, so tests cannot import it."""
    return _THIS


def picture_bytes(number: int, size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """A picture whose pixels are drawn from `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(path: Path, body: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def image_folder(root: Path, classes: Iterable[str], count: int = 5, first: int = 0) -> Path:
    """root/CLASS/N.png, `count` different pictures a class."""
    number = first
    for name in classes:
        for _ in range(count):
            write(root / name / f"{number}.png", picture_bytes(number))
            number += 1
    return root


def tar_bytes(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return file.getvalue()


def pairs(labels: Iterable[int], first: int = 0, ending: str = "png") -> dict[str, bytes]:
    """Members of a webdataset tar: sN.png and sN.cls."""
    files: dict[str, bytes] = {}
    for number, label in enumerate(labels, start=first):
        files[f"s{number}.{ending}"] = picture_bytes(number, kind="JPEG" if ending.startswith("jp") else ending.upper())
        files[f"s{number}.cls"] = str(label).encode()
    return files


def tar_folder(root: Path, classes: Iterable[str], packed: bool = False, test: bool = True) -> Path:
    """A webdataset folder: 4 training pictures and 2 test pictures a class."""
    names = list(classes)
    write(root / "classnames.txt", "\n".join(names).encode())
    parts = {"train": pairs([n for n in range(len(names)) for _ in range(4)])}
    if test:
        parts["test"] = pairs([n for n in range(len(names)) for _ in range(2)], first=1000)
    for part, files in parts.items():
        body = tar_bytes(files)
        write(root / part / "0.tar", gzip.compress(body, mtime=0) if packed else body)
        write(root / part / "nshards.txt", b"1\n")
    return root
