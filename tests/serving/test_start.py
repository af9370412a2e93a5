"""Processes that find no place are said before Serve is started: it would wait for them without end."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from condu_ray.config import ServeConfig
from condu_ray.engine.cluster import Cluster
from condu_ray.errors import ConfigError
from condu_ray.serving import start
from condu_ray.serving.start import NAME, _check_room

MACHINE = Cluster(((2, 1),), joined=False)


@pytest.mark.parametrize("given", [{"replicas": 2, "gpus": 0.5}, {"replicas": 1, "expert_replicas": 1, "cpus": 1}])
def test_what_fits_is_served(given: dict[str, float]) -> None:
    _check_room(ServeConfig(**given), MACHINE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"replicas": 4}, "4 processes that answer need 1 CPU cores each, this machine has 2 cores and 1 GPUs"),
        ({"gpus": 1, "expert_replicas": 1}, "2 processes that answer need 1 CPU cores and 1 GPUs each"),
        ({"cpus": 3}, "use fewer --replicas"),
    ],
)
def test_what_does_not_fit_is_a_sentence(given: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _check_room(ServeConfig(**given), MACHINE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("joined", "there", "done"),
    [
        (False, [NAME], ["shutdown"]),
        (True, [NAME], ["shutdown"]),
        (True, [], ["shutdown"]),
        (True, [NAME, "others"], [f"delete {NAME}"]),
        (True, ["others"], []),
    ],
)
def test_what_others_serve_on_the_cluster_meanwhile_goes_on(
    joined: bool, there: list[str], done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    stands_for = SimpleNamespace(
        status=lambda: SimpleNamespace(applications=dict.fromkeys(there)),
        shutdown=lambda: said.append("shutdown"),
        delete=lambda name: said.append(f"delete {name}"),
    )
    monkeypatch.setattr(start, "serve", stands_for)
    start._stop(Cluster(((2, 0),), joined))
    assert said == done


def test_a_server_that_waits_for_room_on_a_cluster_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may come, so nothing is refused; but Serve writes into its controller's log only."""
    waits = SimpleNamespace(message="1 replicas have taken more than 30s\nto be scheduled. Resources required: 64")
    found = {NAME: SimpleNamespace(deployments={"Replica": waits, "Front": SimpleNamespace(message="")})}
    looks = list[int]()

    def status() -> SimpleNamespace:
        looks.append(1)
        if len(looks) == 1:
            raise RayActorError  # the controller is started anew
        return SimpleNamespace(applications=found)

    monkeypatch.setattr(start, "serve", SimpleNamespace(status=status))
    monkeypatch.setattr(start, "LOOK_SECONDS", 0.001)
    until = time.monotonic() + 30
    with start._waits_said():
        while len(looks) < 5 and time.monotonic() < until:
            time.sleep(0.001)
    said = "1 replicas have taken more than 30s to be scheduled. Resources required: 64\n"
    assert capsys.readouterr() == ("", said)
