"""One folder of an S3 bucket: bytes under keys, tried again where that is safe, errors as sentences.

Requests go through botocore's own retries (standard mode: a limited number, with jitter). What they leave open is
settled here. A conditional write whose answer was lost is read back by the mark of its writer before it is sent again.
A body that ends early is fetched again. Part uploads go on where an earlier process stopped.

Credentials come from boto3's own chain alone; nothing here reads, keeps or prints them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from condu_ray.errors import StoreError, without_credentials

TRIES = 5
"""How often a request is sent by botocore, and how many rounds of those an unsettled write gets."""

LONGEST_WAIT_S = 5.0
CONNECT_S, READ_S = 10.0, 60.0
"""How long the server may take to accept, and to go on with an answer."""

PART = 64 << 20
"""Bytes of a part; an object of more than one goes up in parts."""

_THREADS = 4
_WRITER = "condu-writer"
_SHA256 = "condu-sha256"
_PREVENTED, _CONFLICT = 412, 409
_STALE = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}
_RENEW = "sign in again (`aws sso login`, or as your site does), and run the same command again"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """An object: key below the folder, bytes, last change (epoch seconds of the server), our metadata."""

    path: str
    bytes: int
    changed: float
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str | None:
        """The digest (hex) that this package writes into an object's metadata; None where another program wrote it."""
        return self.meta.get(_SHA256)


