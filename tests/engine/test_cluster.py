"""Who may give orders to a Ray cluster that a command starts."""

from __future__ import annotations

import os
from typing import Any

import grpc
import pytest
import ray

from condu_ray.engine import cluster

HOLDS = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


@pytest.mark.usefixtures("ray_cluster")
def test_who_lacks_the_token_is_turned_away() -> None:
    """Ray's ports are open on every interface, whatever address it is told."""

    def asked(token: str | None) -> Any:
        with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
            given = [("authorization", f"Bearer {token}")] if token else None
            return channel.unary_unary(HOLDS)(b"", timeout=30, metadata=given)

    for token in (None, "0" * 64):
        with pytest.raises(grpc.RpcError, match="InvalidAuthToken"):
            asked(token)
    assert asked(os.environ["RAY_AUTH_TOKEN"])


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
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
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
