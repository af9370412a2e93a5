"""The server as it runs: answers, versions that come and go under load, replicas that die, the client, the command."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import ray
from command_line import condu, free_port
from PIL import Image
from served import Served
from serving_load import damaged, differs, load, offline, wait_until_served

from condu_ray.client import AsyncClient, Client
from condu_ray.errors import DataError, ServiceError
from condu_ray.store.history import rollback
from condu_ray.voting.open import load_classifier
from condu_ray.voting.pictures import classify_paths

WORDS = ["a red thing", "stripes", "nothing"]
QUESTIONS: list[dict[str, Any]] = [{}, {"task": "stripes"}, {"labels": WORDS}, {"k": 1}, {"version": 1}]


def until(ask: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 60.0) -> Any:
    """Asks until what is found is good; returns it."""
    end = time.monotonic() + seconds
    while not good(found := ask()):
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


def faults(ready: dict[str, Any]) -> list[str | None]:
    return [each["fault"] for each in ready["replicas"]]


def newest(served: Served) -> int:
    return served.store.versions()[-1]


def test_answers_are_those_of_predict_whoever_asks_at_the_same_time(served: Served) -> None:
    version = newest(served)
    wait_until_served(served.url, version)

    def expected(asked: dict[str, Any]) -> list[dict[str, Any]]:
        vote = {"k": asked["k"]} if "k" in asked else None
        classifier = load_classifier(served.store.url, asked.get("version"), vote)
        return classify_paths(classifier, served.pictures, asked.get("task"), asked.get("labels"))

    known = [expected(asked) for asked in QUESTIONS]
    with Client(served.url) as client, ThreadPoolExecutor(8) as clients:
        asked = [(which, place) for which in range(len(QUESTIONS)) for place in range(len(served.pictures))]
        said = clients.map(lambda one: client.predict([served.pictures[one[1]]], **QUESTIONS[one[0]]), asked)
        for (which, place), reply in zip(asked, said, strict=True):
            (answer,) = reply["answers"]
            assert differs(answer, known[which][place]) == ""
            assert answer["image"] == known[which][place]["image"]
        together = client.predict(served.pictures[:5], top_k=2)
    assert [
        differs(a, {**b, "labels": b["labels"][:2]}) for a, b in zip(together["answers"], known[0], strict=False)
    ] == [""] * 5
    assert set(together["milliseconds"]) == {"decode", "wait", "model"}


def test_versions_come_and_go_without_a_wrong_answer_or_a_lost_request(served: Served) -> None:
    """A good publish, one that cannot be loaded, a rollback, and a killed replica, under load."""
    first = newest(served)
    expected = {first: offline(served.store.url, first, served.pictures)}
    with load(served.url, served.pictures, clients=4) as seen:
        good = served.learn("places")
        expected[good] = offline(served.store.url, good, served.pictures)
        wait_until_served(served.url, good)

        manifest = served.store.manifest(good)
        changed = {"version": good + 1, "parent": good, "objects": damaged(manifest)}
        served.store.commit(manifest.model_copy(update=changed))
        said = until(lambda: httpx.get(f"{served.url}/readyz").json(), lambda found: all(faults(found)))
        assert said["status"] == "fault"
        assert all("is damaged" in fault for fault in faults(said))
        assert {each["version"] for each in said["replicas"]} == {good}

        killed = said["replicas"][0]["replica"]
        ray.kill(ray.get_actor(f"SERVE_REPLICA::condu-ray#Replica#{killed}", namespace="serve"), no_restart=True)
        back = rollback(served.store, first).version
        expected[back] = offline(served.store.url, back, served.pictures)
        wait_until_served(served.url, back)
        until(
            lambda: {each["replica"] for each in wait_until_served(served.url, back)["replicas"]},
            lambda replicas: len(replicas) == 2 and killed not in replicas,
        )
    figures = seen.figures()
    assert figures["load_requests"] > 50
    assert figures["errors_5xx"] == 0, (figures, seen.errors)
    assert set(figures["statuses"]) <= {200, 503}
    assert figures["clean_503"] <= 8
    assert set(seen.versions) == {first, good, back}
    assert seen.wrong(expected) == []


def rubbish() -> list[tuple[bytes, str]]:
    """(bytes, what is said of them) that are no pictures."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "PNG")
    whole = buffer.getvalue()
    huge = bytearray(whole)
    huge[16:24] = (100_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    thin = io.BytesIO()
    Image.new("RGB", (5000, 2)).save(thin, "PNG")
    return [
        (b"", "empty file"),
        (b"GIF89a", "cannot be read"),
        (whole[: len(whole) // 2], "cannot be read"),
        (bytes(huge), "too large"),
        (thin.getvalue(), "too long and thin"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not a picture"),
        (b"\x80\x04\x95cposix\nsystem\n", "not a picture"),
    ]


@pytest.mark.parametrize("place", range(7))
def test_what_is_no_picture_is_named_and_refused(served: Served, place: int) -> None:
    body, said = rubbish()[place]
    files = [("image", ("good.png", served.pictures[0].read_bytes())), ("image", ("bad", body))]
    response = httpx.post(f"{served.url}/v1/predict", files=files, timeout=60)
    assert response.status_code == 422
    assert "picture 2 (bad)" in response.json()["detail"]
    assert said in response.json()["detail"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"task": "stripe"}, "did you mean stripes?"),
        ({"task": "stripes", "labels": WORDS}, "task stripes and labels are both given"),
        ({"labels": ["a", "a"]}, "'a' is given 2 times"),
        ({"labels": ["a", " "]}, "is empty"),
        ({"version": 999}, "version 999 is not there"),
    ],
)
def test_questions_that_cannot_be_answered_are_one_sentence_for_the_client(
    served: Served, asked: dict[str, Any], said: str
) -> None:
    with Client(served.url) as client, pytest.raises(ServiceError) as caught:
        client.predict([served.pictures[0]], **asked)
    assert "answers 422" in str(caught.value) and said in str(caught.value)
    assert served.store.url not in str(caught.value)


def test_the_async_client_asks_the_same(served: Served) -> None:
    async def ask() -> tuple[Any, ...]:
        async with AsyncClient(served.url) as client:
            return await asyncio.gather(
                client.predict(served.pictures[:2]), client.tasks(), client.versions(), client.ready()
            )

    predicted, tasks, versions, ready = asyncio.run(ask())
    with Client(served.url) as client:
        assert [a["label"] for a in predicted["answers"]] == [
            a["label"] for a in client.predict(served.pictures[:2])["answers"]
        ]
        assert tasks == client.tasks()
        assert versions == client.versions()
    assert ready["serving"] == versions["serving"]
    assert {task["name"] for task in tasks["tasks"]} <= {"colours", "stripes", "places"}


def test_a_file_that_is_not_there_is_the_clients_own_error(served: Served) -> None:
    with Client(served.url) as client, pytest.raises(DataError, match="nowhere.png cannot be read"):
        client.predict(["nowhere.png"])


def test_predict_asks_a_server_as_it_asks_a_store(served: Served) -> None:
    pictures = served.pictures[:3]
    said = condu("predict", *pictures, "--url", served.url, "--labels", ",".join(WORDS), "--json")
    here = condu("predict", *pictures, "--store", served.store.url, "--labels", ",".join(WORDS), "--json")
    assert (said.code, here.code) == (0, 0), said.err + here.err
    assert [differs(a, b) for a, b in zip(said.document, here.document, strict=True)] == ["", "", ""]
    assert [a["image"] for a in said.document] == [str(path) for path in pictures]
    nobody = condu("predict", pictures[0], "--url", f"http://127.0.0.1:{free_port()}")
    assert nobody.code == 2
    assert "cannot be reached" in nobody.err


def test_what_happens_is_counted_for_prometheus(served: Served) -> None:
    node = ray.nodes()[0]
    wanted = {"condu_requests", "condu_stage_seconds", "condu_votes", "condu_similarity", "condu_expert_cache"}
    wanted |= {"condu_request_seconds", "condu_batch_pictures", "condu_strangeness", "condu_version"}
    wanted |= {"condu_version_fault"}
    end, missing = time.monotonic() + 60, wanted
    while missing and time.monotonic() < end:
        httpx.post(f"{served.url}/v1/predict", files={"image": served.pictures[0].read_bytes()}, timeout=60)
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
        line = r'^ray_{}(_total|_bucket)?\{{[^}}]*application="condu-ray"'
        missing = {name for name in wanted if not re.search(line.format(name), text, re.MULTILINE)}
        time.sleep(0.5)
    assert missing == set()


def test_clients_that_leave_are_counted_as_such(served: Served) -> None:
    def counted() -> set[str]:
        with contextlib.suppress(httpx.TimeoutException):
            patience = httpx.Timeout(60, read=0.01)
            httpx.post(f"{served.url}/v1/predict", files={"image": served.pictures[0].read_bytes()}, timeout=patience)
        node = ray.nodes()[0]
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
        return set(re.findall(r'^ray_condu_requests_total\{[^}]*status="(\d+)"', text, re.MULTILINE))

    assert "500" not in until(counted, lambda found: "499" in found)


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(served: Served) -> None:
    port = free_port()
    command = [sys.executable, "-c", "from condu_ray.cli import main; main()", "serve", "--port", str(port)]
    running = subprocess.Popen(
        [*command, "--store", served.store.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, running.stderr.read() if running.stderr else ""
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.predict([served.pictures[0]])["version"] == newest(served)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--store", "nowhere"], "no store at"),
        (["--host", "0.0.0.0"], "no token is set"),
        (["--port", "0"], "port = '0'"),
        (["--batch", "many"], "batch = 'many'"),
        (["--version", "99"], "has no version 99"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(served: Served, options: list[str], said: str) -> None:
    told = condu("serve", *(options if "--store" in options else [*options, "--store", served.store.url]))
    assert told.code == 2
    assert said in told.err


def test_a_port_that_is_taken_is_said_before_anything_starts(served: Served) -> None:
    told = condu("serve", "--store", served.store.url, "--port", served.url.rpartition(":")[2])
    assert told.code == 2
    assert "cannot listen on" in told.err and "give another --port" in told.err


def test_a_cluster_that_serves_already_is_left_alone(served: Served) -> None:
    told = condu("serve", "--store", served.store.url, "--port", str(free_port()))
    assert (told.code, "Ray Serve runs on this cluster already" in told.err) == (2, True), told.err
    assert httpx.get(f"{served.url}/healthz", timeout=60).status_code == 200


@pytest.mark.slow
def test_experts_in_processes_of_their_own_answer_the_same(served: Served) -> None:
    from ray import serve

    from condu_ray.config import ServeConfig
    from condu_ray.serving.app import application

    version = newest(served)
    config = ServeConfig(store=served.store.url, cpus=0.01, experts=1, expert_replicas=2)
    serve.run(application(config), name="spread", route_prefix="/spread")
    url = f"{served.url}/spread"
    wait_until_served(url, version)
    try:
        with load(url, served.pictures, clients=4) as seen:
            until(lambda: len(seen.seen), lambda count: count > 60)
            (experts,) = [each for each in ray.util.list_named_actors(True) if "spread#Experts" in each["name"]][:1]
            ray.kill(ray.get_actor(**experts), no_restart=True)
            until(lambda: len(seen.seen), lambda count: count > 200)
    finally:
        serve.delete("spread")
    assert seen.wrong({version: offline(served.store.url, version, served.pictures)}) == []
    assert seen.figures()["errors_5xx"] == 0
