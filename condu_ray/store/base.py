"""What every kind of store does, and what they share.

The protocol of a session: `put` objects under names derived from their input, then `commit` one manifest. Only the
commit changes what readers see, and only one writer gets a version number. Objects and manifests are never changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from condu_ray.errors import DamagedObject, NotFound, OtherBytes, StoreError, VersionTaken
from condu_ray.store.manifest import Manifest, ObjectRef, StoreHeader

if TYPE_CHECKING:
    import numpy as np

IN_USE_S = 24 * 3600.0
"""Seconds for which gc takes an object that no manifest names for the work of a session that still runs."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,150}")


@dataclass(frozen=True)
class GcReport:
    """What gc removed, or would remove (`dry_run`).

    versions: numbers of removed versions. objects: paths of removed objects. leftovers: temporary files and work
    folders of sessions that died. bytes: freed in all. in_use: paths kept, though no kept version names them, because
    they are so young that a running session may need them.
    """

    versions: list[int]
    objects: list[str]
    leftovers: list[str]
    bytes: int
    in_use: list[str]
    dry_run: bool


@runtime_checkable
class Store(Protocol):
    """A place that holds versions. Safe to use from several threads, processes and machines at once."""

    @property
    def url(self) -> str:
        """What `open_store` opens again, absolute."""

    @property
    def header(self) -> StoreHeader:
        """What never changes in this store."""

    def versions(self) -> list[int]:
        """Returns the version numbers, oldest first."""

    def manifest(self, version: int | None = None) -> Manifest:
        """Returns the manifest of a version, None for the newest. Raises NotFound naming the versions there are."""

    def put(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> ObjectRef:
        """Writes objects/<key>/<name>.safetensors, which appears whole or not at all.

        Putting the same bytes again returns the same reference. Raises OtherBytes if the object is there with other
        bytes, StoreError if nothing could be written (and then nothing was).
        """

    def find(self, key: str, name: str) -> ObjectRef | None:
        """Returns the object that an earlier `put` finished, None if there is none; marks it as in use for gc."""

    def touch(self, path: str) -> bool:
        """Marks the object at this path (as in `ObjectRef`) as in use for gc, without reading it; False: not there."""

    def get(self, ref: ObjectRef) -> dict[str, np.ndarray[Any, Any]]:
        """Returns an object's arrays: read-only views of the mapped file, no copy.

        The sha256 is checked on first load in this process. Raises DamagedObject, which says what still serves.
        """

    def fault(self, ref: ObjectRef) -> str | None:
        """Reads an object's bytes again and returns what is wrong with them, None if nothing."""

    def commit(self, manifest: Manifest) -> None:
        """Publishes a version, whose number must be the newest plus one; the last and only visible step of a session.

        Raises VersionTaken if another writer has the number, StoreError if an object it names is not there.
        """

    def gc(self, keep: int | None = None, *, dry_run: bool = False, in_use_s: float = IN_USE_S) -> GcReport:
        """Removes what no kept version names.

        keep: how many of the newest versions stay (at least 1; None: all). Objects that were put or found less than
        `in_use_s` seconds ago stay if no manifest names them, and so do those of a removed version that were put or
        found since it was committed: a session that still runs may be about to name them.
        """

    def discard(self, key: str, name: str) -> None:
        """Removes an object that no version names, such as a delta whose task is committed; leaves any other."""

    def work(self, key: str) -> str:
        """Returns a place for files of other programs that work on `key`: a folder, or a URL below the store's."""

    def save_work(self, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Keeps unfinished work (a checkpoint) on `key`, over what had this name; killed, the one before stays."""

    def load_work(self, key: str, name: str) -> dict[str, np.ndarray[Any, Any]] | None:
        """Returns what `save_work` kept, from any machine; None if there is none."""

    def discard_work(self, key: str) -> None:
        """Removes all work on `key`."""


class Digest:
    """Counts and hashes the bytes of an object as they pass by."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._bytes = 0

    def update(self, piece: Any) -> None:
        """Takes the next piece (any buffer of bytes)."""
        self._sha256.update(piece)
        self._bytes += len(piece)

    def through(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """Yields the pieces unchanged, each taken before it is yielded."""
        for piece in pieces:
            self.update(piece)
            yield piece

    def ref(self, path: str) -> ObjectRef:
        """Returns the reference to an object that holds the bytes so far."""
        return ObjectRef(path=path, bytes=self._bytes, sha256=self._sha256.hexdigest())


def object_path(key: str, name: str) -> str:
    """Returns the path of an object below the store. Raises StoreError for a name that is no plain file name."""
    for part in (key, name):
        if not _NAME.fullmatch(part):
            raise StoreError(f"{part!r} cannot name an object", "use letters, digits, '.', '_' and '-'")
    return f"objects/{key}/{name}.safetensors"


def put_first(store: Store, key: str, name: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> ObjectRef:
    """Puts an object, or returns the one that was first: the same work on other hardware is rounded otherwise.

    Raises StoreError if nothing could be written.
    """
    try:
        return store.put(key, name, arrays)
    except OtherBytes:
        if (there := store.find(key, name)) is None:
            raise
        return there


def other_bytes(store: Store, path: str) -> OtherBytes:
    """Returns the error for an object that is there with other bytes."""
    return OtherBytes(
        f"{store.url}/{path} exists with other bytes",
        "use `find` before the work is done again, or remove it if no version names it",
    )


def may_name(versions: Iterable[int], paths: Callable[[int], Collection[str]], path: str) -> bool:
    """Whether one of these versions names the object, or may, since its manifest cannot be read.

    paths: those of the objects that a version names; raises StoreError where they cannot be known.
    """
    for version in versions:
        try:
            if path in paths(version):
                return True
        except StoreError:
            return True
    return False


def differing(store: Store, header: StoreHeader) -> StoreError | None:
    """Returns the error where a store was made with another header; the id and the format may differ."""
    differ = [name for name in StoreHeader.model_fields if name not in ("id", "format")]
    differ = [name for name in differ if getattr(store.header, name) != getattr(header, name)]
    if not differ:
        return None
    there, asked = getattr(store.header, differ[0]), getattr(header, differ[0])
    what = f"another {differ[0]}" + ("" if differ[0] == "layout" else f" ({there}, not {asked})")
    return StoreError(f"{store.url} holds a store with {what}", "choose another --store, or the settings it has")


def taken(store: Store, manifest: Manifest) -> VersionTaken:
    """Returns the error for a number that another writer has."""
    mend = "run the same command again, it goes on from there"
    return VersionTaken(f"version {manifest.version} of {store.url} exists already", mend)


def check_turn(store: Store, manifest: Manifest, newest: int) -> None:
    """Raises the error for a version that cannot follow version `newest`."""
    if manifest.version <= newest:
        raise taken(store, manifest)
    if manifest.version > newest + 1:
        raise StoreError(f"version {manifest.version} cannot follow version {newest} of {store.url}")


def misfit(store: Store, manifest: Manifest, name: str, found: int | None) -> StoreError | None:
    """Returns the error where an object that a manifest names has other bytes than it says; found: None, not there."""
    ref = manifest.objects[name]
    if found == ref.bytes:
        return None
    what = "is missing" if found is None else f"has {found} bytes instead of {ref.bytes}"
    mend = "run the same command again; nothing was published"
    return StoreError(f"{store.url}/{ref.path} ({name} of version {manifest.version}) {what}", mend)


def missing_version(version: int | None, known: list[int], url: str) -> NotFound:
    """Returns the error for a version that is not there."""
    if not known:
        return NotFound(f"{url} has no version yet", "learn a task first with `condu-ray learn`")
    listed = ", ".join(map(str, known[-10:])) if len(known) <= 10 else f"{known[0]} ... {known[-1]}"
    close = min(known, key=lambda number: abs(number - (version or 0)))
    return NotFound(f"{url} has no version {version}", f"the nearest is {close}; there are {listed}")


def damaged(store: Store, ref: ObjectRef, fault: str) -> DamagedObject:
    """Returns the error for a damaged object; it names the newest version that is still whole, if there is one."""
    known = {ref: False}

    def whole(one: ObjectRef) -> bool:
        if one not in known:
            known[one] = store.fault(one) is None
        return known[one]

    mend = "no other version is whole: put the file back from a copy of the store"
    for version in reversed(store.versions()):
        try:
            refs = list(store.manifest(version).objects.values())
        except StoreError:
            continue
        if ref not in refs and all(whole(one) for one in refs):
            mend = (
                f"version {version} is whole and still serves (--version {version}); "
                f"go back to it with `condu-ray rollback {version} --store {store.url}`"
            )
            break
    return DamagedObject(f"{store.url}/{ref.path} is damaged ({fault})", mend)
