"""What a picture looks like on the way through an image tower: how the outputs of its blocks are distributed.

Classes live in a tower's last features; domains (sensor, style, resolution, texture) show earlier. Channels of a
convolution were rectified, so that their means over places say how much of a pattern there is; a transformer's tokens
were not, and there their deviations say it. Our reconstruction; measured in docs/decisions.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from condu_ray.config import DomainFeatures

MOST_CHANNELS = 512  # of all chosen blocks together, or twice those of the widest

Watched = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A module, and what is kept of its output [B, ...]: f32[B, C]."""


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The children of the list of modules that holds most of the tower's parameters; empty where there is no list."""
    lists = [each for each in tower.modules() if isinstance(each, nn.Sequential | nn.ModuleList) and len(each) > 1]
    if not lists:
        return []
    # Of lists in lists the outermost comes first, and max keeps the first of equals.
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters())).children())


def watch_list(tower: nn.Module, kind: DomainFeatures) -> list[Watched]:
    """The tower's blocks, after a transformer's patches; empty where there is no list of blocks."""
    blocks = blocks_of(tower)
    if not blocks or kind == "means" or any(isinstance(part, nn.Conv2d) for each in blocks for part in each.modules()):
        return [(block, channel_means) for block in blocks]
    patches = next((part for part in tower.modules() if isinstance(part, nn.Conv2d)), None)
    first: list[Watched] = [(patches, map_deviations)] if patches else []
    return first + [(block, token_deviations) for block in blocks]


def spread(channels: Sequence[int], first: int = 0) -> list[int]:
    """Places of the outputs that make the domain features.

    The `first` ones, and of the others all but the last, or as many of them, evenly spaced, as stay within
    MOST_CHANNELS. channels: of each output.
    """
    inner = list(range(first, max(first + 1, len(channels) - 1)))
    limit = max(MOST_CHANNELS, 2 * max(channels, default=0)) - sum(channels[:first])
    for count in range(len(inner), 0, -1):
        chosen = [inner[int((place + 0.5) * len(inner) / count)] for place in range(count)]
        if sum(channels[each] for each in chosen) <= limit:
            return [*range(first), *chosen]
    return [*range(first), *inner[:1]]


def domain_features(modules: Sequence[Watched], seen: Mapping[int, Tensor]) -> Tensor:
    """The kept outputs of the chosen modules (`spread`) side by side, f32[B, W]. seen: as `watched` gives it."""
    found = [seen[place] for place in sorted(seen)]
    patches = sum(kept is map_deviations for _, kept in modules)
    return torch.cat([found[each] for each in spread([kept.shape[1] for kept in found], patches)], dim=1)


def channel_means(output: Tensor) -> Tensor:
    """[B, C, H, W] or [B, tokens, C] -> f32[B, C]."""
    dims = tuple(range(2, output.dim())) if output.dim() == 4 else tuple(range(1, output.dim() - 1))
    return output.detach().float().mean(dim=dims) if dims else output.detach().float()


def map_deviations(output: Tensor) -> Tensor:
    """[B, C, H, W] -> f32[B, C]: root of the standard deviation over places."""
    return _deviations(output.flatten(2), 2)


def token_deviations(output: Tensor) -> Tensor:
    """[B, tokens, C] or [B, H, W, C] -> f32[B, C]: root of the standard deviation over tokens."""
    return _deviations(output.flatten(1, -2), 1)


def _deviations(output: Tensor, places: int) -> Tensor:
    # The root evens out: contrast multiplies deviations, and a logarithm would have no answer for a blank picture.
    return output.detach().float().var(dim=places, correction=0).pow(0.25)


@contextmanager
def watched(modules: Sequence[Watched]) -> Iterator[dict[int, Tensor]]:
    """Yields a mapping, place of a module -> what is kept of its output; passes of this thread fill it in the block."""
    found: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def hook(place: int, kept: Callable[[Tensor], Tensor]) -> Any:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            if threading.get_ident() == thread and isinstance(output, torch.Tensor):
                found[place] = kept(output)

        return keep

    handles = [module.register_forward_hook(hook(place, kept)) for place, (module, kept) in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
