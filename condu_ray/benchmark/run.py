"""What a stream keeps, by method and seed: learned by the session's own spine, into stores that can be asked again.

Every step's result is in the work folder before the next begins: a run that was killed goes on, a finished one reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from condu_ray.benchmark.evaluation import Tests, evaluate_versions, spaces_of
from condu_ray.benchmark.probe import probe_tasks
from condu_ray.benchmark.results import Result, report, result_of
from condu_ray.benchmark.routing import route_versions
from condu_ray.benchmark.settings import (
    Benchmark,
    figures_of,
    probe_of,
    routing_of,
    sessions,
    shared_of,
    store_of,
)
from condu_ray.benchmark.sharing import Crews, Sessions, give_deltas, give_features, train_once
from condu_ray.benchmark.systems import LINEAR_PROBE, SYSTEMS, System
from condu_ray.benchmark.work import check, check_data, claim, learned
from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.engine.cluster import Cluster, connected
from condu_ray.engine.figures import test_pictures
from condu_ray.engine.plan import open_data, store_for
from condu_ray.engine.progress import Stage
from condu_ray.engine.ray_crew import RayCrew
from condu_ray.engine.room import room
from condu_ray.engine.session import learn, to_learn
from condu_ray.errors import StoreError
from condu_ray.store import Store, open_store
from condu_ray.store.documents import read, write
from condu_ray.store.header import open_existing
from condu_ray.tracking.pictures import draw_matrix


def run(benchmark: Benchmark, stage: Stage) -> dict[str, Any]:
    """Measures what is missing, on Ray, and returns the report of all that is asked for.

    Raises ConduError for bad input; what was finished before stays.
    """
    with ExitStack() as held:
        clusters, of_store = list[Cluster](), dict[str, RayCrew]()

        def dismiss(but: str = "") -> None:
            """A cluster that goes on would keep a fusion actor of each store in the memory of its head."""
            for url in [each for each in of_store if each != but]:
                of_store.pop(url).dismiss()

        @contextmanager
        def crews(store: Store, config: SessionConfig) -> Iterator[RayCrew]:
            if not clusters:
                clusters.append(held.enter_context(connected()))
                held.callback(dismiss)
            dismiss(but=store.url)
            jobs = max(1, len(config.tasks))
            with closing(RayCrew(store, config, room(config, jobs, clusters[0], stage))) as crew:
                of_store[store.url] = crew
                yield crew

        return measure(benchmark, crews, stage)


def measure(benchmark: Benchmark, crews: Crews, stage: Stage) -> dict[str, Any]:
    """The same, with the work done by `crews`."""
    check(benchmark)
    missing = [
        (method, seed)
        for seed in benchmark.seeds
        for method in benchmark.methods
        if result_of(benchmark, method, seed) is None
    ]
    opened: list[TaskData] = []
    plans = {seed: _plans(benchmark, [method for method, of in missing if of == seed], seed) for _, seed in missing}
    for seed, plan in plans.items():
        config = next(iter(plan.values()))[0][0]
        opened = _open(config, opened, stage)
        check_data(benchmark, seed, opened)
        claim(benchmark)  # not before the data is known to be right
        for system, sessions_of in plan.items():
            named = {task.name: task for task in opened}
            parts = [(each, [named[name] for name in names]) for each, names in sessions_of]
            _measure_system(benchmark, system, seed, parts, crews, _named(stage, f"{system.name}, seed {seed}"))
        if (LINEAR_PROBE, seed) in missing:
            _measure_probe(benchmark, seed, config, opened, crews, _named(stage, f"seed {seed}"))
    results = {
        (method, seed): _result(benchmark, method, seed) for method in benchmark.methods for seed in benchmark.seeds
    }
    with stage("drawing"):
        _draw(benchmark.work / "pictures", results)
    return report(benchmark, results)


def _plans(
    benchmark: Benchmark, methods: Sequence[str], seed: int
) -> dict[System, list[tuple[SessionConfig, list[str]]]]:
    """Sessions by system. Those that start each task from θ⁰ come first: others can take over their first delta."""
    wanted = {"zero-shot" if method == LINEAR_PROBE else method for method in methods}
    systems = sorted((SYSTEMS[name] for name in SYSTEMS if name in wanted), key=lambda each: not each.trains_from_base)
    return {system: sessions(benchmark, system, seed) for system in systems}


def _open(config: SessionConfig, before: Sequence[TaskData], stage: Stage) -> list[TaskData]:
    """The stream's tasks for a seed; what was opened for another one stays where the split is not made by seed."""
    found = {task.name: task for task in before if not task.split_made}
    wanted = {name: source for name, source in config.tasks.items() if name not in found}
    if wanted:
        found |= {task.name: task for task in open_data(config.model_copy(update={"tasks": wanted}), stage)}
    return [found[name] for name in config.tasks]


