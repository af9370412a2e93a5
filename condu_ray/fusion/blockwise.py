"""A reconstruction that comes block by block, as a vector or on top of one; whichever triggers it is made from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from condu_ray.fusion.groups import blank_gaps
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.state import checked

Blocks = Callable[[Callable[[slice, NDArray[np.float32]], None]], None]
"""Calls what it is given with every block's coordinates and values, f32[n], in any order."""


def written(layout: Layout, blocks: Blocks, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """f32[total], 0 on padding. out: where to write. Raises FusionError for another shape or dtype of `out`."""
    vector = np.empty(layout.total, np.float32) if out is None else checked(out, layout.total)
    blocks(vector.__setitem__)
    return blank_gaps(layout, vector)


def added(layout: Layout, blocks: Blocks, start: NDArray[np.float32]) -> None:
    """Adds it to f32[total] in place. Raises FusionError for another shape or dtype of `start`."""
    checked(start, layout.total)

    def add(here: slice, value: NDArray[np.float32]) -> None:
        start[here] += value

    blocks(add)
