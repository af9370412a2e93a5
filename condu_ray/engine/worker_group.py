"""What Ray Train calls in each worker. Its controller imports this module as well, so nothing heavy stands on top."""

from __future__ import annotations

from typing import Any

import ray


def work(settings: dict[str, Any]) -> None:
    """settings: `given`, a reference to `train.Given`."""
    from condu_ray.engine.train import take_part

    take_part(ray.get(settings["given"]))
