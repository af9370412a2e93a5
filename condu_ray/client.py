"""Asks a server for answers: `Client` waits, `AsyncClient` is awaited. Both try again where that makes sense.

    from condu_ray.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for answer in client.predict(["a.jpg", "b.jpg"], labels=["cat", "dog"])["answers"]:
            print(answer["image"], answer["label"], answer["probability"])

Beside the pictures a call takes what `PredictOptions` names.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import httpx

from condu_ray.errors import DataError, ServiceError

if TYPE_CHECKING:
    from condu_ray.data import Skipped

RETRY = (429, 503)
WAIT_SECONDS, LONGEST_SECONDS = 0.2, 10.0

H = TypeVar("H", httpx.Client, httpx.AsyncClient)
Image = str | Path | bytes
"""The path of a picture file, or the bytes of one."""


class PredictOptions(TypedDict, total=False):
    """What may be asked of pictures; all of it may be left out.

    task: its expert answers, among its classes. labels: answer among these words. Without both all learned classes
    compete. top_k: labels listed for each picture, 5. k: most experts a picture, unset the version's `vote.k`. version:
    which one answers, unset the one that serves.
    """

    task: str | None
    labels: Sequence[str] | None
    top_k: int
    k: int | None
    version: int | None


class _Calls:
    """What both clients share: the options of a request, and how long to wait before the next try."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        self._url, self._retries = url.rstrip("/"), retries
        _check(self._url)
        token = (token or "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ServiceError("the token holds letters that cannot be sent with a request", "give the server's token")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._options: dict[str, Any] = {"base_url": self._url, "headers": headers, "timeout": timeout}

    def _wait(self, attempt: int, failed: httpx.Response | httpx.TransportError) -> float:
        """Seconds to wait before the next try. Raises ServiceError where another would not help."""
        if isinstance(failed, httpx.TransportError):
            if attempt >= self._retries:
                told = str(failed) or type(failed).__name__
                raise ServiceError(f"{self._url} cannot be reached ({told})", "check the URL, and that a server runs")
            asked = None
        elif failed.status_code in RETRY and attempt < self._retries:
            asked = failed.headers.get("retry-after")
        else:
            raise _refusal(self._url, failed)
        pause: float = WAIT_SECONDS * 2**attempt * random.uniform(0.5, 1)  # or all who were refused come back at once
        return min(LONGEST_SECONDS, max(pause, float(asked) if asked and asked.isdecimal() else 0.0))


class Client(_Calls):
    """A server, asked by calls that wait for its answers.

    token: bearer token, where the server has one. timeout: seconds for one try. retries: further tries where the server
    is busy, starts, or cannot be reached; an answer changes nothing on the server, so asking again is safe. Calls raise
    DataError for a file that cannot be read, ServiceError where the server refuses or cannot be reached.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        super().__init__(url, token, timeout, retries)
        self._http = _opened(httpx.Client, self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def predict(self, images: Sequence[Image], **asked: Unpack[PredictOptions]) -> dict[str, Any]:
        """Answers for pictures, all by one version, as docs/serving.md describes them."""
        return self._call("POST", "/v1/predict", **_predict(images, **asked))

    def tasks(self, version: int | None = None) -> dict[str, Any]:
        """What a version has learned."""
        return self._call("GET", "/v1/tasks", params={} if version is None else {"version": version})

    def versions(self) -> dict[str, Any]:
        """All versions, and which serves."""
        return self._call("GET", "/v1/versions")

    def ready(self) -> dict[str, Any]:
        """Which version each replica serves."""
        return self._call("GET", "/readyz")

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        attempt = 0
        while True:
            failed: httpx.Response | httpx.TransportError
            try:
                response = self._http.request(method, path, **content)
                if response.is_success:
                    return _document(self._url, response)
                failed = response
            except httpx.TransportError as error:
                failed = error
            time.sleep(self._wait(attempt, failed))
            attempt += 1


class AsyncClient(_Calls):
    """As `Client`, with calls that are awaited."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 30.0, retries: int = 4) -> None:
        super().__init__(url, token, timeout, retries)
        self._http = _opened(httpx.AsyncClient, self._options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def predict(self, images: Sequence[Image], **asked: Unpack[PredictOptions]) -> dict[str, Any]:
        """As `Client.predict`."""
        content = await asyncio.to_thread(lambda: _predict(images, **asked))
        return await self._call("POST", "/v1/predict", **content)

    async def tasks(self, version: int | None = None) -> dict[str, Any]:
        """As `Client.tasks`."""
        return await self._call("GET", "/v1/tasks", params={} if version is None else {"version": version})

    async def versions(self) -> dict[str, Any]:
        """As `Client.versions`."""
        return await self._call("GET", "/v1/versions")

    async def ready(self) -> dict[str, Any]:
        """As `Client.ready`."""
        return await self._call("GET", "/readyz")

    async def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        attempt = 0
        while True:
            failed: httpx.Response | httpx.TransportError
            try:
                response = await self._http.request(method, path, **content)
                if response.is_success:
                    return _document(self._url, response)
                failed = response
            except httpx.TransportError as error:
                failed = error
            await asyncio.sleep(self._wait(attempt, failed))
            attempt += 1


def _opened(kind: Callable[..., H], options: dict[str, Any]) -> H:
    """Raises ServiceError for what the environment says of proxies and certificates, which httpx reads here."""
    try:
        return kind(**options)
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
        mend = "check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        raise ServiceError(f"a proxy or certificates of the environment cannot be used ({error})", mend) from None


def _check(url: str) -> None:
    """Raises ServiceError for what names no server, which httpx would say in errors of several kinds."""
    try:
        given = httpx.URL(url)
        given.raw_host.decode("ascii").encode("idna")  # as a socket does
        fault = "" if given.host and given.scheme in ("http", "https") else "it does not begin with http://HOST"
    except (httpx.InvalidURL, UnicodeError) as error:
        fault = str(error)
    if fault:
        raise ServiceError(f"{url!r} is not the URL of a server ({fault})", "give http://HOST:PORT")


def _predict(
    images: Sequence[Image],
    task: str | None = None,
    labels: Sequence[str] | None = None,
    top_k: int = 5,
    k: int | None = None,
    version: int | None = None,
) -> dict[str, Any]:
    if not images:
        raise DataError("no pictures were given", "give one or more")
    if task == "" or (labels is not None and not labels):  # a form would leave them out, and all classes compete
        empty = "an empty task" if task == "" else "an empty list of labels"
        raise DataError(f"{empty} was given", "leave it out to ask among all learned classes")
    for what, given_as in (("images", images), ("labels", labels)):
        if isinstance(given_as, str | Path | bytes):  # or each of its letters would be one
            raise DataError(f"{what} is a single {type(given_as).__name__}", f"give a list of {what}")
    given = {"task": task, "labels": None if labels is None else list(labels), "top_k": top_k, "k": k}
    fields = {name: value for name, value in {**given, "version": version}.items() if value is not None}
    return {"files": [("image", _part(place, image)) for place, image in enumerate(images)], "data": fields}


def _part(place: int, image: Image) -> tuple[str, bytes]:
    if isinstance(image, bytes):
        return str(place), image
    try:
        name = str(image).encode(errors="backslashreplace").decode()  # a file's name may be no text
        return name, Path(image).read_bytes()
    except OSError as error:
        raise DataError(
            f"the picture {image} cannot be read ({error.strerror})", "give the path of a picture"
        ) from None


def _document(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServiceError(f"{url} does not answer as condu-ray does", "give the URL of `condu-ray serve`")
    return found


def _refusal(url: str, response: httpx.Response) -> ServiceError:
    try:
        told = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        told = response.reason_phrase
    mend = {401: "give the token", 413: "send fewer or smaller pictures"}.get(response.status_code, "")
    return ServiceError(f"{url} answers {response.status_code}: {told}", mend)


def predict_paths(
    url: str,
    paths: Sequence[str | Path],
    on_skipped: Callable[[Skipped], None] | None = None,
    **asked: Unpack[PredictOptions],
) -> list[dict[str, Any]]:
    """What `condu-ray predict` says of these files and folders, asked of a server; its token is in CONDU_SERVE__TOKEN.

    on_skipped: as in `open_pictures`. Raises DataError that names the first path that is no picture, before any is
    sent.
    """
    from condu_ray.data import open_pictures

    pictures = open_pictures(paths, on_skipped)
    with Client(url, os.environ.get("CONDU_SERVE__TOKEN")) as client:
        found = [client.predict([picture.path], **asked)["answers"] for picture in pictures]
    return [{**answer, "image": picture.path} for (answer,), picture in zip(found, pictures, strict=True)]
