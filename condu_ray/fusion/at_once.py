"""All tasks unified at once, from their own deltas: EMR-Merging (arXiv 2405.17461), which ConDU's session goes on from.

    s_j = sum of d_i,j      e_j = + if s_j > 0, else -      u_j = e_j * max |d_i,j| of that sign
    mask bit = d_i,j has that sign                          rescaler = norm of d_i / norm of the masked u

Up to two tasks `unify` one after the other gives the same; from three on the order of sessions counts there, here not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError
from condu_ray.fusion.groups import Span, check_finite, check_granularity, combine, spans
from condu_ray.fusion.kernels import lane_sums, masses
from condu_ray.fusion.layout import Layout, as_f32
from condu_ray.fusion.planes import packed, write_bits
from condu_ray.fusion.state import FusionState, Task
from condu_ray.fusion.threads import each
from condu_ray.fusion.unify import Part, rescale

if TYPE_CHECKING:
    from condu_ray.config import Granularity


def unify_at_once(layout: Layout, granularity: Granularity, deltas: Mapping[str, Any]) -> FusionState:
    """The state that holds these tasks, as if none came before another; `unify` adds further ones to it.

    deltas: task name -> f32[total]. Raises FusionError without tasks, for a wrong length, NaN or Inf (naming the
    tensor).
    """
    check_granularity(granularity)
    if not deltas:
        raise FusionError("there is no delta to unify")
    vectors = [as_f32(delta) for delta in deltas.values()]
    for name, vector in zip(deltas, vectors, strict=True):
        if vector.shape != (layout.total,):
            raise FusionError(f"the delta of task {name!r} has shape {vector.shape}, not ({layout.total},)")
    u, births = np.zeros(layout.total, np.float32), np.zeros((len(vectors), layout.total // 8), np.uint8)
    every = tuple(spans(layout, granularity))

    def one(span: Span) -> NDArray[np.float64]:
        """f64[2 T, sums]: of |u| over each task's bits, then of each |delta|."""
        found = []
        for block in span.blocks:
            here = slice(block.start, block.stop)
            values = np.array([vector[here] for vector in vectors])
            norms = np.array([lane_sums(block, np.abs(value).astype(np.float64)) for value in values])
            positive = values.sum(axis=0, dtype=np.float64) > 0
            agree = ((values > 0) == positive) & (values != 0)
            size = np.where(agree, np.abs(values), np.float32(0)).max(axis=0)
            u[here] = np.where(positive, size, -size) + np.float32(0)
            planes = np.zeros((len(vectors), -(-size.size // 8)), np.uint8)
            for plane, own, birth in zip(planes, agree, births, strict=True):
                write_bits(plane, 0, own)
                write_bits(birth, block.start, own)
            codes = packed(planes, 0, size.size)
            found.append(np.vstack([masses(block, codes, size.astype(np.float64), len(vectors)), norms]))
        sums = np.concatenate(found, axis=1)
        check_finite(span, sums[len(vectors) :].max(axis=0))
        return sums

    everything = np.concatenate(each(one, every), axis=1)
    sums = combine(layout, granularity, Part(every, u, births[0], births[0], everything).sums_of_blocks())
    norms = sums[len(vectors) :]
    rescalers, newest = rescale(norms, sums[: len(vectors)]), len(vectors) - 1
    tasks = tuple(
        Task(name, number, norms[number], rescalers[number], births[number], newest)
        for number, name in enumerate(deltas)
    )
    return FusionState(layout, granularity, u, tasks, {}, len(vectors))