def make_client() -> Any:
    """A client with limits; the endpoint is where boto3 finds one. Raises StoreError where that is no URL."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        max_pool_connections=4 * _THREADS,
        # Content-MD5 (below) is what every server knows; some refuse the newer checksum headers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.client("s3", config=config)
    except BotoCoreError:  # some are ValueErrors, too
        raise
    except ValueError as error:
        named = [name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if name in os.environ]
        place = named[0] if named else "endpoint_url in the AWS configuration file"
        raise StoreError(f"{place} is not a URL ({without_credentials(str(error))})", "give http://HOST:PORT") from None


def endpoint() -> tuple[str | None, str | None]:
    """(URL of the server, None: AWS's own; file of the certificates that it is told by, None: the usual ones), as boto3
    finds them, for programs that do not look where boto3 looks."""
    import boto3
    from botocore.config import Config
    from botocore.session import get_session

    aws = boto3.client("s3", config=Config(ignore_configured_endpoint_urls=True)).meta.endpoint_url
    found = str(make_client().meta.endpoint_url)
    authority = get_session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    return None if found == aws else found, authority or None


class Bucket:
    """Objects below `prefix` of a bucket. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.name, self.prefix = _parsed(url)
        self.url = f"s3://{self.name}" + (f"/{self.prefix}" if self.prefix else "")
        self._root = f"{self.prefix}/" if self.prefix else ""
        self._client = _translating(make_client, "use", self.url)
        self._late = 0.0

    def now(self) -> float:
        """The server's clock as of its newest answer (epoch seconds): ages do not depend on this machine's clock."""
        return time.time() - self._late

    def missing(self) -> StoreError:
        """The error for a bucket that is not there."""
        return StoreError(f"there is no bucket {self.name}", "make it first, or check --store")

    def read(self, path: str) -> bytes | None:
        """The bytes of an object, None if there is none."""
        return self._whole(path, lambda body: bytes(body.read()))

    def pieces(self, path: str, take: Callable[[bytes], Any], begin: Callable[[], Any]) -> bool:
        """Gives an object's bytes to `take`, after `begin`; all over again where an answer ends early.

        Returns whether there is such an object.
        """

        def read(body: Any) -> bool:
            begin()
            for piece in body.iter_chunks(1 << 20):
                take(piece)
            return True

        return self._whole(path, read) or False

    def look(self, path: str) -> Entry | None:
        """What is known of an object without reading it, None if there is none."""
        answer = self._ask("head_object", path, "read", Key=self._root + path)
        if answer is None:
            return None
        meta = {str(key).lower(): str(value) for key, value in answer["Metadata"].items()}
        return Entry(path, int(answer["ContentLength"]), _epoch(answer["LastModified"]), meta)

    def entries(self, under: str) -> list[Entry]:
        """Every object whose path starts with `under`, by path."""
        found: list[Entry] = []
        more: dict[str, Any] = {}
        while True:
            page = self._ask("list_objects_v2", under, "list", Prefix=self._root + under, **more)
            if page is None:
                raise self.missing()
            for each in page.get("Contents", []):
                path = str(each["Key"]).removeprefix(self._root)
                found.append(Entry(path, int(each["Size"]), _epoch(each["LastModified"])))
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def write(self, path: str, body: bytes) -> None:
        """Puts an object, over one that is there."""
        if self._ask("put_object", path, "write", Key=self._root + path, Body=body, ContentMD5=_md5(body)) is None:
            raise self.missing()

    def write_from(self, path: str, file: Path, sha256: str) -> None:
        """Puts a file as an object, over one that is there; in parts where it is large."""
        key, extra = self._root + path, {"Metadata": {_SHA256: sha256}}
        _translating(
            lambda: self._client.upload_file(str(file), self.name, key, ExtraArgs=extra), "write", f"{self.url}/{path}"
        )

    def touch(self, paths: Iterable[str]) -> None:
        """Makes objects without bytes, or makes those that are there new."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda path: self.write(path, b""), paths))

    def create(self, path: str, body: bytes) -> bool:
        """Puts an object if its key is free; whether this call did. Of many that call at once, one does.

        Raises StoreError where the server did not say, and cannot be asked; then it may or may not have been put.
        """
        writer = uuid.uuid4().hex
        meta = {_WRITER: writer, _SHA256: hashlib.sha256(body).hexdigest()}
        given = {"Body": body, "ContentMD5": _md5(body), "IfNoneMatch": "*", "Metadata": meta}

        def mine() -> bool | None:
            there = self.look(path)
            return None if there is None else there.meta.get(_WRITER) == writer

        return self._settle("put_object", path, mine, Key=self._root + path, **given)

    def create_from(self, path: str, file: Path, sha256: str) -> bool:
        """Puts a file as an object if its key is free; in parts where it is large. Whether this call, or another that
        put the same bytes, did.

        What earlier calls with the same bytes have uploaded is not uploaded again, also if their process was killed.
        """

        def same() -> bool | None:
            there = self.look(path)
            return None if there is None else there.sha256 == sha256

        if file.stat().st_size <= PART:
            body = file.read_bytes()
            given = {"Body": body, "ContentMD5": _md5(body), "Metadata": {_SHA256: sha256}}
            return self._settle("put_object", path, same, Key=self._root + path, IfNoneMatch="*", **given)
        for _ in range(TRIES):
            upload = self._begun(path, sha256)
            parts = self._parts(path, upload, file)
            if parts is None:  # another process finished or gave up this upload
                self.delete([_note(path, sha256)])
                if (known := same()) is not None:
                    return known
                continue
            made = self._settle(
                "complete_multipart_upload",
                path,
                same,
                Key=self._root + path,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
            if not made:
                self._ask("abort_multipart_upload", path, "write", Key=self._root + path, UploadId=upload)
            self.delete([_note(path, sha256)])
            return made
        raise StoreError(f"{self.url}/{path} cannot be written (uploads of it ended {TRIES} times)")

    def delete(self, paths: Iterable[str]) -> None:
        """Removes objects; one that is not there is no error."""
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda path: self._ask("delete_object", path, "remove", Key=self._root + path), paths))

    def uploads(self) -> list[tuple[str, str, float]]:
        """(path, id, epoch seconds when begun) of part uploads that were never finished, at most a thousand."""
        answer = self._ask("list_multipart_uploads", "", "list", Prefix=self._root) or {}
        return [
            (str(each["Key"]).removeprefix(self._root), str(each["UploadId"]), _epoch(each["Initiated"]))
            for each in answer.get("Uploads", [])
        ]

    def abort(self, path: str, upload: str) -> None:
        """Gives up a part upload; what it had uploaded is no longer paid for."""
        self._ask("abort_multipart_upload", path, "remove", Key=self._root + path, UploadId=upload)

    def honours_preconditions(self) -> bool:
        """Whether of two conditional writes of one key, sent at once, exactly one is made, and a third one is not."""
        path = f"probe/{uuid.uuid4().hex}"
        at_once = threading.Barrier(2)

        def write(_: int) -> bool:
            at_once.wait(60)
            return self.create(path, uuid.uuid4().bytes)

        try:
            with ThreadPoolExecutor(2) as pool:
                made = list(pool.map(write, range(2)))
            return sum(made) == 1 and not self.create(path, b"third")
        finally:
            self.delete([path])

    def _begun(self, path: str, sha256: str) -> str:
        """The id of the part upload for these bytes, begun if there is none; a note beside the objects remembers it."""
        note = self.read(_note(path, sha256))
        if note is not None:
            return str(json.loads(note))
        begun = self._ask("create_multipart_upload", path, "write", Key=self._root + path, Metadata={_SHA256: sha256})
        if begun is None:
            raise self.missing()
        self.write(_note(path, sha256), json.dumps(begun["UploadId"]).encode())
        return str(begun["UploadId"])

    def _parts(self, path: str, upload: str, file: Path) -> list[dict[str, Any]] | None:
        """Uploads the parts that are not there yet; None if the upload is gone."""
        there: dict[int, tuple[int, str]] = {}
        more: dict[str, Any] = {}
        while True:
            page = self._ask("list_parts", path, "list", Key=self._root + path, UploadId=upload, **more)
            if page is None:
                return None
            for each in page.get("Parts", []):
                there[int(each["PartNumber"])] = int(each["Size"]), str(each["ETag"]).strip('"')
            if not page.get("IsTruncated"):
                break
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}
        gone = threading.Event()

        def up(number: int) -> dict[str, Any]:
            with open(file, "rb") as source:
                source.seek((number - 1) * PART)
                body = source.read(PART)
            etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
            if there.get(number) != (len(body), etag):  # where etags are no MD5, a part goes up again: safe, if slower
                answer = self._ask(
                    "upload_part",
                    path,
                    "write",
                    Key=self._root + path,
                    UploadId=upload,
                    PartNumber=number,
                    Body=body,
                    ContentMD5=_md5(body),
                )
                if answer is None:
                    gone.set()
                    return {}
                etag = str(answer["ETag"]).strip('"')
            return {"PartNumber": number, "ETag": f'"{etag}"'}

        count = -(-file.stat().st_size // PART)
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = list(pool.map(up, range(1, count + 1)))
        return None if gone.is_set() else parts

    def _settle(self, call: str, path: str, mine: Callable[[], bool | None], **given: Any) -> bool:
        """Sends a conditional write until it is known who wrote the object.

        mine: asks the bucket: True if this write is there, False if another is, None if nothing is.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        for round_ in range(TRIES):
            try:
                self._note_server_time(getattr(self._client, call)(Bucket=self.name, **given))
                return True
            except ClientError as error:
                status = _status(error)
                if status == _PREVENTED or (status == 404 and call == "complete_multipart_upload"):
                    known = mine()  # a retry inside botocore may have been prevented by its own first try
                    if known is not None:
                        return known
                elif status != _CONFLICT and status < 500:
                    raise refusal(error, "write", f"{self.url}/{path}") from error
                else:
                    known = mine()
                    if known is not None:
                        return known
                cause: Exception = error
            except BotoCoreError as error:
                known = mine()
                if known is not None:
                    return known
                cause = error
            _pause(round_)
        raise refusal(cause, "write", f"{self.url}/{path}") from cause

    def _whole(self, path: str, read: Callable[[Any], _T]) -> _T | None:
        """What `read` makes of an object's body; tried again where the body ends early."""
        from botocore.exceptions import BotoCoreError, ClientError

        for round_ in range(TRIES):
            answer = self._ask("get_object", path, "read", Key=self._root + path)
            if answer is None:
                return None
            try:
                return read(answer["Body"])
            except (BotoCoreError, ClientError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk that the bytes go to
                cause: Exception = error
                _pause(round_)
        raise refusal(cause, "read", f"{self.url}/{path}") from cause

    def _ask(self, call: str, path: str, what: str, **given: Any) -> Any:
        """The answer of the server; None where it says that there is no such thing."""
        from botocore.exceptions import ClientError

        def ask() -> Any:
            try:
                return self._note_server_time(getattr(self._client, call)(Bucket=self.name, **given))
            except ClientError as error:
                if _status(error) == 404:
                    return None
                raise

        return _translating(ask, what, f"{self.url}/{path}")

    def _note_server_time(self, answer: Any) -> Any:
        date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if date:
            self._late = time.time() - parsedate_to_datetime(date).timestamp()
        return answer


def refusal(error: Exception, what: str, where: str) -> StoreError:
    """Turns an error of boto3 into a sentence with a mend; `what` was tried on `where`. Says nothing of credentials."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        mend = "give them as boto3 takes them: environment, ~/.aws, or the role of the machine"
        return StoreError(f"cannot {what} {where}: there are no credentials for S3", mend)
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", _status(error)))
        if code in _STALE:
            return StoreError(f"cannot {what} {where}: the credentials for S3 have expired ({code})", _RENEW)
        if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            mend = "docs/store.md lists the permissions that a store needs"
            return StoreError(f"no permission to {what} {where} ({code})", mend)
        if code == "RequestTimeTooSkewed":
            return StoreError(f"cannot {what} {where}: this machine's clock is wrong", "set it, and run it again")
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            mend = "set AWS_DEFAULT_REGION to that of the bucket"
            return StoreError(f"cannot {what} {where}: the bucket is in another region ({code})", mend)
        if code == "InvalidBucketName":
            return StoreError(f"cannot {what} {where}: no bucket can have that name", "give s3://BUCKET/FOLDER")
        if code == "NoSuchBucket":
            return StoreError(f"cannot {what} {where}: there is no such bucket", "make it first, or check --store")
        if _status(error) >= 500 or code in ("SlowDown", "503"):
            mend = "run the same command again; nothing published is lost"
            return StoreError(f"cannot {what} {where}: the server is out of order or busy ({code})", mend)
        return StoreError(f"cannot {what} {where} ({code})")
    name = type(error).__name__
    if name == "ParamValidationError":
        return StoreError(f"cannot {what} {where}: no bucket can have that name", "give s3://BUCKET/FOLDER")
    if name in ("ProfileNotFound", "ConfigParseError", "ConfigNotFound", "MissingDependencyException"):
        return StoreError(f"cannot {what} {where}: boto3 cannot be set up ({name})", "check AWS_PROFILE and ~/.aws")
    if "Token" in name or "Credential" in name or name.startswith("Login"):
        return StoreError(
            f"cannot {what} {where}: the credentials for S3 have expired or cannot be had ({name})", _RENEW
        )
    if isinstance(error, BotoCoreError):
        mend = "check the network and AWS_ENDPOINT_URL, and run the same command again; nothing published is lost"
        return StoreError(f"cannot {what} {where}: the server cannot be reached ({name})", mend)
    return StoreError(f"cannot {what} {where} ({name})")


def _translating(ask: Callable[[], _T], what: str, where: str) -> _T:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return ask()
    except (BotoCoreError, ClientError) as error:
        raise refusal(error, what, where) from error
    except Boto3Error as error:  # upload_file's own, in place of what the server said
        said = error.__context__
        raise refusal(said if isinstance(said, ClientError) else error, what, where) from error


def _parsed(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        mend = "boto3 finds them in the environment, in ~/.aws or in the role of the machine"
        raise StoreError("an s3:// address holds credentials or a port", mend)
    if not bucket:
        raise StoreError(f"{url} names no bucket", "give s3://BUCKET/FOLDER")
    return bucket, "/".join(part for part in prefix.split("/") if part)


def _note(path: str, sha256: str) -> str:
    return f"uploads/{path}/{sha256}"


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _epoch(moment: datetime) -> float:
    return moment.timestamp()


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _pause(round_: int) -> None:
    time.sleep(random.uniform(0, min(LONGEST_WAIT_S, 0.1 * 4**round_)))
