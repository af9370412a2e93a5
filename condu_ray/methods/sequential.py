"""Sequential fine-tuning: one model goes on from task to task. What everybody does first, and what forgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.full import adapter, expert, head, layout, prepare
from condu_ray.methods.protocol import Stored
from condu_ray.methods.states import LatestState

__all__ = ["adapter", "empty", "expert", "head", "layout", "load", "prepare"]


def empty(layout: Layout, config: SessionConfig) -> LatestState:
    return LatestState(layout)


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> LatestState:
    return LatestState.load(layout, meta, objects)
