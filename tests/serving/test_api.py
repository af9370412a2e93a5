"""The HTTP interface without Ray: what is read, what is refused, and how. The answers themselves: test_serving.py."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from condu_ray.config import ServeConfig
from condu_ray.serving.api import build
from condu_ray.serving.guard import Guard
from condu_ray.serving.messages import Asking, Question, Reply, Standing
from condu_ray.serving.problems import MEDIA_TYPE, Problem
from condu_ray.store import open_store

STORE = Path(__file__).parents[1] / "fixtures" / "store_v1" / "store"
TOKEN = "a-token-of-many-letters"


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


class Answers:
    """Stands for the replicas: keeps what it is asked, and says what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Asking] = []
        self.reply: Reply | Problem | None = None
        self.hold: asyncio.Event | None = None
        self.standing = [Standing("one", 2, 2, None, None)]

    async def answer(self, asking: Asking) -> Reply:
        self.asked.append(asking)
        if self.hold:
            await self.hold.wait()
        if isinstance(self.reply, Problem):
            raise self.reply
        return self.reply or Reply(tuple({"image": name} for name in asking.names), 2, {"decode": 1.0})

    def standings(self) -> list[Standing]:
        return self.standing


class Server:
    """The interface with these settings; `call` as httpx."""

    def __init__(self, **settings: Any) -> None:
        self.backend, self.counted = Answers(), list[tuple[str, int]]()
        self.config = ServeConfig(store=str(STORE), **settings)
        api = build(self.config, open_store(STORE), self.backend, lambda *seen: self.counted.append(seen[:2]))
        self._app = api

    def client(self, address: str = "127.0.0.1") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self._app, client=(address, 5), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://server")

    def call(self, method: str, path: str, address: str = "127.0.0.1", **content: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.client(address) as client:
                return await client.request(method, path, **content)

        return asyncio.run(once())

    def predict(self, *pictures: bytes, **fields: Any) -> httpx.Response:
        files = [("image", (f"{place}.png", body)) for place, body in enumerate(pictures)]
        return self.call("POST", "/v1/predict", files=files, data=fields)


@pytest.fixture
def server() -> Server:
    return Server()


def problem(response: httpx.Response, status: int) -> str:
    """The sentence of a problem document, which must be whole."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail", "request_id"}
    assert (document["type"], document["status"]) == ("about:blank", status)
    return str(document["detail"])


def test_a_form_and_json_ask_the_same(server: Server) -> None:
    body = png()
    assert server.predict(body, body, labels=["cat", "dog"], top_k="3", k="2", version="1").status_code == 200
    images = [base64.b64encode(body).decode(), "data:image/png;base64," + base64.b64encode(body).decode()]
    asked = {"images": images, "labels": ["cat", "dog"], "top_k": 3, "k": 2, "version": 1}
    assert server.call("POST", "/v1/predict", json=asked).status_code == 200
    form, document = server.backend.asked
    assert form.question == document.question == Question(None, ("cat", "dog"), 2, 1, 3)
    assert form.pictures == document.pictures == (body, body)
    assert (form.names, document.names) == (("0.png", "1.png"), ("0", "1"))


def test_without_more_it_asks_for_everything_learned(server: Server) -> None:
    response = server.predict(png(), task="")
    assert server.backend.asked[0].question == Question()
    assert response.json() == {"answers": [{"image": "0.png"}], "version": 2, "milliseconds": {"decode": 1.0}}


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        ({"json": {}}, 422, "images"),
        ({"json": {"images": []}}, 422, "images"),
        ({"json": {"images": ["!"]}}, 422, "images.0 is not base64"),
        ({"json": {"images": ["AA=="], "labels": []}}, 422, "labels"),
        ({"json": {"images": ["AA=="], "top_k": 0}}, 422, "top_k"),
        ({"json": {"images": ["AA=="], "top_k": 10**9}}, 422, "top_k"),
        ({"json": {"images": ["AA=="], "k": 65}}, 422, "k: "),
        ({"json": {"images": ["AA=="], "version": 0}}, 422, "version"),
        ({"json": {"images": ["AA=="], "version": 10**30}}, 422, "version"),
        ({"json": {"images": ["AA=="], "path": "/etc/passwd"}}, 422, "path"),
        ({"json": {"images": ["AA=="], "labels": ["x" * 201]}}, 422, "longer than 200"),
        ({"json": {"images": ["AA=="], "labels": ["x"] * 101}}, 422, "101 labels: send 1 to 100"),
        ({"json": {"images": ["AA=="] * 17}}, 422, "17 pictures: send 1 to 16"),
        ({"json": [1]}, 422, "body"),
        (
            {"content": b'{"images": ["AA=="], "labels": [NaN]}', "headers": {"content-type": "application/json"}},
            422,
            "labels",
        ),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422, "JSON"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 422, "JSON"),
        ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 422, "JSON"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "send multipart/form-data"),
        ({}, 415, "send multipart/form-data"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, ""),
        ({"files": [("picture", ("a.png", b"x"))]}, 422, "'picture': call it image"),
        ({"files": [("image", ("a.png", b"x"))] * 18}, 422, "more than 16 pictures: send 1 to 16"),
        ({"files": [("image", ("a.png", b"x"))], "data": {"labels": ["x"] * 130}}, 422, "more than 100 labels"),
        ({"files": [("image", ("a.png", b"x"))], "data": {"k": "many"}}, 422, "k: "),
        ({"files": [("image", ("a.png", b"x"))], "data": {"k": ["1", "2"]}}, 422, "'k' is given twice"),
        ({"files": {"task": (None, "pets")}}, 422, "0 pictures: send 1 to 16"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(server: Server, content: Any, status: int, said: str) -> None:
    assert said in problem(server.call("POST", "/v1/predict", **content), status)
    assert server.backend.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/predict", 405),
        ("DELETE", "/v1/tasks", 405),
        ("GET", "/page/..%2fapi.py", 404),
        ("GET", "/v1/tasks?version=99", 404),
        ("GET", "/v1/tasks?version=x", 422),
        ("GET", "/v1/tasks?version=-1", 422),
        ("GET", "/docs", 404),
    ],
)
def test_other_errors_have_the_same_form(server: Server, method: str, path: str, status: int) -> None:
    problem(server.call(method, path), status)


def test_what_a_replica_refuses_is_told(server: Server) -> None:
    server.backend.reply = Reply(refused="task petz is not in version 2: did you mean pets?")
    assert "did you mean pets?" in problem(server.predict(png()), 422)
    server.backend.reply = Reply(late=True)
    response = server.predict(png())
    problem(response, 503)
    assert response.headers["retry-after"] == "1"
    server.backend.reply = Problem(503, "gone", busy=True)
    assert problem(server.predict(png()), 503) == "gone"


def test_a_mistake_of_ours_says_nothing_of_the_machine(server: Server) -> None:
    server.backend.standing = [None]  # type: ignore[list-item]
    assert problem(server.call("GET", "/v1/versions"), 500) == "a mistake of the server; its log has more"


def test_bodies_are_limited_whether_they_say_their_length_or_not() -> None:
    server = Server(body_mb=0.01)
    assert "larger than 0.01 MiB" in problem(server.predict(bytes(20_000)), 413)

    async def chunks() -> Any:
        for _ in range(30):
            yield bytes(1000)

    headers = {"content-type": "application/json"}
    assert "larger than" in problem(server.call("POST", "/v1/predict", content=chunks(), headers=headers), 413)
    assert server.predict(png()).status_code == 200


class Refused(dict[str, Any]):
    """A scope that can be watched."""


@pytest.mark.parametrize("told", [True, False], ids=["its length is told", "it is found out"])
def test_nothing_is_kept_of_a_request_that_was_too_large(told: bool) -> None:
    async def read(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def receive() -> Any:
        return {"type": "http.request", "body": bytes(20_000)}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    guard, statuses = Guard(read, ServeConfig(body_mb=0.01), lambda *seen: None), list[Any]()
    headers = [(b"content-length", b"20000")] if told else []
    scope = Refused(type="http", method="POST", path="/v1/predict", headers=headers)
    kept = weakref.ref(scope)
    asyncio.run(guard(scope, receive, send))
    del scope
    gc.collect()
    assert (statuses[0], kept()) == (413, None)


def test_a_request_that_takes_too_long_is_given_up() -> None:
    server = Server(timeout_seconds=0.05)

    async def run() -> httpx.Response:
        server.backend.hold = asyncio.Event()
        async with server.client() as client:
            return await client.post("/v1/predict", files={"image": ("a.png", png())})

    response = asyncio.run(run())
    assert "not answered within 0.05 s" in problem(response, 503)
    assert response.headers["retry-after"] == "1"


def test_more_requests_than_the_queue_holds_are_told_to_come_back() -> None:
    server = Server(queue=2)

    async def run() -> list[httpx.Response]:
        server.backend.hold = asyncio.Event()
        async with server.client() as client:
            calls = [
                asyncio.create_task(client.post("/v1/predict", files={"image": ("a.png", png())})) for _ in range(5)
            ]
            done, _ = await asyncio.wait(calls, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 3:
                more, _ = await asyncio.wait(set(calls) - done, timeout=30, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            server.backend.hold.set()
            return list(await asyncio.gather(*calls))

    responses = asyncio.run(run())
    assert sorted(each.status_code for each in responses) == [200, 200, 429, 429, 429]
    refused = next(each for each in responses if each.status_code == 429)
    assert "2 requests are being answered already" in problem(refused, 429)
    assert refused.headers["retry-after"] == "1"


def test_a_server_that_is_full_is_well_all_the_same() -> None:
    server = Server(queue=1)

    async def run() -> list[int]:
        server.backend.hold = asyncio.Event()
        async with server.client() as client:
            call = asyncio.create_task(client.post("/v1/predict", files={"image": ("a.png", png())}))
            while not server.backend.asked:
                await asyncio.sleep(0.01)
            found = [(await client.get(path)).status_code for path in ("/healthz", "/readyz", "/", "/v1/tasks")]
            server.backend.hold.set()
            await call
        return found

    assert asyncio.run(run()) == [200, 200, 200, 429]


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
def test_who_watches_may_ask_for_the_head_alone(server: Server, path: str) -> None:
    assert server.call("HEAD", path).status_code == 200


def test_a_client_that_leaves_is_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Before its question is whole, which the interface is told; and while it waits: Serve then cancels the call."""
    server = Server()
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "headers": headers}
        await server._app({**scope, "client": ("127.0.0.1", 5), "http_version": "1.1"}, receive, send)
        server.backend.hold = asyncio.Event()
        async with server.client() as client:
            call = asyncio.create_task(client.post("/v1/predict", files={"image": ("a.png", png())}))
            while not server.backend.asked:
                await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    asyncio.run(run())
    assert server.counted == [("/v1/predict", 499), ("/v1/predict", 499)]
    assert sent == [] and "failed" not in caplog.text


