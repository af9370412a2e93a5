"""The part of boto3's S3 client that stores use, over a dict: fast enough for every interleaving of two sessions.

The contract tests run against it and against a real server alike, so it means the same.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from botocore.response import StreamingBody


@dataclass
class Kept:
    """An object, or a part of an upload. changed: epoch seconds, whole, as servers tell them."""

    body: bytes
    meta: dict[str, str] = field(default_factory=dict)
    changed: float = 0.0

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.body).hexdigest()}"'


class InMemoryS3:
    """One bucket for all names. Each call is atomic."""

    def __init__(self) -> None:
        self.objects: dict[str, Kept] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], dict[int, Kept]]] = {}
        self._lock = threading.Lock()

    def put_object(
        self, *, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str = "", Metadata: Any = None, **_: Any
    ) -> Any:
        with self._lock:
            self._must_be_free(Key, IfNoneMatch)
            self.objects[Key] = Kept(bytes(Body), dict(Metadata or {}), _now())
        return _answer(ETag=self.objects[Key].etag)

    def get_object(self, *, Bucket: str, Key: str) -> Any:
        kept = self._there(Key)
        return _answer(Body=StreamingBody(io.BytesIO(kept.body), len(kept.body)), **_described(kept))

    def head_object(self, *, Bucket: str, Key: str) -> Any:
        return _answer(**_described(self._there(Key)))

    def list_objects_v2(self, *, Bucket: str, Prefix: str, ContinuationToken: str = "") -> Any:
        """Three a page, so that pages are turned."""
        names = sorted(key for key in list(self.objects) if key.startswith(Prefix) and key > ContinuationToken)
        page, more = names[:3], len(names) > 3
        contents = [
            {"Key": key, "Size": len(kept.body), "LastModified": _time(kept)} for key, kept in self._pairs(page)
        ]
        return _answer(Contents=contents, IsTruncated=more, **({"NextContinuationToken": page[-1]} if more else {}))

    def delete_object(self, *, Bucket: str, Key: str) -> Any:
        self.objects.pop(Key, None)
        return _answer()

    def upload_file(self, file: str, bucket: str, key: str, ExtraArgs: Any) -> None:
        self.put_object(Bucket=bucket, Key=key, Body=Path(file).read_bytes(), **ExtraArgs)

    def create_multipart_upload(self, *, Bucket: str, Key: str, Metadata: Mapping[str, str]) -> Any:
        upload = uuid.uuid4().hex
        self.uploads[upload] = Key, dict(Metadata), {}
        return _answer(UploadId=upload)

    def upload_part(self, *, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes, **_: Any) -> Any:
        self._upload(UploadId)[2][PartNumber] = kept = Kept(bytes(Body))
        return _answer(ETag=kept.etag)

    def list_parts(self, *, Bucket: str, Key: str, UploadId: str) -> Any:
        parts = self._upload(UploadId)[2]
        return _answer(Parts=[{"PartNumber": n, "Size": len(p.body), "ETag": p.etag} for n, p in sorted(parts.items())])

    def complete_multipart_upload(
        self, *, Bucket: str, Key: str, UploadId: str, MultipartUpload: Any, IfNoneMatch: str = ""
    ) -> Any:
        with self._lock:
            _, meta, parts = self._upload(UploadId)
            self._must_be_free(Key, IfNoneMatch)
            body = b"".join(parts[each["PartNumber"]].body for each in MultipartUpload["Parts"])
            self.objects[Key] = Kept(body, meta, _now())
            del self.uploads[UploadId]
        return _answer()

    def abort_multipart_upload(self, *, Bucket: str, Key: str, UploadId: str) -> Any:
        self.uploads.pop(UploadId, None)
        return _answer()

    def list_multipart_uploads(self, *, Bucket: str, Prefix: str) -> Any:
        found = [(key, upload) for upload, (key, _, _) in self.uploads.items() if key.startswith(Prefix)]
        begun = datetime.fromtimestamp(_now(), UTC)
        return _answer(Uploads=[{"Key": key, "UploadId": upload, "Initiated": begun} for key, upload in found])

    def _must_be_free(self, key: str, condition: str) -> None:
        if condition == "*" and key in self.objects:
            raise error_of(412, "PreconditionFailed")

    def _there(self, key: str) -> Kept:
        if key not in self.objects:
            raise error_of(404, "NoSuchKey")
        return self.objects[key]

    def _upload(self, upload: str) -> Any:
        if upload not in self.uploads:
            raise error_of(404, "NoSuchUpload")
        return self.uploads[upload]

    def _pairs(self, names: list[str]) -> list[tuple[str, Kept]]:
        return [(name, kept) for name in names if (kept := self.objects.get(name)) is not None]


def _now() -> float:
    return float(int(time.time()))


def _time(kept: Kept) -> datetime:
    return datetime.fromtimestamp(kept.changed, UTC)


def _described(kept: Kept) -> dict[str, Any]:
    return {"ContentLength": len(kept.body), "LastModified": _time(kept), "Metadata": kept.meta, "ETag": kept.etag}


def _answer(**fields: Any) -> dict[str, Any]:
    return {**fields, "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {"date": formatdate(usegmt=True)}}}


def error_of(status: int, code: str) -> ClientError:
    """What boto3 raises where a server answers so."""
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "in memory")
