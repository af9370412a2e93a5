"""What a picture looks like on the way through an image tower: means of the outputs of its blocks.

Classes live in a tower's last features; domains (sensor, style, resolution, texture) show earlier. On ten real sets a
linear classifier tells the domain of 95.5 % of pictures by these means and of 89 % by the tower's last features.
Our reconstruction; measured in docs/decisions.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MOST_CHANNELS = 512  # or two blocks of the widest


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The children of the list of modules that holds most of the tower's parameters; empty where there is no list."""
    lists = [each for each in tower.modules() if isinstance(each, nn.Sequential | nn.ModuleList) and len(each) > 1]
    if not lists:
        return []
    # Of lists in lists the outermost comes first, and max keeps the first of equals.
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters())).children())


def spread(channels: Sequence[int]) -> list[int]:
    """Which of the blocks to look at: all but the last, or as many, evenly spaced, as stay within MOST_CHANNELS."""
    inner = list(range(max(1, len(channels) - 1)))
    limit = max(MOST_CHANNELS, 2 * max(channels, default=0))
    for count in range(len(inner), 0, -1):
        chosen = [inner[int((place + 0.5) * len(inner) / count)] for place in range(count)]
        if sum(channels[each] for each in chosen) <= limit:
            return chosen
    return inner[:1]


def channel_means(output: Tensor) -> Tensor:
    """[B, C, H, W] or [B, tokens, C] -> f32[B, C]."""
    dims = tuple(range(2, output.dim())) if output.dim() == 4 else tuple(range(1, output.dim() - 1))
    return output.detach().float().mean(dim=dims) if dims else output.detach().float()


@contextmanager
def watched(blocks: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Channel means of each block's output, by its place, of the passes that this thread makes meanwhile."""
    found: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def hook(place: int) -> Any:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            if threading.get_ident() == thread and isinstance(output, torch.Tensor):
                found[place] = channel_means(output)

        return keep

    handles = [block.register_forward_hook(hook(place)) for place, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
