"""WiSE-FT task after task: one model, after each task averaged with the one before (arXiv 2109.01903; the row of that
name in ZSCL, arXiv 2303.06628): θ ← (1 − α) θ + α θᵗ with α = 0.5. Training starts from the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.full import adapter, expert, layout, prepare
from condu_ray.methods.protocol import Stored
from condu_ray.methods.states import LatestState

__all__ = ["adapter", "empty", "expert", "layout", "load", "prepare"]

ALPHA = 0.5


def empty(layout: Layout, config: SessionConfig) -> LatestState:
    return LatestState(layout, share=ALPHA)


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> LatestState:
    return LatestState.load(layout, meta, objects, ALPHA)
