"""The command: what it asks for, what it prints, and what it says of wrong input."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import benchmark as job
import pytest
from in_process_crew import InProcessCrew, silent

from condu_ray import reports
from condu_ray.benchmark import run as run_module
from condu_ray.benchmark.run import measure
from condu_ray.config import SessionConfig
from condu_ray.engine.cluster import Cluster


def given(*arguments: str | Path) -> list[str]:
    return [str(argument) for argument in arguments]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as left:
        job.main(given(*arguments))
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    return said.err


def test_a_finished_benchmark_prints_one_document(
    picture_tasks: dict[str, Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders = []
    monkeypatch.setattr(job, "run", lambda order, stage: orders.append(order) or {"results": []})
    stream = ",".join(f"{name}={picture_tasks[name]}" for name in ("colours", "stripes"))
    asked = given("--stream", stream, "--methods", "zero-shot", "--seeds", "3", "--reverse", "--eval-pictures", 9)
    asked += given("--model", f"local-dir:{tiny_model_dir}", "--work", tmp_path / "work", "--json")
    job.main(asked)
    monkeypatch.undo()
    capsys.readouterr()
    (order,) = orders
    measure(order, lambda store, config: nullcontext(InProcessCrew(store, config)), silent)
    job.main(asked)
    found = json.loads(capsys.readouterr().out)
    assert found["stream"] == ["stripes", "colours"]
    assert [(row["method"], row["labels"], row["seed"]) for row in found["results"]] == [
        ("zero-shot", labels, 3) for labels in ("task", "candidates", "union")
    ]
    job.main(asked[:-1])
    assert "labels union, percent" in capsys.readouterr().out


def test_a_cluster_that_is_joined_may_grow_before_each_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--node-wait-seconds`, as `learn` does it: see tests/engine/test_room.py."""
    small, grown = Cluster((), joined=True), Cluster(((4, 0),), joined=True)
    dismissed: list[str] = []
    closing_well = argparse.Namespace(close=lambda: None, dismiss=lambda: dismissed.append("done"))
    asked: list[Any] = []
    crews: list[Any] = []

    def room(config: SessionConfig, jobs: int, cluster: Cluster, stage: Any) -> Any:
        asked.append((config.node_wait_seconds, jobs, cluster))
        return grown

    def measure_twice(benchmark: Any, crew: Any, stage: Any) -> dict[str, Any]:
        config = SessionConfig(node_wait_seconds=60, tasks={"a": "x", "b": "y"})
        for _ in range(2):
            with crew(argparse.Namespace(url="a store"), config):
                assert not dismissed
        return {}

    monkeypatch.setattr(run_module, "connected", lambda: nullcontext(small))
    monkeypatch.setattr(run_module, "room", room)
    monkeypatch.setattr(run_module, "measure", measure_twice)
    monkeypatch.setattr(run_module, "RayCrew", lambda store, config, cluster: crews.append(cluster) or closing_well)
    run_module.run(object(), silent)  # type: ignore[arg-type]
    assert asked == [(60, 2, small)] * 2
    assert crews == [grown, grown]
    assert dismissed == ["done"]


def test_wrong_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = ("--work", tmp_path / "work")
    assert "one stream is needed" in refused(capsys, "--methods", "condu", *work)
    assert "one stream is needed" in refused(capsys, "--protocol", "mtil-1", "--methods", "condu", *work)
    assert "no method 'condo'" in refused(capsys, "--stream", "a=b", "--methods", "condo", *work)
    assert "--seeds 0,x are not numbers" in refused(
        capsys, "--stream", "a=b", "--methods", "condu", "--seeds", "0,x", *work
    )
    assert "there is no data at 'nowhere'" in refused(capsys, "--stream", "a=nowhere", "--methods", "zero-shot", *work)
    assert list(tmp_path.iterdir()) == []


def test_what_was_stopped_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(order: Any, stage: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", stop)
    with pytest.raises(SystemExit) as left:
        job.main(given("--stream", "a=b", "--methods", "condu", "--work", tmp_path))
    assert left.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(("protocol", "seeds"), [(None, (0,)), ("mtil-1", (42,))])
def test_the_seed_is_the_protocols_own(protocol: str | None, seeds: tuple[int, ...], tmp_path: Path) -> None:
    options = {"stream": None if protocol else "a=b", "protocol": protocol, "data": "torchvision" if protocol else None}
    rest = {
        "seeds": None,
        "model": None,
        "eval_pictures": None,
        "reverse": False,
        "methods": "condu",
        "config": None,
        "increment": None,
        "class_order": None,
    }
    assert job.asked(argparse.Namespace(**options, **rest, work=tmp_path)).seeds == seeds


def test_several_seeds_are_shown_by_mean_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    figures: dict[str, Any] = dict.fromkeys(("transfer", "average", "retention", "router_accuracy", "router_top2"), 1.0)
    figures |= {
        "auroc": None,
        "router_alone": 1.0,
        "seconds": 0.5,
        "bytes_per_task": 2e6,
        "bytes_shared": 0,
        "rank": None,
        "matrix": [[0]],
    }
    rows = [{"method": "condu", "labels": "task", "seed": seed, "last": 40.0 + 10 * seed, **figures} for seed in (0, 2)]
    reports.show_benchmark({"stream": ["a", "b"], "model": "default", "results": rows})
    said = capsys.readouterr().out
    assert "50.0 ± 14.1" in said
    assert "2.00 ± 0.00" in said
    assert "seeds 0, 2" in said
