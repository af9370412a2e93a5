"""WiSE-FT task after task: one model, after each task averaged with the one before (arXiv 2109.01903; the row of that
name in ZSCL, arXiv 2303.06628): θ ← (1 − α) θ + α θᵗ with α = 0.5. Training starts from the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from condu_ray.config import SessionConfig
from condu_ray.fusion.layout import Layout
from condu_ray.methods.full import adapter, expert, head, layout, prepare
from condu_ray.methods.protocol import Stored, Vector
from condu_ray.methods.states import LatestState

__all__ = ["adapter", "empty", "expert", "head", "layout", "load", "prepare"]

ALPHA = np.float32(0.5)


def averaged(before: Vector | None, trained: Vector) -> Vector:
    """(1 − α) θ + α θᵗ, of deltas; before the first task θ is θ⁰."""
    new = ALPHA * trained
    return new if before is None else new + (1 - ALPHA) * before


def empty(layout: Layout, config: SessionConfig) -> LatestState:
    return LatestState(layout, averaged)


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> LatestState:
    return LatestState.load(layout, meta, objects, averaged)
