"""The fusion actor. Its process imports this module, so no model stands on top: it starts sooner and holds less."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import ObjectLostError, OwnerDiedError, RayTaskError

from condu_ray.engine.fusing import Fused, Fuser, Shard
from condu_ray.engine.replies import GONE, TRIES, cause_of
from condu_ray.fusion.triggers import Part
from condu_ray.store import Manifest, ObjectRef


class FusionActor(Fuser):
    """Ray actor that owns the state of one store and publishes it in the object store: readers map it without a copy.

    One call at a time. References come in a list, so that Ray does not send the arrays along with the answer. shards:
    how many further actors, on as many nodes as there are, make the passes over the vector.
    """

    def __init__(self, url: str, shards: int = 1) -> None:
        super().__init__(url, self._parts if shards > 1 else None)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": TRIES, "scheduling_strategy": "SPREAD"}
        shard = ray.remote(Shard).options(**options)
        self._shards = [shard.remote(url, index, shards) for index in range(shards if shards > 1 else 0)]

    def _parts(self, parent: Manifest | None, task: str, delta: ObjectRef) -> list[Part]:
        for left in range(TRIES, 0, -1):
            try:
                parts = ray.get([shard.part.remote(parent, task, delta) for shard in self._shards])
                return [part for part in parts if part is not None]
            except RayTaskError as error:
                raise cause_of(error) from None
            except (ObjectLostError, OwnerDiedError, *GONE):
                if left == 1:
                    raise
        raise AssertionError("not reached")

    def held(self, version: Manifest | None) -> list[Any]:
        self.hold(version)
        return [ray.put(self.state)]

    def proposed(self, parent: Manifest | None, task: str, delta: ObjectRef | None) -> list[Any]:
        return [ray.put(self.propose(parent, task, delta))]

    def added(
        self, key: str, parent: Manifest | None, task: str, delta: ObjectRef | None, rescalers: ObjectRef | None
    ) -> tuple[Fused, list[Any]]:
        fused = self.add(key, parent, task, delta, rescalers)
        return fused, [ray.put(self.state)]
