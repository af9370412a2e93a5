"""Who may give orders to a Ray cluster that a command starts."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray
from command_line import process
from ray._private.utils import check_version_info, compute_version_info

from condu_ray.engine import cluster
from condu_ray.errors import TrainingError

# Twice, as a program does that learns twice; in between nothing of the first cluster is left in the environment.
TWICE = """
import json, os
for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
    os.environ.pop(name, None)
before = dict(os.environ)
import grpc, ray
from condu_ray.engine.cluster import connected

def asked(token):
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        given = [("authorization", f"Bearer {token}")] if token else None
        nodes = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        try:
            return bool(nodes(b"", timeout=30, metadata=given))
        except grpc.RpcError as refused:
            return "InvalidAuthToken" in refused.details() and "refused"

found = []
for _ in range(2):
    with connected() as cluster:
        found.append([cluster.joined, asked(None), asked("0" * 64), asked(os.environ["RAY_AUTH_TOKEN"])])
    left = {name for name in os.environ if os.environ[name] != before.get(name) and name.startswith("RAY_")}
    found[-1].append(sorted(left & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"}))
print(json.dumps(found))
"""


def test_who_lacks_the_token_is_turned_away() -> None:
    """Ray's ports are open on every interface, whatever address it is told."""
    said = process(code=TWICE)
    assert said.code == 0, said.err
    assert said.document == [[False, "refused", "refused", True, []]] * 2


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What Ray finds in the environment when `connect` starts it."""
    seen: dict[str, str | None] = {}

    def init(address: str, **others: Any) -> None:
        assert address == "local"
        seen.update({name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "nodes", list)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *cluster.PRIVATE):
        monkeypatch.setenv(name, "")  # is put back at the end, whatever the test makes of it
        monkeypatch.delenv(name)
    return seen


def test_a_cluster_of_this_process_gets_a_token_of_its_own(started: dict[str, str | None]) -> None:
    """Ray asks for tokens where nobody says otherwise, and would write one into the home folder where it finds none."""
    cluster.connect()
    assert started["RAY_AUTH_MODE"] is None
    assert len(started["RAY_AUTH_TOKEN"] or "") == 64


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_what_the_environment_says_of_tokens_stands(
    mode: str, started: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    cluster.connect()
    assert started == {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": None}


@pytest.mark.parametrize(("ray_there", "python_there"), [("2.61.0", None), (None, "3.11.99")])
def test_a_cluster_of_other_releases_is_said_with_both(
    ray_there: str | None, python_there: str | None, started: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says them in lines below the first one."""
    own_ray, own_python = compute_version_info()
    there = {"ray_version": ray_there or own_ray, "python_version": python_there or own_python}
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", lambda **given: check_version_info(there, "node 10.0.0.2:6379"))
    with pytest.raises(TrainingError) as refused:
        cluster.connect()
    assert str(refused.value) == (
        f"Ray cluster auto runs Ray {there['ray_version']} and Python {there['python_version']}, this process "
        f"Ray {own_ray} and Python {own_python}: use the same releases on every node."
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), "TimeoutError"),
        (ConnectionError("Failed to connect.\nSee the logs."), "Failed to connect."),
        (ConnectionAbortedError("Failure from server:\nTraceback\n  no node"), "Failure from server: no node"),
    ],
)
def test_what_ray_says_is_one_line(
    error: Exception, reason: str, started: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**given: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TrainingError) as refused:
        cluster.connect()
    assert refused.value.message == f"Ray cluster on this machine: {reason.rstrip('.')}"
