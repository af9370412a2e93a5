"""Real processes: several that commit at once, and one that is killed at any instant."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from condu_ray.store import Store, open_store

WINS = 8


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where processes can make a store: not in the memory of one."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3_bucket')}/store"
    return str(tmp_path / "store")


# A session in short: read the newest version, put an object that holds the next number, commit, say so; again.
WRITER = """
import sys
import numpy as np
from condu_ray.errors import VersionTaken
from condu_ray.store import Manifest, open_store

store, name, wins = open_store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
while wins:
    newest = max(store.versions(), default=0)
    version = newest + 1
    objects = {"u": store.put(f"{name}-{version}", "u", {"u": np.full(50_000, version, np.float32)})}
    if newest:
        objects["before"] = store.manifest(newest).objects["u"]
    try:
        store.commit(Manifest(version=version, parent=newest or None, kind="learn", objects=objects, message=name))
    except VersionTaken:
        continue
    wins -= 1
    print(version, flush=True)
"""


def start(url: str, name: str, wins: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, url, name, str(wins)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def assert_whole(store: Store) -> list[int]:
    """Every version is readable, names objects that are sound, and holds its own number; returns the numbers."""
    numbers = store.versions()
    assert numbers == list(range(1, len(numbers) + 1))
    for number in numbers:
        manifest = store.manifest(number)
        assert set(store.get(manifest.objects["u"])["u"].tolist()) == {number}
        if number > 1:
            assert set(store.get(manifest.objects["before"])["u"].tolist()) == {number - 1}
    return numbers


def test_several_processes_commit_and_none_is_lost(store: Store) -> None:
    children = [start(store.url, f"writer{index}", WINS) for index in range(3)]
    for child in children:
        go(child)
    told = {child.args[4]: [int(line) for line in child.communicate(timeout=60)[0].split()] for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert assert_whole(store) == list(range(1, 3 * WINS + 1))
    for name, numbers in told.items():
        assert [store.manifest(number).message for number in numbers] == [name] * WINS


def test_killed_at_any_instant_every_version_is_whole(store: Store) -> None:
    rng = random.Random(0)
    published = 0
    kills = 4 if store.url.startswith("s3://") else 15
    for kill in range(kills):
        with start(store.url, f"kill{kill}", 10_000) as child:
            assert child.stdout is not None
            go(child)
            told = 0
            for _ in range(rng.randint(0, 3)):
                told = int(child.stdout.readline())
            try:
                child.wait(timeout=rng.uniform(0.0, 0.03))  # some instant of the next commit
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
            told = max([told, *map(int, child.stdout.read().split())])
        numbers = assert_whole(open_store(store.url))
        assert len(numbers) >= max(told, published)
        published = len(numbers)
    assert published >= kills
    named = {ref.path for number in store.versions() for ref in store.manifest(number).objects.values()}
    report = store.gc(in_use_s=0)
    assert not named & set(report.objects)
    if not store.url.startswith("s3://"):
        root = Path(store.url)
        assert {path.relative_to(root).as_posix() for path in root.glob("objects/*/*")} == named
        assert list((root / "tmp").iterdir()) == []
    assert_whole(store)


def test_a_killed_creation_leaves_a_store_or_none(tmp_path: Path, make_header: Any) -> None:
    program = (
        "import json, sys; from condu_ray.store import StoreHeader, create_store; print('ready', flush=True)\n"
        "sys.stdin.readline(); create_store(sys.argv[1], StoreHeader(**json.loads(sys.argv[2])))"
    )
    header = make_header()
    rng = random.Random(1)
    for kill in range(5):
        url = str(tmp_path / f"store{kill}")
        command = [sys.executable, "-c", program, url, json.dumps(header.model_dump())]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            go(child)
            try:
                child.wait(timeout=rng.uniform(0.0, 0.004))
            except subprocess.TimeoutExpired:
                child.kill()
        if (Path(url) / "store.json").exists():
            assert open_store(url).header == header
