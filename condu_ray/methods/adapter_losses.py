"""What an adapter is fitted for, besides cross entropy over all classes seen.

Legend: B features, C classes, P pairs, D width of a feature.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def similar_pairs(old: NDArray[np.float32], new: NDArray[np.float32], distance: float) -> NDArray[np.int64]:
    """(old class, new class) i64[P, 2] whose unit texts f32[C, D] are nearer than `distance` (RAPF, public code)."""
    squared = 2 - 2 * np.asarray(old, np.float64) @ np.asarray(new, np.float64).T
    return np.argwhere(np.sqrt(np.maximum(squared, 0)) < distance)


def hinge(features: Tensor, own: Tensor, other: Tensor, margin: float) -> Tensor:
    """mean max(0, m − f·t_own + f·t_other) over unit features and unit texts, f32[B, D] each (RAPF, public code)."""
    return functional.relu(margin - (features * own).sum(dim=1) + (features * other).sum(dim=1)).mean()


def distillation(before: Tensor, now: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(before / T) ‖ softmax(now / T)), mean over rows of logits f32[B, C].

    That CalFuse distils is published, this form is our reconstruction.
    """
    teacher = torch.log_softmax(before.detach() / temperature, dim=1)
    student = torch.log_softmax(now / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
