"""The kinds of store that the contract tests run against, and small valid records to put into them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_memory_s3 import InMemoryS3

from condu_ray.store import Manifest, ObjectRef, Store, StoreHeader, TaskCard, bucket, create_store


@pytest.fixture(scope="session")
def make_header() -> Callable[..., StoreHeader]:
    def make(**changes: Any) -> StoreHeader:
        fields: dict[str, Any] = {
            "method": "condu",
            "model": {"name": "tiny", "pretrained": None},
            "model_sha256": "0" * 64,
            "layout": {"tensors": [["a", [2, 3]]]},
            "settings": {"granularity": "tensor"},
        }
        return StoreHeader(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def make_card() -> Callable[..., TaskCard]:
    def make(name: str, **changes: Any) -> TaskCard:
        fields: dict[str, Any] = {
            "name": name,
            "uid": 0,
            "classes": ["cat", "dog"],
            "templates": ["a photo of a {}."],
            "source": "pictures/pets",
            "fingerprint": "f" * 64,
            "method": "condu",
            "train_key": f"train-{name}",
            "learned_in": 1,
            "pictures": {"train": 8, "test": 4},
            "figures": {"accuracy": 91.5, "zero_shot": None},
        }
        return TaskCard(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def make_manifest(make_card: Callable[..., TaskCard]) -> Callable[..., Manifest]:
    def make(version: int, objects: dict[str, ObjectRef] | None = None, **changes: Any) -> Manifest:
        fields: dict[str, Any] = {
            "version": version,
            "parent": version - 1 or None,
            "kind": "learn",
            "tasks": [make_card("pets")],
            "objects": objects or {},
            "created": "2026-01-02T03:04:05+00:00",
        }
        return Manifest(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def publish(make_manifest: Callable[..., Manifest]) -> Callable[[Store, int], ObjectRef]:
    """Commits a version with one object of its own, whose array holds the version number."""

    def put_and_commit(store: Store, version: int) -> ObjectRef:
        ref = store.put(f"key-{version}", "u", {"u": np.full(100, version, np.float32)})
        store.commit(make_manifest(version, {"u": ref}))
        return ref

    return put_and_commit


@pytest.fixture(params=["local", "s3", "s3-in-memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of this kind can be made; a further kind joins the contract tests here."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3_bucket')}/some/store"
    if request.param == "s3-in-memory":
        request.getfixturevalue("s3_in_memory")
        return "s3://memory/store"
    return str(tmp_path / "store")


@pytest.fixture
def s3_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InMemoryS3:
    """Every S3 client that is made from now on speaks to this server, which is in this process."""
    server = InMemoryS3()
    monkeypatch.setattr(bucket, "make_client", lambda: server)
    monkeypatch.setenv("CONDU_CACHE", str(tmp_path / "cache"))
    return server


@pytest.fixture
def store(url: str, make_header: Callable[..., StoreHeader]) -> Store:
    return create_store(url, make_header())


@pytest.fixture
def damage(store: Store, tmp_path: Path) -> Callable[[ObjectRef, Callable[[bytes], bytes] | None], None]:
    """Changes an object's bytes behind the store's back; None removes it. What this machine has cached of it goes."""

    def change(ref: ObjectRef, how: Callable[[bytes], bytes] | None) -> None:
        if store.url.startswith("s3://"):
            place, _, folder = store.url.removeprefix("s3://").partition("/")
            client, key = bucket.make_client(), f"{folder}/{ref.path}"
            there = client.get_object(Bucket=place, Key=key)
            body, meta = there["Body"].read(), there["Metadata"]
            client.delete_object(Bucket=place, Key=key)
            if how is not None:
                client.put_object(Bucket=place, Key=key, Body=how(body), Metadata=meta)
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            return
        path = Path(store.url) / ref.path
        body = path.read_bytes()
        path.unlink()
        if how is not None:
            path.write_bytes(how(body))

    return change
