"""The figures of a benchmark, read from its work folder: manifests, evaluations, what was shared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from condu_ray.benchmark.evaluation import Spaces, read_evaluation, spaces_of
from condu_ray.benchmark.probe import read_probe
from condu_ray.benchmark.settings import Benchmark, common, figures_of, probe_of, routing_of, shared_of, store_of
from condu_ray.benchmark.sharing import given_seconds
from condu_ray.benchmark.systems import LINEAR_PROBE, SYSTEMS, System
from condu_ray.benchmark.work import learned
from condu_ray.catalogue import info
from condu_ray.engine.figures import gain_kept
from condu_ray.store import Manifest, TaskCard, open_store
from condu_ray.store.documents import read
from condu_ray.tracking.history import accuracy_matrix
from condu_ray.tracking.matrix import AccuracyMatrix, mean

STEPS = ("train", "rescale", "fuse")
"""Steps of a session that make a task's expert; the others measure, or see the pictures for it (`on_features`)."""

# Objects of a version by name. Those of neither list are for routing and for measuring.
OF_ONE_TASK = ("birth-", "flips-", "rescalers-", "signs-", "delta-", "buffers-", "memory-")
OF_ALL_TASKS = ("u-", "magnitudes-", "tasks-", "latest-")


@dataclass(frozen=True)
class Result:
    """What one method gave with one seed. matrices: by label space, accuracy in percent.

    pictures: test pictures of each task.

    seconds: of training, rescaling and fusing a task, None where nothing is trained. bytes_per_task, bytes_shared: see
    `state_bytes`. rank: of its adapters, None without. routing: see `route_versions`, None where nobody votes.
    """

    matrices: Mapping[str, AccuracyMatrix]
    seconds: float | None
    bytes_per_task: float
    bytes_shared: int
    pictures: Sequence[int]
    rank: int | None = None
    routing: Mapping[str, float | None] | None = None


def result_of(benchmark: Benchmark, method: str, seed: int) -> Result | None:
    """What the work folder says of a method and seed; None until all of it is there."""
    if method == LINEAR_PROBE:
        return _probe(benchmark, seed)
    system = SYSTEMS[method]
    versions = learned(store_of(benchmark, system, seed), list(benchmark.stream.tasks))
    if versions is None:
        return None
    figures = figures_of(benchmark, system, seed)
    evaluations = [read_evaluation(manifest, spaces_of(system), figures) for manifest in versions]
    routing = read(routing_of(benchmark, seed)) if system.votes else None
    if None in evaluations or (system.votes and routing is None):
        return None
    store, trains = open_store(store_of(benchmark, system, seed)), info(system.method).trains
    header = store.header
    spent = given_seconds(shared_of(benchmark, system, seed)) + math.fsum(_spent(versions, system))
    return Result(
        _matrices(versions, [each for each in evaluations if each is not None]),
        spent / len(versions) if trains else None,
        *state_bytes(versions[-1]),
        _pictures(versions[-1]),
        int(header.settings["lora.rank"]) if system.method == "condu-lora" else None,
        routing,
    )


def _pictures(manifest: Manifest) -> list[int]:
    """Test pictures that each task has; what was measured may be a sample of them (`eval_pictures`)."""
    return [card.pictures["test"] for card in manifest.tasks]


def state_bytes(manifest: Manifest) -> tuple[float, int]:
    """(bytes of a task: all that grows with the number of tasks, divided by it; bytes that all tasks share).

    θ⁰ is not counted, nor what is kept for routing (prototypes, domains) and for measuring (lists of test pictures,
    samples of deltas).
    """
    sizes = {name: ref.bytes for name, ref in manifest.objects.items()}
    own = sum(size for name, size in sizes.items() if name.startswith(OF_ONE_TASK))
    return own / len(manifest.tasks), sum(size for name, size in sizes.items() if name.startswith(OF_ALL_TASKS))