GOOD = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (GOOD, 200),
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": TOKEN}, 401),
        ({"authorization": f"Basic {TOKEN}"}, 401),
        ({"authorization": f"Bearer {TOKEN} "}, 200),  # HTTP strips it
        ({"authorization": f"Bearer {TOKEN}x"}, 401),
        ({"authorization": "Bearer \u00e9".encode("latin-1")}, 401),
    ],
)
def test_the_token_opens_the_interface(headers: Any, status: int) -> None:
    server = Server(token=TOKEN, host="0.0.0.0")
    for method, path in (("GET", "/v1/tasks"), ("GET", "/v1/versions"), ("POST", "/v1/predict"), ("GET", "/nothing")):
        response = server.call(method, path, address="10.0.0.9", headers=headers)
        if status == 401:
            problem(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        else:
            assert response.status_code != 401
    assert server.backend.asked == []


def test_health_and_the_page_need_no_token_and_tell_no_paths() -> None:
    server = Server(token=TOKEN)
    server.backend.standing = [Standing("one", 1, 2, "/a/path is damaged", None)]
    for path in ("/", "/page/app.js", "/page/app.css", "/healthz", "/readyz"):
        assert server.call("GET", path).status_code == 200
    assert server.call("GET", "/readyz").json()["replicas"][0]["fault"] == "a newer version cannot be loaded"
    assert server.call("GET", "/readyz", headers=GOOD).json()["replicas"][0]["fault"] == "/a/path is damaged"


def test_the_page_is_open_where_the_application_has_a_prefix_too() -> None:
    server = Server(token=TOKEN)
    transport = httpx.ASGITransport(server._app, client=("127.0.0.1", 5), root_path="/birds")

    async def run(path: str) -> int:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.get(path, follow_redirects=True)).status_code

    found = [asyncio.run(run(path)) for path in ("/birds", "/birds/", "/birds/readyz", "/birds/v1/tasks")]
    assert found == [200, 200, 200, 401]


