"""What an actor answers, and how often one that died is asked again."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from condu_ray.errors import ConduError, TrainingError

TRIES = 3


def result_of(ref: Any) -> Any:
    """What a reference stands for. Raises as `cause_of` says."""
    try:
        return ray.get(ref)
    except (RayTaskError, RayActorError) as error:
        raise cause_of(error) from None


def cause_of(error: RayTaskError | RayActorError) -> BaseException:
    """What a process raised, without Ray's text around it, where it is meant for the user; why it is gone."""
    if isinstance(error, RayActorError):
        said = str(error).strip().splitlines()
        return TrainingError(
            f"a process of this session is gone ({said[-1].strip() if said else type(error).__name__})",
            "free memory or use fewer --workers, let every node see the store, and run the same command again",
        )
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConduError) else error
