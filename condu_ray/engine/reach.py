"""Whether the nodes of a cluster see what work on them reads: said before the work, which would say it worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from condu_ray.engine.cluster import Cluster
from condu_ray.errors import ConfigError
from condu_ray.paths import cache_root

if TYPE_CHECKING:
    from condu_ray.data import Split

ANSWER_SECONDS = 20.0


def check_reached(cluster: Cluster, places: Mapping[str, str]) -> None:
    """Raises ConfigError where a node with cores lacks one of these places (what it is to the user -> path or URL).

    A node that does not answer in time is left to the work itself, and so are those that come later.
    """
    paths = {what: path for what, path in places.items() if "://" not in path}
    if not cluster.joined or len(cluster.nodes) < 2 or not paths:
        return
    look = ray.remote(num_cpus=0)(missing)
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[look.options(scheduling_strategy=there).remote(list(paths.values()))] = node["NodeManagerAddress"]
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS) if asked else ([], [])
    for ref in ready:
        gone: list[str] = []
        with suppress(RayError):  # the node was lost meanwhile, or has no condu-ray
            gone = ray.get(ref)
        for what, path in paths.items():
            if path in gone:
                unpacked = Path(path).is_relative_to(cache_root())
                raise ConfigError(
                    f"node {asked[ref]} of the cluster does not see {what} ({path})",
                    "set CONDU_CACHE to a folder that every node sees"
                    if unpacked
                    else "put that where every node sees it under the same path",
                )


def missing(paths: Sequence[str]) -> list[str]:
    """Those that this machine lacks."""
    return [path for path in paths if not Path(path).exists()]


def one_of(pictures: Mapping[str, Split]) -> dict[str, str]:
    """Where the first of each task's pictures is, as `check_reached` takes it."""
    first = {name: each.pictures[0].path for name, each in pictures.items() if each}
    return {f"the pictures of {name}": str(Path(path).absolute()) for name, path in first.items()}