def test_without_a_token_only_the_own_machine_is_answered(server: Server) -> None:
    assert "its own machine" in problem(server.call("GET", "/v1/tasks", address="10.0.0.9"), 403)
    assert server.call("GET", "/v1/tasks", address="::1").status_code == 200


@pytest.mark.parametrize("origins", [(), ("https://page.example",)])
def test_other_pages_may_call_only_where_that_is_set(origins: tuple[str, ...]) -> None:
    server, allowed = Server(origins=origins, token=TOKEN), origins[0] if origins else None
    asked = {"origin": "https://page.example"}
    leave = {**asked, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for response in (
        server.call("GET", "/healthz", headers=asked),
        server.call("POST", "/v1/predict", headers=asked),
        server.call("OPTIONS", "/v1/predict", headers=leave),
    ):
        assert response.headers.get("access-control-allow-origin") == allowed
    assert response.status_code == (200 if origins else 401)
    other = server.call("OPTIONS", "/v1/predict", headers={**leave, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_every_response_forbids_other_hosts_and_frames(server: Server) -> None:
    for path in ("/", "/nothing", "/readyz"):
        policy = server.call("GET", path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy


def test_the_page_names_no_other_host(server: Server) -> None:
    for path in ("/", "/page/app.js", "/page/app.css"):
        text = server.call("GET", path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "//cdn" not in text


def test_readiness_tells_every_replica(server: Server) -> None:
    server.backend.standing = [Standing("a", 2, 3, "version 3 is damaged", None), Standing("b", 3, 3, None, 1)]
    found = server.call("GET", "/readyz").json()
    assert (found["status"], found["serving"], found["newest"]) == ("fault", 3, 3)
    assert [each["fault"] for each in found["replicas"]] == ["version 3 is damaged", None]
    server.backend.standing = []
    response = server.call("GET", "/readyz")
    assert "no replica is up yet" in problem(response, 503)
    problem(server.call("GET", "/v1/tasks"), 503)


def test_tasks_and_versions_are_those_of_the_store(server: Server) -> None:
    tasks = server.call("GET", "/v1/tasks").json()
    manifest = open_store(STORE).manifest(2)
    assert [each["name"] for each in tasks["tasks"]] == [card.name for card in manifest.tasks]
    for row, card in zip(tasks["tasks"], manifest.tasks, strict=True):
        assert "source" not in row
        assert [each["label"] for each in row["prototypes"]] == card.classes
    assert server.call("GET", "/v1/tasks?version=1").json()["version"] == 1
    versions = server.call("GET", "/v1/versions").json()
    assert [each["version"] for each in versions["versions"]] == open_store(STORE).versions()
    assert versions["serving"] == 2


def test_a_store_that_is_away_is_no_mistake_of_the_server_and_what_gc_removed_is_gone(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(STORE, tmp_path / "store")
    store, manifests = open_store(tmp_path / "store"), tmp_path / "store" / "versions"
    server._app = build(server.config, store, server.backend, lambda *seen: None)
    assert server.call("GET", "/v1/tasks?version=1").status_code == 200
    (manifests / "00000001.json").unlink()
    assert "no version 1" in problem(server.call("GET", "/v1/tasks?version=1"), 404)
    assert [each["version"] for each in server.call("GET", "/v1/versions").json()["versions"]] == [2, 3, 4]
    (manifests / "00000002.json").write_text("{")
    response = server.call("GET", "/v1/versions")
    assert "the store cannot be read" in problem(response, 503)
    assert response.headers["retry-after"] == "1" and str(tmp_path) not in response.text
    assert "00000002.json" in caplog.text


def test_the_openapi_document_describes_both_ways_to_ask(server: Server) -> None:
    document = server.call("GET", "/openapi.json").json()
    content = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "application/json"}
    assert set(document["paths"]) == {"/v1/predict", "/v1/tasks", "/v1/versions", "/healthz", "/readyz"}
    assert json.dumps(document).count("binary") == 1


def test_every_request_is_counted_by_route_and_never_by_what_a_client_makes_up(server: Server) -> None:
    calls: list[Callable[[], httpx.Response]] = [
        lambda: server.call("GET", "/made/up"),
        lambda: server.call("GET", "/page/made-up"),
        lambda: server.predict(png()),
        lambda: server.predict(),
    ]
    for call in calls:
        call()
    assert server.counted == [("none", 404), ("/page/{name}", 404), ("/v1/predict", 200), ("/v1/predict", 415)]
