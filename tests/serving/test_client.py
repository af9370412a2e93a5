"""The client against a server that refuses, is busy or is not there: when it tries again, and what it says."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from condu_ray import client as module
from condu_ray.client import AsyncClient, Client
from condu_ray.errors import DataError, ServiceError

OK = (200, b'{"serving": 1}', {})
BUSY = (503, b'{"detail": "busy"}', {"Retry-After": "0"})


@contextmanager
def server(*answers: tuple[int, bytes, dict[str, str]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """One answer after the other, the last for ever; yields its URL and the headers of the requests it saw."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, headers = answers[min(len(seen), len(answers) - 1)]
            seen.append(dict(self.headers))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", seen
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def waiting(url: str, **options: Any) -> Any:
    with Client(url, **options) as client:
        return client.ready()


def awaited(url: str, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, **options) as client:
            return await client.ready()

    return asyncio.run(ask())


BOTH = pytest.mark.parametrize("ask", [waiting, awaited])
Ask = Callable[..., Any]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.001)


@BOTH
def test_a_busy_server_is_asked_again(ask: Ask) -> None:
    with server(BUSY, (429, b"", {}), OK) as (url, seen):
        assert ask(url) == {"serving": 1}
    assert len(seen) == 3


@BOTH
def test_it_gives_up_in_the_end_with_the_servers_own_sentence(ask: Ask) -> None:
    with server(BUSY) as (url, seen), pytest.raises(ServiceError, match="answers 503: busy"):
        ask(url, retries=2)
    assert len(seen) == 3


@BOTH
@pytest.mark.parametrize("status", [401, 404, 413, 422, 500])
def test_what_would_be_refused_again_is_not_asked_again(ask: Ask, status: int) -> None:
    refusal = (status, b'{"detail": "never"}', {})
    with server(refusal) as (url, seen), pytest.raises(ServiceError, match=f"answers {status}: never"):
        ask(url)
    assert len(seen) == 1


@BOTH
def test_a_server_that_is_not_there_is_tried_again_and_named(ask: Ask) -> None:
    with server(OK) as (url, _):
        pass
    with pytest.raises(ServiceError, match="cannot be reached"):
        ask(url, retries=1)


@BOTH
@pytest.mark.parametrize(
    "url", ["http://localhost:port", "http://[::1", "http://a..b", "localhost:8000", "http://", ""]
)
def test_what_is_no_url_is_named_and_not_tried(ask: Ask, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "_wait", None)
    monkeypatch.setattr(AsyncClient, "_wait", None)
    with pytest.raises(ServiceError, match=f"^'{re.escape(url.rstrip('/'))}' is not the URL of a server .*HOST:PORT"):
        ask(url)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"labels": []}, "an empty list of labels was given"), ({"task": ""}, "an empty task was given")],
)
def test_what_a_form_cannot_say_is_not_left_out_in_silence(asked: dict[str, Any], said: str) -> None:
    with server(OK) as (url, seen):
        with Client(url) as client, pytest.raises(DataError, match=said):
            client.predict([b"picture"], **asked)
        assert seen == []


@pytest.mark.parametrize(
    ("images", "asked", "said"),
    [
        ("a.jpg", {}, "images is a single str: give a list of images"),
        (b"picture", {}, "images is a single bytes"),
        ([b"picture"], {"labels": "cat,dog"}, "labels is a single str: give a list of labels"),
    ],
)
def test_a_single_text_is_not_taken_for_a_list_of_letters(images: Any, asked: dict[str, Any], said: str) -> None:
    with server(OK) as (url, seen):
        with Client(url) as client, pytest.raises(DataError, match=said):
            client.predict(images, **asked)
        assert seen == []


@BOTH
@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff"])
def test_another_kind_of_server_is_told_from_ours(ask: Ask, body: bytes) -> None:
    with server((200, body, {})) as (url, _), pytest.raises(ServiceError, match="does not answer as condu-ray does"):
        ask(url)


@BOTH
def test_the_token_is_sent(ask: Ask) -> None:
    with server(OK) as (url, seen):
        ask(url, token="secret-of-many-letters")
        ask(url)
    assert [headers.get("Authorization") for headers in seen] == ["Bearer secret-of-many-letters", None]


def test_a_server_cannot_make_a_client_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with server((503, b"", {"Retry-After": "86400"}), (503, b"", {"Retry-After": "soon"}), OK) as (url, _):
        waiting(url)
    assert waits[0] == module.LONGEST_SECONDS
    assert waits[1] < 1


@BOTH
def test_a_token_from_a_file_ends_with_a_line_that_is_not_sent(ask: Ask) -> None:
    with server(OK) as (url, seen):
        ask(url, token="secret-of-many-letters\n")
    assert [headers.get("Authorization") for headers in seen] == ["Bearer secret-of-many-letters"]


@BOTH
@pytest.mark.parametrize("token", ["schlüssel-schlüssel", "two-lines-\nof-a-secret"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_told(ask: Ask, token: str) -> None:
    with pytest.raises(ServiceError, match="the token holds letters that cannot be sent") as told:
        ask("http://127.0.0.1:9", token=token)
    assert token not in str(told.value)


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:9"), ("ALL_PROXY", "socks://h:9"), ("SSL_CERT_FILE", "/nowhere/certificates")],
)
def test_proxies_and_certificates_that_cannot_be_used_are_one_sentence(
    ask: Ask, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError, match=f"of the environment cannot be used .*{name}"):
        ask("http://127.0.0.1:9")


def test_a_picture_whose_name_is_no_text_is_sent(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(path)).write_bytes(b"picture")
    asked = httpx.Request("POST", "http://server/v1/predict", **module._predict([os.fsdecode(path)]))
    assert b"caf\\\\udce9.png" in asked.read()  # a form doubles it


def test_no_pictures_are_nothing_to_ask() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(DataError, match="no pictures were given"):
        client.predict([])
