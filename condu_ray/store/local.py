"""A store in a folder of this machine, or of a shared file system.

store.json                          the header
versions/00000001.json              one manifest a version; empty, with newer ones: removed on S3, before a copy
objects/<key>/<name>.safetensors    written once, never changed
work/<key>/                         unfinished work of a session; no reader looks there
tmp/                                files that are being written
lock                                whoever writes holds its lock
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condu_ray.errors import NotFound, StoreError
from condu_ray.paths import as_path
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
from condu_ray.store.files import hash_file, lock, publish, refusal, temporary
from condu_ray.store.local_gc import collect
from condu_ray.store.manifest import Manifest, ObjectRef, StoreHeader, dump, parse_header, parse_manifest

if TYPE_CHECKING:
    import numpy as np

_MANIFEST = re.compile(r"(\d{8,})\.json")

# What get() has checked in this process: absolute path, sha256, and the file's identity, size and time of change.
_checked: set[tuple[str, str, int, int, int]] = set()


class LocalStore:
    """A `Store` in a folder. Make one with `create` or `open`."""

    def __init__(self, root: Path, header: StoreHeader) -> None:
        self.root = root
        self._header = header
        self._named: dict[int, frozenset[str]] = {}  # version -> paths; a manifest never changes

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    @property
    def url(self) -> str:
        return str(self.root)

    @property
    def header(self) -> StoreHeader:
        return self._header

    @staticmethod
    def place(path: str | Path) -> str:
        """The `url` that a store at this path (or file:// URL) has."""
        return str(_root(path))

    @classmethod
    def create(cls, path: str | Path, header: StoreHeader) -> LocalStore:
        """Makes a store, or opens the one that is there if it was made with the same header (its id aside).

        Raises StoreError if a store with another model, layout or method is there, or the folder cannot be written.
        """
        root = _root(path)
        try:
            for folder in (root, root / "versions", root / "objects"):
                folder.mkdir(parents=True, exist_ok=True)
            if not (root / "store.json").exists():
                with (
                    temporary(root / "tmp", [dump(header)]) as source,
                    lock(root) as locked,
                    suppress(FileExistsError),  # another process was first; what it made is compared below
                ):
                    publish(source, root / "store.json", locked)
        except OSError as error:
            raise refusal(error, "make a store in", root) from error
        store = cls.open(root)
        if fault := differing(store, header):
            raise fault
        return store

    @classmethod
    def open(cls, path: str | Path) -> LocalStore:
        """Opens a store and writes nothing. Raises NotFound if none is there, StoreError if it cannot be read."""
        root = _root(path)
        try:
            if not root.exists():
                raise NotFound(f"no store at {root}", "learn a task first with `condu-ray learn`, or check --store")
            if not root.is_dir():
                raise StoreError(f"{root} is a file, not the folder of a store", "choose another --store")
            header = parse_header((root / "store.json").read_bytes(), f"{root}/store.json")
        except FileNotFoundError as error:
            mend = "learn a task into it with `condu-ray learn`, or check --store"
            raise NotFound(f"{root} is a folder without a store (no store.json)", mend) from error
        except OSError as error:
            raise refusal(error, "read the store in", root) from error
        return cls(root, header)

    def versions(self) -> list[int]:
        found = dict[int, Path]()
        try:
            for path in (self.root / "versions").iterdir():
                if match := _MANIFEST.fullmatch(path.name):
                    found[int(match[1])] = path
        except FileNotFoundError:  # a copy that left out empty folders
            return []
        except OSError as error:
            raise refusal(error, "read the versions in", self.root) from error
        newest = max(found, default=0)  # no gc removes it: empty, it is damaged
        return sorted(number for number, path in found.items() if number == newest or not _is_empty(path))

    def manifest(self, version: int | None = None) -> Manifest:
        known = self.versions() if version is None else []
        if version is None and not known:
            raise missing_version(None, known, self.url)
        number = known[-1] if version is None else version
        path = self._manifest_path(number)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise missing_version(number, self.versions(), self.url) from None
        except OSError as error:
            raise refusal(error, "read", path) from error
        if not raw and number not in (known := self.versions()):
            raise missing_version(number, known, self.url)
        manifest = parse_manifest(raw, str(path))
        if manifest.version != number:
            raise StoreError(f"{path} says that it is version {manifest.version}", "put the file back from a copy")
        return manifest

    def put(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> ObjectRef:
        path = object_path(key, name)
        target = self.root / path
        total = Digest()
        try:
            if target.exists():
                for piece in tensors.pieces(arrays):
                    total.update(piece)
            else:
                with (
                    temporary(self.root / "tmp", total.through(tensors.pieces(arrays))) as source,
                    lock(self.root) as locked,
                    suppress(FileExistsError),  # another process was first; its bytes are compared below
                ):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    publish(source, target, locked)
                    return total.ref(path)
        except OSError as error:
            raise refusal(error, "write", target) from error
        if self.find(key, name) != total.ref(path):
            raise other_bytes(self, path)
        return total.ref(path)

    def find(self, key: str, name: str) -> ObjectRef | None:
        path = object_path(key, name)
        file = self.root / path
        try:
            digest = hash_file(file)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise refusal(error, "read", file) from error
        with suppress(OSError):  # no permission: then nobody collects garbage here either
            os.utime(file)
        return digest.ref(path)

    def touch(self, path: str) -> bool:
        file = self.root / path
        try:
            os.utime(file)
        except FileNotFoundError:
            return False
        except PermissionError:  # then nobody collects garbage here either
            return True
        except OSError as error:
            raise refusal(error, "touch", file) from error
        return True

    def get(self, ref: ObjectRef) -> dict[str, np.ndarray[Any, Any]]:
        return tensors.read(self._map(ref), f"{self.root}/{ref.path}")

    def fault(self, ref: ObjectRef) -> str | None:
        try:
            found = hash_file(self.root / ref.path).ref(ref.path)
        except FileNotFoundError:
            return "the file is missing"
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        return ref.fault(found)

    def commit(self, manifest: Manifest) -> None:
        path = self._manifest_path(manifest.version)
        body = dump(manifest)
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary(self.root / "tmp", [body]) as source, lock(self.root) as locked:
                check_turn(self, manifest, max(self.versions(), default=0))
                self._must_be_there(manifest)
                publish(source, path, locked)
        except FileExistsError:
            raise taken(self, manifest) from None
        except OSError as error:
            raise refusal(error, "write", path) from error

    def gc(self, keep: int | None = None, *, dry_run: bool = False, in_use_s: float = IN_USE_S) -> GcReport:
        if keep is not None and keep < 1:
            raise StoreError(f"gc must keep at least 1 version (found {keep})", "the newest always stays")
        try:
            with lock(self.root):
                known = self.versions()
                kept = known if keep is None else known[-keep:]
                named = {ref.path for number in kept for ref in self.manifest(number).objects.values()}
                gone = {number: self._manifest_path(number) for number in known if number not in kept}
                return collect(self.root, gone, named, dry_run=dry_run, in_use_s=in_use_s)
        except OSError as error:
            raise refusal(error, "clean", self.root) from error

    def discard(self, key: str, name: str) -> None:
        path = object_path(key, name)
        file = self.root / path
        if may_name(self.versions(), self._paths, path):  # most manifests are read before the lock is taken
            return
        try:
            with lock(self.root):
                if may_name(self.versions(), self._paths, path):
                    return
                file.unlink(missing_ok=True)
                with suppress(OSError):  # other objects have the same key
                    file.parent.rmdir()
        except OSError as error:
            raise refusal(error, "remove", file) from error

    def work(self, key: str) -> str:
        object_path(key, "work")
        folder = self.root / "work" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
        except OSError as error:
            raise refusal(error, "write in", folder) from error
        return str(folder)

    def save_work(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        target = self._work_path(key, name)
        self.work(key)
        # Renamed when whole: a process killed while it writes leaves the one before.
        part = target.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            with open(part, "xb") as file:
                file.writelines(tensors.pieces(arrays))
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise refusal(error, "write", target) from error

    def load_work(self, key: str, name: str) -> dict[str, np.ndarray[Any, Any]] | None:
        path = self._work_path(key, name)
        try:
            return tensors.read(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise refusal(error, "read", path) from error

    def discard_work(self, key: str) -> None:
        object_path(key, "work")
        try:
            shutil.rmtree(self.root / "work" / key)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise refusal(error, "remove", self.root / "work" / key) from error

    def _work_path(self, key: str, name: str) -> Path:
        return self.root / object_path(key, name).replace("objects/", "work/", 1)

    def _manifest_path(self, version: int) -> Path:
        return self.root / "versions" / f"{version:08d}.json"

    def _paths(self, version: int) -> frozenset[str]:
        """Paths of the objects that a version names; none if it was removed in this moment."""
        if version not in self._named:
            try:
                refs = self.manifest(version).objects.values()
            except NotFound:
                return frozenset()
            self._named[version] = frozenset(ref.path for ref in refs)
        return self._named[version]

    def _must_be_there(self, manifest: Manifest) -> None:
        for name, ref in manifest.objects.items():
            try:
                size: int | None = (self.root / ref.path).stat().st_size
            except FileNotFoundError:
                size = None
            if fault := misfit(self, manifest, name, size):
                raise fault

    def _map(self, ref: ObjectRef) -> Any:
        """Returns the object's bytes as a read-only map, after its sha256 was checked once in this process."""
        path = self.root / ref.path
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                if state.st_size != ref.bytes:
                    raise damaged(self, ref, f"{state.st_size} bytes instead of {ref.bytes}")
                known = (str(path), ref.sha256, state.st_ino, state.st_size, state.st_mtime_ns)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if state.st_size else b""
        except FileNotFoundError:
            raise damaged(self, ref, "the file is missing") from None
        except OSError as error:
            raise refusal(error, "read", path) from error
        if known not in _checked:
            fault = self.fault(ref)
            if fault is not None:
                raise damaged(self, ref, fault)
            _checked.add(known)
        return mapped


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:  # gone in this moment, or unreadable, which who asks for it is told
        return False


def _root(path: str | Path) -> Path:
    text = str(path)
    return as_path(text.removeprefix("file://")).absolute()
