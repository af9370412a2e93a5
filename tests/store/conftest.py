"""The kinds of store that the contract tests run against, and small valid records to put into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from condu_ray.store import Manifest, ObjectRef, Store, StoreHeader, TaskCard, create_store


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


@pytest.fixture(params=["local"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of this kind can be made; a further kind joins the contract tests here."""
    return str({"local": tmp_path / "store"}[request.param])


@pytest.fixture
def store(url: str, make_header: Callable[..., StoreHeader]) -> Store:
    return create_store(url, make_header())


@pytest.fixture
def damage(store: Store) -> Callable[[ObjectRef, Callable[[bytes], bytes] | None], None]:
    """Changes an object's bytes behind the store's back; None removes it."""

    def change(ref: ObjectRef, how: Callable[[bytes], bytes] | None) -> None:
        path = Path(store.url) / ref.path
        body = path.read_bytes()
        path.unlink()
        if how is not None:
            path.write_bytes(how(body))

    return change