def _measure_system(
    benchmark: Benchmark, system: System, seed: int, parts: Sessions, crews: Crews, stage: Stage
) -> None:
    """Learns what is missing, and measures every version."""
    store = store_for(parts[0][0])
    _share(benchmark, system, seed, store, parts, crews, stage)
    *before, last = parts
    for config, tasks in before:
        if to_learn(store, config, tasks):
            with crews(store, config) as crew:
                learn(store, config, tasks, crew, stage)
    config, tasks = last
    with crews(store, config) as crew:
        learn(store, config, tasks, crew, stage)
        versions = learned(store.url, list(benchmark.stream.tasks))
        if versions is None:
            raise StoreError(f"{store.url} holds other tasks than the stream", "use another --work")
        tests = _tests(config, [task for _, part in parts for task in part])
        figures = figures_of(benchmark, system, seed)
        evaluate_versions(store, versions, tests, spaces_of(system), crew, figures, stage)
        routing = routing_of(benchmark, seed)
        if system.votes and read(routing) is None:
            write(routing, route_versions(store, versions, tests, crew, stage))


def _share(
    benchmark: Benchmark, system: System, seed: int, store: Store, parts: Sessions, crews: Crews, stage: Stage
) -> None:
    """Puts into the store what other systems of this seed have done already, and trains what is to be shared."""
    todo = [(config, missing) for config, tasks in parts if (missing := to_learn(store, config, tasks))]
    record = shared_of(benchmark, system, seed)
    if system.trains_from_base:
        train_once(todo, crews, stage)
        for config, tasks in todo:
            give_deltas(config, tasks, store, record)
    elif system.continues_a_fine_tuning and not store.versions():
        settings, first = parts[0]
        give_deltas(settings, first[:1], store, record)
    for other in SYSTEMS.values():
        source = open_existing(store_of(benchmark, other, seed))
        if source is not None and other != system:
            for config, tasks in todo:
                give_features(config, tasks, source, store)


def _measure_probe(
    benchmark: Benchmark, seed: int, config: SessionConfig, tasks: Sequence[TaskData], crews: Crews, stage: Stage
) -> None:
    store = open_store(store_of(benchmark, SYSTEMS["zero-shot"], seed))
    with crews(store, config) as crew:
        probe_tasks(_tests(config, tasks), seed, crew, probe_of(benchmark, seed), stage)


def _tests(config: SessionConfig, tasks: Sequence[TaskData]) -> Tests:
    return {task.name: (task, test_pictures(task, config)) for task in tasks}


def _result(benchmark: Benchmark, method: str, seed: int) -> Result:
    found = result_of(benchmark, method, seed)
    if found is None:
        raise StoreError(f"{benchmark.work} lost figures of {method}, seed {seed}", "run the same command again")
    return found


def _draw(folder: Path, results: Mapping[tuple[str, int], Result]) -> None:
    for (method, seed), result in results.items():
        for labels, matrix in result.matrices.items():
            path = folder / f"{method}-{labels}-seed-{seed}.png"
            if not path.exists():
                draw_matrix(matrix, path)


def _named(stage: Stage, name: str) -> Stage:
    return lambda step: stage(f"{name}: {step}")
