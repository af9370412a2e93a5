"""A proxy on loopback that passes requests on to a server, and spoils the one it is told to.

`GET /__fault__/KIND/N` asks for one fault, N requests from now:

500, 503    the server says so, and is not asked
slow        the answer takes a second longer
timeout     no answer comes; the server is not asked
lost        the server does what it is asked, but its answer is lost
half        the answer ends in the middle (an answer without a body is lost)
"""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_S, SILENT_S = 1.0, 4.0
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


class FaultyProxy:
    """Listens on a free port of loopback as long as the block runs. seen: how many requests were spoiled."""

    def __init__(self, upstream: str) -> None:
        proxy, parts = self, urlsplit(upstream)
        self.seen = 0
        self._plan: tuple[str, int] | None = None
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                if self.path.startswith("/__fault__/"):
                    kind, after = self.path.split("/")[2:]
                    proxy._plan = kind, int(after)
                    self.answer(200, [], b"")
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy._next()
                if fault in ("500", "503"):
                    self.answer(int(fault), [], b"")
                    return
                if fault == "timeout":
                    time.sleep(SILENT_S)
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(SLOW_S)
                server = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
                try:
                    server.request(self.command, self.path, body, dict(self.headers))
                    answer = server.getresponse()
                    whole, head = answer.read(), answer.getheaders()
                finally:
                    server.close()
                if fault == "lost" or (fault == "half" and len(whole) < 2):
                    self.close_connection = True
                    return
                self.answer(answer.status, head, whole, len(whole) // 2 if fault == "half" else None)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

            def answer(self, status: int, head: list[tuple[str, str]], body: bytes, only: int | None = None) -> None:
                self.send_response_only(status)
                for name, value in head:
                    if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                        self.send_header(name, value)
                length = {name.lower(): value for name, value in head}.get("content-length", str(len(body)))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(body if only is None else body[:only])
                if only is not None:
                    self.close_connection = True

            def log_message(self, *given: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _next(self) -> str | None:
        with self._lock:
            if self._plan is None:
                return None
            kind, after = self._plan
            if after:
                self._plan = kind, after - 1
                return None
            self._plan = None
            self.seen += 1
            return kind

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *given: object) -> None:
        self._server.shutdown()
        self._server.server_close()
