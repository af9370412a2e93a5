"""What an actor answers, and how often one that died is asked again."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from condu_ray.errors import ConduError

TRIES = 3


def result_of(ref: Any) -> Any:
    """What a reference stands for. Raises what was raised there where it is meant for the user."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise cause_of(error) from None


def cause_of(error: RayTaskError) -> BaseException:
    """What a worker raised, without Ray's text around it, where it is meant for the user."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConduError) else error