def report(benchmark: Benchmark, results: Mapping[tuple[str, int], Result]) -> dict[str, Any]:
    """What `jobs/benchmark.py --json` prints; docs/accuracy.md defines each figure. results: by method and seed."""
    config = common(benchmark)
    bounds = {seed: bounds_of(benchmark, seed) for seed in benchmark.seeds}
    return {
        "stream": list(benchmark.stream.tasks),
        "model": f"{config.model}/{config.pretrained}" if config.pretrained else config.model,
        "results": [
            {
                "method": method,
                "labels": labels,
                "seed": seed,
                "transfer": matrix.transfer(),
                "average": matrix.average(),
                "last": matrix.last(),
                **_incremental(matrix, result.pictures, labels),
                "retention": gain_kept(*bounds[seed], matrix.last()),
                "router_accuracy": (result.routing or {}).get("accuracy"),
                "router_top2": (result.routing or {}).get("top2"),
                "auroc": (result.routing or {}).get("auroc"),
                "router_alone": (result.routing or {}).get("alone"),
                "seconds": result.seconds,
                "bytes_per_task": result.bytes_per_task,
                "bytes_shared": result.bytes_shared,
                "rank": result.rank,
                "matrix": matrix.to_json()["values"],
            }
            for (method, seed), result in results.items()
            for labels, matrix in result.matrices.items()
        ],
    }


def _incremental(matrix: AccuracyMatrix, pictures: Sequence[int], labels: str) -> dict[str, float | None]:
    """The field's class-incremental figures, where all learned classes compete."""
    row = matrix.incremental_row(pictures) if labels == "union" else [None]
    return {"incremental_average": mean(row), "incremental_last": row[-1]}


def bounds_of(benchmark: Benchmark, seed: int) -> tuple[float | None, float | None]:
    """(zero-shot, individual): mean accuracy over the tasks by θ⁰ and by one full fine-tuning a task, task named.

    None where no store of this seed has measured it.
    """
    zero_shot = individual = None
    for system, cards in _cards(benchmark, seed):
        zero_shot = mean([card.figures.get("zero_shot") for card in cards])
        if system.fine_tunes_all:
            individual = mean([card.figures.get("own") for card in cards])
    return zero_shot, individual


def _cards(benchmark: Benchmark, seed: int) -> Iterator[tuple[System, Sequence[TaskCard]]]:
    for system in SYSTEMS.values():
        versions = learned(store_of(benchmark, system, seed), list(benchmark.stream.tasks))
        if versions:
            yield system, versions[-1].tasks


def _matrices(versions: Sequence[Manifest], evaluations: Sequence[Spaces]) -> dict[str, AccuracyMatrix]:
    tasks = [card.name for card in versions[-1].tasks]
    experts = accuracy_matrix(versions)
    assert experts is not None
    rows = {"task": [dict(zip(tasks[: n + 1], values, strict=False)) for n, values in enumerate(experts.values)]}
    rows |= {space: [each[space] for each in evaluations] for space in evaluations[-1]}
    # Before a task is learned the vote answers, whatever the labels; nor was every session told of all tasks to come.
    return {
        space: AccuracyMatrix(
            tasks,
            [
                [{**each["candidates"], **row}[name] for name in tasks]
                for each, row in zip(evaluations, of, strict=True)
            ],
        )
        for space, of in rows.items()
    }


def _probe(benchmark: Benchmark, seed: int) -> Result | None:
    """Before a task is learned θ⁰ answers."""
    tasks = list(benchmark.stream.tasks)
    found = read_probe(probe_of(benchmark, seed))
    versions = learned(store_of(benchmark, SYSTEMS["zero-shot"], seed), tasks)
    if versions is None or not set(tasks) <= set(found):
        return None
    zero_shot = [card.figures.get("zero_shot") for card in versions[-1].tasks]
    values = [
        [found[name]["accuracy"] if column <= row else zero_shot[column] for column, name in enumerate(tasks)]
        for row in range(len(tasks))
    ]
    seconds, size = (math.fsum(found[name][key] for name in tasks) / len(tasks) for key in ("seconds", "bytes"))
    pictures = _pictures(versions[-1])
    return Result({"task": AccuracyMatrix(tasks, values)}, seconds, size, 0, pictures)


def _spent(versions: Sequence[Manifest], system: System) -> Iterator[float]:
    # The others see the pictures while they train.
    steps = (*STEPS, "features") if info(system.method).on_features else STEPS
    for manifest in versions:
        yield from (manifest.seconds.get(step, 0.0) for step in steps)
