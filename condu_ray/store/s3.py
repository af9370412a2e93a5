"""A store in a folder of an S3 bucket, or of any server that speaks S3 and honours preconditions.

store.json                          the header
versions/00000001.json              one manifest a version; empty: gc has removed it, and its number stays taken
objects/<key>/<name>.safetensors    written once, never changed
marks/<key>/<name>                  when an object was last found again, for gc
gc/<id>.json                        what a gc that runs now is about to remove
uploads/…                           large objects on their way
work/<key>/                         unfinished work of a session; no reader looks there

There are no locks. A version appears by one conditional write (`If-None-Match: *`). Between a commit and a gc, each
says what it is about to do before it looks what the other is about to do: see `commit` and `s3_gc.collect`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condu_ray.errors import NotFound, StoreError
from condu_ray.store import tensors
from condu_ray.store.base import (
    IN_USE_S,
    Digest,
    GcReport,
    check_turn,
    damaged,
    differing,
    may_name,
    misfit,
    missing_version,
    object_path,
    other_bytes,
    taken,
)
from condu_ray.store.bucket import Bucket, Entry
from condu_ray.store.disk_cache import DiskCache, store_cache
from condu_ray.store.files import hash_file
from condu_ray.store.manifest import Manifest, ObjectRef, StoreHeader, dump, parse_header, parse_manifest
from condu_ray.store.s3_gc import collect, doomed, mark_of

if TYPE_CHECKING:
    import numpy as np

_MANIFEST = re.compile(r"versions/(\d{8,})\.json")
_MARK_AGAIN_S = 3600.0

# What get() has checked in this process: path in the cache, sha256, and the file's identity, size and time of change.
_checked: set[tuple[str, str, int, int, int]] = set()


class S3Store:
    """A `Store` below an s3:// URL. Make one with `create` or `open`."""

    def __init__(self, bucket: Bucket, cache: DiskCache, header: StoreHeader) -> None:
        self._bucket, self._cache, self._header = bucket, cache, header
        self._marked: dict[str, float] = {}  # path -> monotonic seconds
        self._named: dict[int, frozenset[str]] = {}  # version -> paths; a manifest never changes

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def url(self) -> str:
        return self._bucket.url

    @property
    def header(self) -> StoreHeader:
        return self._header

    @classmethod
    def create(cls, url: str, header: StoreHeader) -> S3Store:
        """Makes a store, or opens the one that is there if it was made with the same header (its id aside).

        Raises StoreError if another store is there, it cannot be written, or the bucket ignores preconditions.
        """
        bucket = Bucket(url)
        if bucket.look("store.json") is None:
            if not bucket.honours_preconditions():
                what = f"bucket {bucket.name} ignores If-None-Match: one session could overwrite another's version"
                raise StoreError(what, "use a server with conditional writes, or a folder as --store")
            bucket.create("store.json", dump(header))  # if another process was first, what it made is compared below
        store = cls.open(url)
        if fault := differing(store, header):
            raise fault
        return store

    @classmethod
    def open(cls, url: str) -> S3Store:
        """Opens a store and writes nothing. Raises NotFound if none is there, StoreError if it cannot be read."""
        bucket, cache = Bucket(url), store_cache()
        raw = bucket.read("store.json")
        if raw is None:
            raise NotFound(f"no store at {bucket.url}", "learn a task first with `condu-ray learn`, or check --store")
        return cls(bucket, cache, parse_header(raw, f"{bucket.url}/store.json"))

    def versions(self) -> list[int]:
        return sorted(self._manifests())

    def manifest(self, version: int | None = None) -> Manifest:
        known = self.versions() if version is None else []
        if version is None and not known:
            raise missing_version(None, known, self.url)
        number = known[-1] if version is None else version
        path = _manifest_path(number)
        raw = self._bucket.read(path)
        if not raw:  # never there, or removed
            raise missing_version(number, self.versions(), self.url)
        manifest = parse_manifest(raw, f"{self.url}/{path}")
        if manifest.version != number:
            raise StoreError(
                f"{self.url}/{path} says that it is version {manifest.version}", "put the file back from a copy"
            )
        return manifest

    def put(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> ObjectRef:
        path = object_path(key, name)
        with self._cache.temporary() as file:
            ref = _spool(file, tensors.pieces(arrays), path)
            there = self.find(key, name)
            if there is None and not self._bucket.create_from(path, file, ref.sha256):
                there = self.find(key, name)
            if there not in (None, ref):
                raise other_bytes(self, path)
            self._cache.put(file, ref.sha256)
        return ref

    def find(self, key: str, name: str) -> ObjectRef | None:
        path = object_path(key, name)
        entry = self._marked_entry(path)
        return None if entry is None else self._ref(entry)

    def touch(self, path: str) -> bool:
        return self._marked_entry(path) is not None

    def get(self, ref: ObjectRef) -> dict[str, np.ndarray[Any, Any]]:
        return tensors.read(self._map(ref), f"{self.url}/{ref.path}")

    def fault(self, ref: ObjectRef) -> str | None:
        digest = Digest()

        def begin() -> None:
            nonlocal digest
            digest = Digest()

        if not self._bucket.pieces(ref.path, lambda piece: digest.update(piece), begin):
            return "the file is missing"
        return ref.fault(digest.ref(ref.path))

    def commit(self, manifest: Manifest) -> None:
        """As `Store.commit`. In this order: mark what is named, look for a gc that wants it, look that it is there.

        A gc first says what it wants, then looks for marks. So one of the two sees the other, whoever is faster.
        """
        newest = max(self._taken(), default=0)
        check_turn(self, manifest, newest)
        safe = self._paths(newest) if newest else frozenset()  # no gc removes the newest version
        refs = {ref.path: ref for ref in manifest.objects.values() if ref.path not in safe}
        self._mark(refs)
        going = doomed(self._bucket) & refs.keys()
        if going:
            raise StoreError(
                f"{self.url}/{min(going)} is being removed by a gc that runs now",
                "run the same command again; nothing was published",
            )
        self._must_be_there(manifest)
        if not self._bucket.create(_manifest_path(manifest.version), dump(manifest)):
            raise taken(self, manifest)
        with suppress(StoreError):  # it is published; gc takes old marks away
            self._unmark(refs)

    def gc(self, keep: int | None = None, *, dry_run: bool = False, in_use_s: float = IN_USE_S) -> GcReport:
        if keep is not None and keep < 1:
            raise StoreError(f"gc must keep at least 1 version (found {keep})", "the newest always stays")
        return collect(self._bucket, self._manifests, self._paths, keep, dry_run=dry_run, in_use_s=in_use_s)

    def discard(self, key: str, name: str) -> None:
        path = object_path(key, name)
        if not may_name(self.versions(), self._paths, path):
            self._bucket.delete([path, mark_of(path)])
            self._marked.pop(path, None)

    def work(self, key: str) -> str:
        object_path(key, "work")
        return "/".join((self.url, "work", key))

    def save_work(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        path = _work_path(key, name)
        with self._cache.temporary() as file:
            ref = _spool(file, tensors.pieces(arrays), object_path(key, name))
            self._bucket.write_from(path, file, ref.sha256)

    def load_work(self, key: str, name: str) -> dict[str, np.ndarray[Any, Any]] | None:
        path = _work_path(key, name)
        entry, raw = self._bucket.look(path), self._bucket.read(path)
        if entry is None or raw is None or hashlib.sha256(raw).hexdigest() != entry.sha256:
            return None
        return tensors.read(raw, f"{self.url}/{path}")

    def discard_work(self, key: str) -> None:
        object_path(key, "work")
        self._bucket.delete([entry.path for entry in self._bucket.entries(f"work/{key}/")])

    def _taken(self) -> dict[int, Entry]:
        """Version numbers that were ever given, and their manifests, which are empty where gc has removed them."""
        found = ((_MANIFEST.fullmatch(entry.path), entry) for entry in self._bucket.entries("versions/"))
        return {int(match[1]): entry for match, entry in found if match}

    def _manifests(self) -> dict[int, Entry]:
        return {number: entry for number, entry in self._taken().items() if entry.bytes}

    def _paths(self, version: int) -> frozenset[str]:
        """Paths of the objects that a version names; none if it was removed in this moment."""
        if version not in self._named:
            raw = self._bucket.read(_manifest_path(version))
            refs = parse_manifest(raw, f"{self.url}/{_manifest_path(version)}").objects.values() if raw else ()
            self._named[version] = frozenset(ref.path for ref in refs)
        return self._named[version]

    def _marked_entry(self, path: str) -> Entry | None:
        """What is at this path, marked as in use unless it was marked lately."""
        entry = self._bucket.look(path)
        if entry is not None and time.monotonic() - self._marked.get(path, -_MARK_AGAIN_S) >= _MARK_AGAIN_S:
            self._mark([path])
            entry = self._bucket.look(path)  # a gc that did not see the mark may have been at it
        return entry

    def _mark(self, paths: Collection[str]) -> None:
        self._bucket.touch([mark_of(path) for path in paths])
        self._marked.update(dict.fromkeys(paths, time.monotonic()))

    def _unmark(self, paths: Collection[str]) -> None:
        for path in paths:
            self._marked.pop(path, None)
        self._bucket.delete([mark_of(path) for path in paths])

    def _must_be_there(self, manifest: Manifest) -> None:
        for name, ref in manifest.objects.items():
            entry = self._bucket.look(ref.path)
            if fault := misfit(self, manifest, name, None if entry is None else entry.bytes):
                raise fault

    def _ref(self, entry: Entry) -> ObjectRef | None:
        if entry.sha256 is not None:
            return ObjectRef(path=entry.path, bytes=entry.bytes, sha256=entry.sha256)
        digest = Digest()  # of a store that another program copied here

        def begin() -> None:
            nonlocal digest
            digest = Digest()

        there = self._bucket.pieces(entry.path, lambda piece: digest.update(piece), begin)
        return digest.ref(entry.path) if there else None

    def _map(self, ref: ObjectRef) -> Any:
        """Returns the object's bytes as a read-only map of the cached file, checked once in this process."""
        for _ in range(2):
            path = self._cache.find(ref.sha256, ref.bytes) or self._fetch(ref)
            try:
                with open(path, "rb") as file:
                    state = os.fstat(file.fileno())
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if ref.bytes else b""
                known = (str(path), ref.sha256, state.st_ino, state.st_size, state.st_mtime_ns)
                if known in _checked or hash_file(path).ref(ref.path) == ref:
                    _checked.add(known)
                    return mapped
            except OSError:
                continue  # another process made room in this moment
            self._cache.drop(ref.sha256)  # this machine's disk has damaged it
        raise StoreError(f"the cache of {self.url}/{ref.path} goes as soon as it is filled", "raise CONDU_CACHE_GIB")

    def _fetch(self, ref: ObjectRef) -> Path:
        """Reads an object into the cache. Raises DamagedObject."""
        with self._cache.temporary() as file:
            digest = Digest()
            with open(file, "wb") as target:

                def begin() -> None:
                    nonlocal digest
                    digest = Digest()
                    target.seek(0)
                    target.truncate()

                def take(piece: bytes) -> None:
                    digest.update(piece)
                    target.write(piece)

                there = self._bucket.pieces(ref.path, take, begin)
            fault = ref.fault(digest.ref(ref.path)) if there else "the file is missing"
            if fault is not None:
                raise damaged(self, ref, fault)
            return self._cache.put(file, ref.sha256)


def _manifest_path(version: int) -> str:
    return f"versions/{version:08d}.json"


def _work_path(key: str, name: str) -> str:
    return object_path(key, name).replace("objects/", "work/", 1)


def _spool(file: Path, pieces: Iterable[Any], path: str) -> ObjectRef:
    digest = Digest()
    with open(file, "xb") as target:
        target.writelines(digest.through(pieces))
    return digest.ref(path)
