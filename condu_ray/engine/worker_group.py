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
    """A backend that connects no workers."""

    share_cuda_visible_devices = True


class Apart(BackendConfig):
    """The backend of workers that train different tasks and so need no process group.

    Without one, no worker's address has to be reachable (a host's name often resolves to loopback), and two workers may
    share a GPU, which NCCL refuses. Not a `TorchConfig`: the controller would spend seconds on importing torch.
    """

    backend = "none"

    @property
    def backend_cls(self) -> type[Backend]:
        return NoGroup
