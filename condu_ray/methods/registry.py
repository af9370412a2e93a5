"""The methods by name: their modules, and who answers. Nothing here imports torch but `get` and `learner`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from condu_ray.catalogue import METHODS, MethodInfo, info
from condu_ray.config import VoteConfig

if TYPE_CHECKING:
    from condu_ray.methods.protocol import Learner, Method

__all__ = ["METHODS", "MethodInfo", "get", "info", "learner", "vote_of"]


def vote_of(name: str, vote: VoteConfig) -> VoteConfig:
    """How this system's experts answer: as set, or, where one model answers everything, by that model alone."""
    if not info(name).single:
        return vote
    return VoteConfig(k=1, combine="weighted", base_weight=0.0, adaptive=False, union="joint", within="expert")


def get(name: str) -> Method:
    """The system itself: its module follows methods/protocol.py."""
    return cast("Method", import_module(f"condu_ray.methods.{info(name).module}"))


def learner(name: str) -> Learner | None:
    """The system, where it has a training of its own; None where it tunes parameters for the task's loss."""
    found = get(name)
    return cast("Learner", found) if hasattr(found, "learn") else None
