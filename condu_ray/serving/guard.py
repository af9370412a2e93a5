"""What every request passes before anything is read: who asks, how much, how long, how many at once."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from condu_ray.config import ServeConfig
from condu_ray.errors import StoreError
from condu_ray.serving.problems import Problem

log = logging.getLogger("ray.serve")

OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
"""Without a token: what a load balancer asks, and the page, which holds no secret and asks for the token itself."""

LEFT = 499
"""Counted where the client has left before there was an answer; nobody is sent it."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Count = Callable[[str, int, float], None]


class Guard:
    """ASGI middleware, the outermost. count: called with route, status and seconds of every request."""

    def __init__(self, app: ASGIApp, config: ServeConfig, count: Count) -> None:
        self._app, self._count = app, count
        self._body_mb, self._most_bytes = config.body_mb, int(config.body_mb * 2**20)
        self._seconds, self._queue = config.timeout_seconds, config.queue
        token = config.token.get_secret_value() if config.token else None
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begun, status = Headers(scope=scope), time.monotonic(), 500
        request_id = headers.get("x-request-id", "")
        scope["request_id"] = request_id = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                guarded = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    guarded.setdefault(name, value)
            await send(message)

        try:
            self._admit(scope, headers)
            self._under_way += 1
            try:
                async with asyncio.timeout(self._seconds):
                    await self._app(scope, self._limited(receive), send_guarded)
            except TimeoutError:
                raise Problem(503, f"not answered within {self._seconds:g} s", busy=True) from None
            finally:
                self._under_way -= 1
        except Problem as problem:
            if not started:
                await problem.response(request_id)(scope, receive, send_guarded)
        except StoreError as error:  # the store is away, or damaged: what answers pictures needs it no more
            log.warning("the store cannot be read: %s", error, extra={"request": request_id})
            if not started:
                away = Problem(503, "the store cannot be read; the server's log has more", busy=True)
                await away.response(request_id)(scope, receive, send_guarded)
        except ClientDisconnect:
            status = LEFT
        except asyncio.CancelledError:  # Serve's proxy says so of a client that left
            status = status if started else LEFT
            raise
        except Exception as error:
            log.exception("a request failed", exc_info=error, extra={"request": request_id})
            if not started:
                await Problem(500, "a mistake of the server; its log has more").response(request_id)(
                    scope, receive, send_guarded
                )
        finally:
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "none")
            self._count(route, status, seconds)
            facts = {"request": request_id, "method": scope["method"], "path": route, "status": status}
            log.info("request", extra={**facts, "milliseconds": round(1000 * seconds, 1)})

    def _admit(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        refused = self._refused(scope, headers)
        scope["trusted"] = refused is None
        if ((path or "/") in OPEN or path.startswith("/page/")) and scope["method"] in ("GET", "HEAD"):
            return  # however full: who is told that a busy server is not well takes it away
        if refused:
            raise refused
        if self._under_way >= self._queue:
            raise Problem(429, f"{self._queue} requests are being answered already", busy=True)
        length = headers.get("content-length")
        if length is not None and length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large()

    def _refused(self, scope: Scope, headers: Headers) -> Problem | None:
        if self._expected is None:
            local = _is_local(scope)
            return None if local else Problem(403, "without a token this server answers on its own machine only")
        if hmac.compare_digest(headers.get("authorization", "").strip().encode("latin-1", "replace"), self._expected):
            return None
        return Problem(401, "the bearer token is missing or wrong", headers={"WWW-Authenticate": "Bearer"})

    def _too_large(self) -> Problem:
        """Made anew each time: an exception that is raised keeps the frames it passed, and they hold the request."""
        return Problem(413, f"the request is larger than {self._body_mb:g} MiB")

    def _limited(self, receive: Receive) -> Receive:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise self._too_large()
            return message

        return limited


def _is_local(scope: Any) -> bool:
    """Whether the client is on this machine. A client that the server knows nothing of is a test or a Unix socket."""
    client = scope.get("client")
    if not client:
        return True
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
