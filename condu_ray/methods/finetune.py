"""Individual fine-tuning: every task keeps its own dense delta. The upper bound of accuracy, and of disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.full import adapter, expert, head, layout, prepare
from condu_ray.methods.protocol import Stored
from condu_ray.methods.states import SeparateState

__all__ = ["adapter", "empty", "expert", "head", "layout", "load", "prepare"]


def empty(layout: Layout, config: SessionConfig) -> SeparateState:
    return SeparateState(layout)


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> SeparateState:
    return SeparateState.load(layout, meta, objects)
