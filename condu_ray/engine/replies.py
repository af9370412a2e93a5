"""What a Ray actor answers, and what stands for the answer of one that died."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from condu_ray.errors import ConduError, TrainingError

TRIES = 3  # of a call whose actor died; every call may be repeated, see engine/crew.py
GONE = (RayActorError, OutOfMemoryError)  # what Ray says of an actor that died; of one that its memory monitor killed


def result_of(ref: Any) -> Any:
    """The value of an object reference. Raises what was raised there, and TrainingError where the actor died."""
    try:
        return answer_of(ref)
    except GONE as error:
        raise gone(error) from None


def answer_of(ref: Any) -> Any:
    """As `result_of`, but raises Ray's own error (one of GONE) where the actor died, so that another can be asked."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise cause_of(error) from None


def cause_of(error: RayTaskError) -> BaseException:
    """What a process raised, without Ray's text around it, where it is meant for the user."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ConduError) else error


def gone(error: RayError) -> TrainingError:
    """The error for a user whose session has lost a process. error: what Ray says of it."""
    said = str(error).strip().splitlines()
    return TrainingError(
        f"a process of this session is gone ({said[-1].strip() if said else type(error).__name__})",
        "free memory or use fewer --workers, let every node see the store, and run the same command again",
    )
