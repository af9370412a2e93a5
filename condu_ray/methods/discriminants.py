"""What class Gaussians in a memory say of features, for the heads of the systems that keep them (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from condu_ray.config import SessionConfig
from condu_ray.memory.discriminant import discriminant
from condu_ray.memory.gaussians import Gaussians, Sampler
from condu_ray.methods.protocol import Memory


def unit(features: Tensor) -> Tensor:
    """What a head without an adapter makes of features f32[N, D] of any length."""
    return functional.normalize(features, dim=-1)


def discriminants(
    memory: Memory, config: SessionConfig, seen: Callable[[Tensor], Tensor] = unit, device: torch.device | None = None
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """`Head.discriminants` of all tasks together; empty where the settings have none. seen: features as the head gives
    them, from raw ones."""
    if not memory or not config.choices.discriminant:
        return {}
    parts = [Gaussians.from_arrays(kept) for kept in memory.values()]
    every = Gaussians.joined(parts)
    sampler = Sampler(every, config.choices.shrinkage, config.memory.gamma)
    weights, bias = discriminant(every, sampler, lambda drawn: seen(torch.from_numpy(drawn)).numpy())
    edges = np.cumsum([0, *(len(part.counts) for part in parts)])
    return {
        task: (torch.tensor(weights[start:stop], device=device), torch.tensor(bias[start:stop], device=device))
        for task, (start, stop) in zip(memory, pairwise(edges), strict=True)
    }
