"""ConDU with full fine-tuning: train from θ⁰, fuse the delta (arXiv 2503.10705, decoupling and unifying).

Under the name `condu-sign` with sign triggers over magnitudes that all tasks share (ours, fusion/signs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.fusion import triggers
from condu_ray.fusion.layout import Layout
from condu_ray.methods.full import adapter, expert, head, layout, prepare
from condu_ray.methods.protocol import Stored
from condu_ray.methods.states import FusedState

__all__ = ["adapter", "empty", "expert", "head", "layout", "load", "prepare"]


def empty(layout: Layout, config: SessionConfig) -> FusedState:
    return FusedState(triggers.empty(layout, config.fusion.granularity, config.choices.triggers))


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> FusedState:
    return FusedState.load(layout, meta, objects)
