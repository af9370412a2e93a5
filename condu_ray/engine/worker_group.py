"""What Ray Train calls in each worker. Its controller imports this module too, so neither model nor torch is on top."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


def work(settings: dict[str, Any]) -> None:
    """settings: `given`, a reference to `train.Given`."""
    from condu_ray.engine.train import take_part

    take_part(ray.get(settings["given"]))


class NoGroup(Backend):
    """Connects nobody."""

    share_cuda_visible_devices = True


class Apart(BackendConfig):
    """Of workers that train different tasks: they have nothing to say to each other, so that no address of theirs has
    to be reached (a host's name often stands for loopback), and two of them may share a GPU, which NCCL refuses. Not a
    `TorchConfig`, for whose sake the controller would spend seconds on importing torch."""

    backend = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return NoGroup
