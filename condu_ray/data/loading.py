"""Pictures as a data set for training: a transform applied to each, with augmentation that any worker repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from condu_ray.data.picture import load_picture
from condu_ray.data.task import Picture, Split

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 64
"""Pictures that pass through a model together where nothing is trained; fixed, since a batch decides how sums round."""

Transform = Callable[[Image.Image], Any]


class PictureSet:
    """A map-style data set over a split, for torch's DataLoader; `transform` makes a tensor of an RGB picture."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int]:
        """Returns (transformed picture, label) of an index, or of (index, seed).

        With a seed, the transform draws its random numbers from it alone, so the result does not depend on which
        worker makes it or in which order, and torch's generator is left as it was.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        picture = load_picture(self.split.pictures[index])
        label = int(self.split.labels[index])
        if seed is None:
            return self.transform(picture), label
        import torch

        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would seed the GPUs too, which are not restored here.
            torch.default_generator.manual_seed(seed)
            return self.transform(picture), label


def unlabelled(pictures: Sequence[Picture], transform: Transform) -> PictureSet:
    """Pictures of which nobody says what they show: label 0."""
    return PictureSet(Split(tuple(pictures), np.zeros(len(pictures), np.int64)), transform)


def in_batches(pictures: PictureSet, size: int, threads: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (pixels f32[b, 3, H, W], labels int64[b]) in order, b = `size` but for the last; threads decode one batch
    ahead.

    The transform must draw no random numbers. Raises DataError for a picture that cannot be read.
    """
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[tuple[Tensor, int]]] = []
        for start in range(0, len(pictures), size):
            begun = [pool.submit(pictures.__getitem__, i) for i in range(start, min(start + size, len(pictures)))]
            if ahead:
                yield _stacked(ahead)
            ahead = begun
        if ahead:
            yield _stacked(ahead)


def _stacked(decoded: Sequence[Future[tuple[Tensor, int]]]) -> tuple[Tensor, Tensor]:
    import torch

    pixels, labels = zip(*(each.result() for each in decoded), strict=True)
    return torch.stack(pixels), torch.tensor(labels)
