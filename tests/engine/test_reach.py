"""A cluster whose nodes do not all see the store, the pictures or a sweep's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from in_process_crew import settings, silent
from ray.exceptions import RayActorError

from condu_ray.data import Picture, Split
from condu_ray.engine import command, reach
from condu_ray.engine.cluster import Cluster
from condu_ray.errors import ConfigError
from condu_ray.tuning import command as sweeping

TWO = Cluster(((2, 0), (2, 0)), joined=True)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Takes what each node lacks (an error: it is lost), the first one without cores; returns who was asked."""

    def made(**lacks: Any) -> list[str]:
        asked = list[str]()
        there = [
            {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": {"CPU": 2.0} if place else {}}
            for place, name in enumerate(lacks)
        ]

        def options(scheduling_strategy: Any) -> Any:
            assert not scheduling_strategy.soft

            def remote(paths: Sequence[str]) -> Any:
                asked.append(scheduling_strategy.node_id)
                return scheduling_strategy.node_id, tuple(paths)

            return SimpleNamespace(remote=remote)

        def get(ref: tuple[str, Sequence[str]]) -> list[str]:
            name, paths = ref
            if isinstance(lacks[name], Exception):
                raise lacks[name]
            return [path for path in paths if path in lacks[name]]

        stand_in = SimpleNamespace(
            nodes=lambda: there,
            remote=lambda **given: lambda function: SimpleNamespace(options=options),
            wait=lambda refs, num_returns, timeout: (refs, []),
            get=get,
        )
        monkeypatch.setattr(reach, "ray", stand_in)
        monkeypatch.setattr(
            reach, "NodeAffinitySchedulingStrategy", lambda node_id, soft: SimpleNamespace(node_id=node_id, soft=soft)
        )
        return asked

    return made


def test_a_node_that_lacks_something_is_named(nodes: Any) -> None:
    asked = nodes(head=["/store", "/p.png"], one=[], two=["/p.png"])
    with pytest.raises(
        ConfigError, match=r"node two of the cluster does not see the pictures of birds \(/p.png\): put"
    ):
        reach.check_reached(TWO, {"the store": "/store", "the pictures of birds": "/p.png"})
    assert asked == ["one", "two"]  # none runs on a head without cores


def test_what_was_unpacked_for_the_driver_alone(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDU_CACHE", str(tmp_path))
    tar = str(tmp_path / "tars" / "0.tar")
    nodes(head=[], one=[tar])
    with pytest.raises(ConfigError, match="set CONDU_CACHE to a folder that every node sees"):
        reach.check_reached(TWO, {"the pictures of birds": tar})


def test_a_session_and_a_sweep_ask_before_they_train(
    tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial of the sweep would train, and its results stay on the node that does not share the folder."""
    asked = list[dict[str, str]]()

    def refuse(cluster: Cluster, places: dict[str, str]) -> None:
        asked.append(places)
        raise ConfigError("a node does not see it")

    monkeypatch.setattr(command, "check_reached", refuse)
    monkeypatch.setattr(sweeping, "check_reached", refuse)
    config = settings(tmp_path / "store", tiny_model_dir)
    with pytest.raises(ConfigError, match="a node does not see it"):
        command.run(config.model_copy(update={"tasks": {"a": str(picture_tasks["places"])}}), silent, "", TWO)
    file = tmp_path / "sweep.yaml"
    session = {"tasks": {"a": str(picture_tasks["places"])}, "tracking": "off"}
    file.write_text(yaml.safe_dump({"session": session, "space": {"train.lr": {"log": [1e-5, 1e-3]}}}))
    with pytest.raises(ConfigError, match="a node does not see it"):
        sweeping.run(file, tmp_path / "sweep", silent, TWO)
    first, second = asked
    assert first["the store"] == f"{tmp_path}/store/store.json"
    assert second["the folder of the sweep"] == f"{tmp_path}/sweep/sweep.json"
    pictures = [Path(each["the pictures of a"]) for each in asked]
    assert all(each.is_file() and each.is_relative_to(picture_tasks["places"] / "train") for each in pictures)


def test_a_node_that_is_lost_or_has_all_is_no_obstacle(nodes: Any) -> None:
    nodes(head=[], one=RayActorError(), two=[])
    reach.check_reached(TWO, {"the store": "/store"})


def test_nobody_is_asked_on_one_machine_or_of_buckets(nodes: Any) -> None:
    asked = nodes(head=[], one=["/store"])
    reach.check_reached(Cluster(((8, 0),), joined=True), {"the store": "/store"})
    reach.check_reached(Cluster(((8, 0), (8, 0)), joined=False), {"the store": "/store"})
    reach.check_reached(TWO, {"the store": "s3://bucket/store/store.json"})
    assert asked == []


def test_what_a_node_says(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    there, away = str(tmp_path / "there"), str(tmp_path / "away")
    assert reach.missing([there, away]) == [away]
    split = Split((Picture("a/b.png", -1, -1), Picture("a/c.png", -1, -1)), np.zeros(2, np.int64))
    assert reach.one_of({"birds": split}) == {"the pictures of birds": str(Path("a/b.png").absolute())}
