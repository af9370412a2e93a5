"""From a method's name to its module (catalogue.py says what each is), and how its experts vote.

Only `get` and `learner` import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from condu_ray.catalogue import info
from condu_ray.config import VoteConfig

if TYPE_CHECKING:
    from condu_ray.methods.protocol import Learner, Method


def vote_of(name: str, vote: VoteConfig) -> VoteConfig:
    """How this method's experts answer: as set, or, where one model answers everything, by that model alone."""
    if not info(name).single:
        return vote
    return VoteConfig(k=1, combine="weighted", base_weight=0.0, adaptive=False, union="joint", within="expert")


def get(name: str) -> Method:
    """The method's module, which follows methods/protocol.py. Raises ConfigError for an unknown name."""
    return cast("Method", import_module(f"condu_ray.methods.{info(name).module}"))


def learner(name: str) -> Learner | None:
    """The method's module where it has a training of its own (`Learner.learn`); None where it is trained by
    methods/training.py."""
    found = get(name)
    return cast("Learner", found) if hasattr(found, "learn") else None
