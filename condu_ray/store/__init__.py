"""Where versions live: immutable objects, numbered manifests, one conditional write as the only moment of truth."""

from __future__ import annotations

from pathlib import Path

from condu_ray.errors import StoreError
from condu_ray.store.base import IN_USE_S, GcReport, Store, object_path, put_first
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
    "absolute_url",
    "create_store",
    "object_path",
    "open_store",
    "put_first",
]


def open_store(url: str | Path) -> Store:
    """Opens the store in a folder (or file:// URL) or below s3://BUCKET/FOLDER, and writes nothing.

    Raises NotFound if none is there, StoreError if it cannot be read or the kind of URL is unknown.
    """
    if _kind(url) == "s3":
        from condu_ray.store.s3 import S3Store

        return S3Store.open(str(url))
    return LocalStore.open(str(url))


def create_store(url: str | Path, header: StoreHeader) -> Store:
    """Makes a store, or opens the one that is there if it was made with the same header (its id aside).

    Raises StoreError if another store is there, it cannot be written, the kind of URL is unknown, or a bucket ignores
    preconditions.
    """
    if _kind(url) == "s3":
        from condu_ray.store.s3 import S3Store

        return S3Store.create(str(url), header)
    return LocalStore.create(str(url), header)


def absolute_url(url: str | Path) -> str:
    """The same place, named so that it means the same from any folder."""
    return str(url).rstrip("/") if _kind(url) == "s3" else LocalStore.place(str(url))


def _kind(url: str | Path) -> str:
    kind, colon, _ = str(url).partition("://")
    if colon and kind not in ("file", "s3"):
        raise StoreError(f"{url}: a store cannot be of kind {kind}://", "give a folder, or s3://BUCKET/FOLDER")
    return kind if colon else "file"
