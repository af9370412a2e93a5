"""Where versions live: immutable objects, numbered manifests, one conditional write as the only moment of truth."""

from __future__ import annotations

from pathlib import Path

from condu_ray.errors import StoreError
from condu_ray.store.base import IN_USE_S, GcReport, Store
from condu_ray.store.local import LocalStore
from condu_ray.store.manifest import Manifest, ObjectRef, StoreHeader, TaskCard

__all__ = [
    "IN_USE_S",
    "GcReport",
    "LocalStore",
    "Manifest",
    "ObjectRef",
    "Store",
    "StoreHeader",
    "TaskCard",
    "create_store",
    "open_store",
]


def open_store(url: str | Path) -> Store:
    """Opens the store at a folder (or file:// URL) and writes nothing.

    Raises NotFound if none is there, StoreError if it cannot be read or the kind of URL is unknown.
    """
    return LocalStore.open(_folder(url))


def create_store(url: str | Path, header: StoreHeader) -> Store:
    """Makes a store, or opens the one that is there if it was made with the same header (its id aside).

    Raises StoreError if another store is there, it cannot be written, or the kind of URL is unknown.
    """
    return LocalStore.create(_folder(url), header)


def _folder(url: str | Path) -> str:
    kind, colon, _ = str(url).partition("://")
    if colon and kind != "file":
        raise StoreError(f"{url}: a store cannot be of kind {kind}://", "give a folder or a file:// URL")
    return str(url)
