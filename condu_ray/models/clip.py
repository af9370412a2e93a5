"""The base model θ⁰ and experts that share it.

Legend: B pictures or texts, D width of the common space, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from condu_ray.config import DomainFeatures, ModelSpec
from condu_ray.models.blocks import domain_features, watch_list, watched
from condu_ray.models.head import Head
from condu_ray.models.lora import LowRank, in_rows

Overrides = Mapping[str, Tensor]
"""Parameters and buffers by open_clip name that stand in for θ⁰'s own."""

Tower = Overrides | LowRank
"""What an expert has instead of θ⁰'s own parameters, or beside them."""

TEXT_BATCH = 256


@dataclass(frozen=True, eq=False)
class Headed:
    """An expert with a head: what its towers have (None: they are θ⁰'s), and what follows them."""

    tower: Tower | None
    head: Head


Expert = Tower | Headed


class Features(NamedTuple):
    """What θ⁰ sees: unit features f32[B, D], domain features f32[B, W], and lengths f32[B] before they were made unit.

    Domain features say how the outputs of some of the image tower's blocks are distributed (models/blocks.py); of a
    tower without a list of blocks they are the unit features themselves.
    """

    unit: Tensor
    domains: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Clip:
    """θ⁰ with what belongs to it. The parameters of `model` are never written. For one thread at a time: see `twin`.

    precision: fp32 as loaded, or bf16 autocast. domains: what `features` says of domains.
    """

    spec: ModelSpec
    model: nn.Module
    sha256: str
    train_transform: Callable[[Any], Tensor]
    eval_transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    channels_last: bool
    precision: Literal["fp32", "bf16"] = "fp32"
    domains: DomainFeatures = "distributions"
    _encoder: _Encoder = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_encoder", _Encoder(self.model))

    def twin(self) -> Clip:
        """The same θ⁰ for another thread: modules of its own, which share every parameter and buffer.

        An expert stands in for parameters while it answers, in the modules, where another thread would meet it.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return replace(self, model=copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors}))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float:
        """exp of the learned log temperature (100 for OpenAI's CLIP)."""
        return float(self.model.get_parameter("logit_scale").detach().float().exp())

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def images(self, pixels: Tensor, expert: Expert | None = None) -> Tensor:
        """f32[B, 3, H, W] -> unit features f32[B, D], by θ⁰ or by an expert."""
        return self._images(pixels, expert)[0]

    def raw_images(self, pixels: Tensor, expert: Expert | None = None) -> Tensor:
        """f32[B, 3, H, W] -> features f32[B, D] before they are made unit, by θ⁰ or by an expert without its head."""
        unit, lengths = self._images(pixels, expert.tower if isinstance(expert, Headed) else expert)
        return unit * lengths[:, None]

    def images_in_rows(self, pixels: Tensor, segments: Sequence[tuple[LowRank, int]]) -> Tensor:
        """f32[B, 3, H, W] -> unit features f32[B, D]: the first rows by the first expert, and so on, in one pass.

        segments: experts with the number of their rows, B in all.
        """
        with in_rows(self.model, segments):
            return self.images(pixels)

    def features(self, pixels: Tensor) -> Features:
        """f32[B, 3, H, W] -> unit features as `images` gives them, and what else θ⁰ sees."""
        modules = watch_list(self.model.get_submodule("visual"), self.domains)
        with watched(modules) as seen:
            unit, lengths = self._images(pixels, None)
        if not seen:
            return Features(unit, unit, lengths)
        return Features(unit, domain_features(modules, seen), lengths)

    def texts(self, texts: Sequence[str], expert: Expert | None = None) -> Tensor:
        """Texts -> unit features f32[B, D], by θ⁰ or by an expert."""
        parts = [
            self._encode("encode_text", self.tokenizer(list(texts[i : i + TEXT_BATCH])).to(self.device), expert)[0]
            for i in range(0, len(texts), TEXT_BATCH)
        ]
        return torch.cat(parts)

    def _images(self, pixels: Tensor, expert: Expert | None) -> tuple[Tensor, Tensor]:
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self._encode("encode_image", pixels.to(self.device), expert)

    def _encode(self, kind: str, values: Tensor, expert: Expert | None) -> tuple[Tensor, Tensor]:
        """(unit features f32[B, D], their lengths f32[B] before the head and before they were made unit)."""
        if isinstance(expert, Headed):
            unit, lengths = self._encode(kind, values, expert.tower)
            return (expert.head(unit) if kind == "encode_image" else unit), lengths
        if isinstance(expert, LowRank):
            with in_rows(self.model, [(expert, len(values))]):
                return self._encode(kind, values, None)
        overrides = {f"clip.{name}": tensor for name, tensor in (expert or {}).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features: Tensor = functional_call(self._encoder, overrides, (kind, values))
            unit = functional.normalize(features, dim=-1)
        lengths = features.float().norm(dim=-1)
        return (functional.normalize(unit.float(), dim=-1) if self.precision == "bf16" else unit.float()), lengths


class _Encoder(nn.Module):
    """One forward for both towers, since functional_call only reaches forward."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, kind: str, values: Tensor) -> Tensor:
        features: Tensor = getattr(self.clip, kind)(values)
        return features


def class_embeddings(clip: Clip, prompts: Sequence[Sequence[str]], expert: Expert | None = None) -> Tensor:
    """One unit vector a class, f32[C, D]: mean of the unit vectors of its prompts, made unit again (CLIP, appendix)."""
    means = class_means(clip, prompts, expert)
    unit: Tensor = means / means.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit


@torch.no_grad()
def class_means(clip: Clip, prompts: Sequence[Sequence[str]], expert: Expert | None = None) -> Tensor:
    """Mean of the unit vectors of each class's prompts, f32[C, D], not made unit again."""
    features = clip.texts([text for texts in prompts for text in texts], expert)
    sizes = [len(texts) for texts in prompts]
    return torch.stack([part.mean(dim=0) for part in torch.split(features, sizes)])


def halved(expert: Expert) -> Expert:
    """Matrices and kernels in bfloat16, as autocast would cast them at every use; half the memory. Adapters stay."""
    if isinstance(expert, Headed):
        tower = expert.tower if expert.tower is None else _halved(expert.tower)
        return Headed(tower, expert.head)
    return _halved(expert)


def _halved(tower: Tower) -> Tower:
    if isinstance(tower, LowRank):
        return tower
    return {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in tower.items()}


def expert_overrides(clip: Clip, delta: Mapping[str, NDArray[np.float32]]) -> Overrides:
    """θ⁰ + delta by name: float32 sum, rounded once to the parameter's dtype.

    delta: f32 arrays shaped as the parameters they belong to.
    """
    base = dict(clip.model.named_parameters())
    overrides: dict[str, Tensor] = {}
    for name, values in delta.items():
        own = base[name].detach()
        moved = (own.float() + torch.tensor(values, device=own.device)).to(own.dtype)
        overrides[name] = _laid_out(moved, clip.channels_last)
    return overrides


def _laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    if channels_last and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
