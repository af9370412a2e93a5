"""One server for all tests of this folder: two replicas on the test run's Ray cluster, over a store of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import free_port
from in_process_crew import learn_here, opened, settings
from served import Served

from condu_ray.config import ServeConfig
from condu_ray.store import open_store

LEARNED = ("colours", "stripes")


@pytest.fixture(scope="package")
def served(
    ray_cluster: None, tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from ray import serve

    from condu_ray.serving.app import application

    store = tmp_path_factory.mktemp("served") / "store"
    config = settings(store, tiny_model_dir)
    learn_here(config, opened(picture_tasks, *LEARNED))
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    # Next to no cores, so that other tests' workers find theirs.
    given = ServeConfig(store=str(store), port=port, replicas=2, cpus=0.01, poll_seconds=0.2, labels=10, body_mb=2)
    serve.run(application(given), name="condu-ray", route_prefix="/")
    pictures = [path for folder in picture_tasks.values() for path in sorted((folder / "test").glob("*/1[2-4].png"))]

    def learn(task: str) -> int:
        return learn_here(config, opened(picture_tasks, task))[-1].version

    yield Served(f"http://127.0.0.1:{port}", open_store(store), pictures, learn)
    serve.shutdown()
