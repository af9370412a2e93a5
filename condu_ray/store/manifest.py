"""What a store writes as JSON: one header for the store, one manifest for each version.

A manifest names its objects by path, size and sha256, so a version is whole if its manifest exists. Format numbers only
grow; `parse_manifest` and `parse_header` are the only doors in, and read every format up to FORMAT.
"""

from __future__ import annotations

import json
import math
import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from condu_ray.catalogue import METHODS
from condu_ray.config import DomainFeatures
from condu_ray.errors import NotFound, StoreError, nearest

FORMAT = 2
"""The newest format that this release reads, and the one it writes."""

Kind = Literal["learn", "forget", "rollback", "fold"]
OBJECT_PATH = r"^objects/[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$"
SHA256 = r"^[0-9a-f]{64}$"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a figure that was not measured is null, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _utc(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() != timedelta(0):
        raise ValueError("must be an ISO time in UTC")
    return text


def now() -> str:
    """Returns this moment as an ISO time in UTC, in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class ObjectRef(_Record):
    """A stored object: where it is below the store, how many bytes, and their sha256 (hex)."""

    path: str = Field(pattern=OBJECT_PATH)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)

    def fault(self, found: ObjectRef) -> str | None:
        """What is wrong with bytes that turned out to be `found`; None if nothing."""
        if found.bytes != self.bytes:
            return f"{found.bytes} bytes instead of {self.bytes}"
        if found.sha256 != self.sha256:
            return f"its sha256 is {found.sha256[:12]}..., not {self.sha256[:12]}..."
        return None


class TaskCard(_Record):
    """What a version knows about one task, without its tensors.

    fingerprint: of the pictures, labels and class names. train_key: names the training, so that it is not done twice.
    learned_in: the version that first held this task. pictures: how many for training and for testing.
    figures: accuracies in percent and fidelities; None where not measured.
    """

    name: str = Field(min_length=1)
    uid: int = Field(ge=0)
    classes: list[str]
    templates: list[str]
    source: str
    fingerprint: str
    method: str
    train_key: str
    learned_in: int = Field(ge=1)
    pictures: dict[Literal["train", "test"], int]
    figures: Annotated[dict[str, float | None], AfterValidator(_finite)] = {}
    settings: dict[str, Any] = {}


class Manifest(_Record):
    """One version: an immutable, numbered state of the store.

    objects: logical name (what the method calls it) to object. state: the method's own facts, as JSON. figures: of the
    whole version, the accuracy matrix among them. seconds: by step of the session.
    """

    format: int = Field(default=FORMAT, ge=1)
    version: int = Field(ge=1)
    parent: int | None = Field(default=None, ge=1)
    kind: Kind
    tasks: list[TaskCard] = []
    objects: dict[str, ObjectRef] = {}
    state: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    figures: Annotated[dict[str, Any], AfterValidator(_finite)] = {}
    message: str = ""
    created: Annotated[str, AfterValidator(_utc)] = Field(default_factory=now)
    seconds: dict[str, float] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name among {names}")
        if len({task.uid for task in self.tasks}) < len(names):
            raise ValueError("two tasks have one uid")
        if self.parent is not None and self.parent >= self.version:
            raise ValueError(f"parent {self.parent} is not before version {self.version}")
        return self

    def task(self, name: str) -> TaskCard | None:
        """Returns the card of the task with this name, or None."""
        return next((task for task in self.tasks if task.name == name), None)

    def card(self, name: str) -> TaskCard:
        """Returns the card of the task with this name. Raises NotFound, offering the nearest name there is."""
        if (found := self.task(name)) is None:
            names = [task.name for task in self.tasks]
            raise NotFound(f"no task {name} in version {self.version}", nearest(name, names))
        return found

    def followed_by(self, kind: Kind, message: str, **changes: Any) -> Manifest:
        """Returns the version after this one: the same but for `changes` (fields by name), in today's format."""
        kept = self.model_dump(exclude={"format", "created", "seconds"})
        own = {"version": self.version + 1, "parent": self.version, "kind": kind, "message": message}
        return Manifest.model_validate({**kept, **own, **changes})


class StoreHeader(_Record):
    """What never changes in a store: the base model and its bytes, the layout, the method and its settings.

    model: name and pretrained tag. settings: granularity, LoRA rank and seed, whatever the method fixes for good.
    domains: what domain features are made of (models/blocks.py); stores of older releases do not say it.
    """

    format: int = Field(default=FORMAT, ge=1)
    method: str
    model: dict[str, Any]
    model_sha256: str
    layout: dict[str, Any]
    settings: dict[str, Any] = {}
    domains: DomainFeatures = "means"
    id: str = Field(default_factory=lambda: uuid.uuid4().hex, pattern=r"^[0-9a-f]{32}$")

    @model_validator(mode="after")
    def _as_older_releases_meant_it(self) -> StoreHeader:
        """Where they left it open, or did not know, whether Gaussians answer, those of dmc-ot do and no others."""
        known = METHODS.get(self.method)
        if known and known.remembers and self.settings.get("memory.discriminant") is None:
            self.settings["memory.discriminant"] = self.method == "dmc-ot"
        return self


_R = TypeVar("_R", Manifest, StoreHeader)


def dump(record: Manifest | StoreHeader) -> bytes:
    """Returns the record as JSON (UTF-8, sorted keys, one newline at the end): equal records give equal bytes.

    Raises StoreError if it holds what JSON in UTF-8 cannot (NaN, objects, surrogates).
    """
    try:
        fields = record.model_dump(mode="json")
        text = json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode() + b"\n"
    except (ValueError, TypeError) as error:
        raise StoreError(f"a {type(record).__name__.lower()} cannot be written as JSON: {error}") from error


def _parse(kind: type[_R], raw: bytes, where: str) -> _R:
    restore = "put the file back from a copy of the store"
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise StoreError(f"{where} is not readable JSON ({error})", restore) from error
    if not isinstance(fields, dict):
        raise StoreError(f"{where} holds no JSON object", restore)
    number = fields.get("format")
    if isinstance(number, int) and number > FORMAT:
        mend = "install the newest condu-ray"
        raise StoreError(f"{where} has format {number}; this release reads up to {FORMAT}", mend)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise StoreError(f"{where} is damaged at {field}: {first['msg']}{more}", restore) from error


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Reads a manifest of any format up to FORMAT; `where` is its file name for errors. Raises StoreError."""
    return _parse(Manifest, raw, where)


def parse_header(raw: bytes, where: str) -> StoreHeader:
    """Reads a store header of any format up to FORMAT; `where` is its file name for errors. Raises StoreError."""
    return _parse(StoreHeader, raw, where)
