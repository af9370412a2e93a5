"""A head: what stands between the image tower and the labels of an expert.

f(z) = unit((1 − β) ẑ + β â(z)), where â(z) is the adapted feature Wz, made unit or not (`mix`), and ẑ = z / |z|. Both
mixes depend on the direction of z alone, so that unit features are all a head needs. β = 1 is RAPF's feature (arXiv
2407.14143, its public code); that CalFuse balances the two is published (arXiv 2503.18672), the formula is our
reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Mix = Literal["normalized", "raw"]


def mixed(features: Tensor, weight: Tensor, share: Tensor | float, mix: Mix) -> Tensor:
    """f(z) for features f32[B, D] of any length, W f32[D, D] (out, in) and β = `share`: unit features f32[B, D].

    normalized: â is made unit before it is mixed. raw: it is not, which is the one adapter (1 − β) I + β W.
    """
    unit = functional.normalize(features, dim=-1)
    adapted = unit @ weight.T
    if mix == "normalized":
        adapted = functional.normalize(adapted, dim=-1)
    return functional.normalize((1 - share) * unit + share * adapted, dim=-1)


@dataclass(frozen=True, eq=False)
class Head:
    """Callable: unit features f32[B, D] by the image tower -> unit features f32[B, D] that meet the class vectors.

    weight: f32[D, D]; None: features stay. share: β. texts: task -> unit vectors f32[C, D] of its classes, which stand
    in for those of the text tower; words that were not learned have the text tower's. discriminants: task -> (weights
    f32[C, D], bias f32[C]), whose scores of the features are added to the logits of its classes.
    """

    weight: Tensor | None = None
    share: float = 1.0
    mix: Mix = "normalized"
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    discriminants: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, unit: Tensor) -> Tensor:
        return unit if self.weight is None else mixed(unit, self.weight, self.share, self.mix)

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file of weights: W, β (the name says the mix), and for each task class vectors and what is
        added to their logits."""
        found = {f"head.texts.{task}": vectors for task, vectors in self.texts.items()}
        for task, (weights, bias) in self.discriminants.items():
            found |= {f"head.discriminant.weight.{task}": weights, f"head.discriminant.bias.{task}": bias}
        if self.weight is not None:
            found |= {"head.weight": self.weight, f"head.share.{self.mix}": torch.tensor(self.share)}
        return found
