"""Pictures as a data set for training: a transform applied to each, with augmentation that any worker repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image

from condu_ray.data.picture import load_picture
from condu_ray.data.task import Split

if TYPE_CHECKING:
    from torch import Tensor

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


def in_batches(pictures: PictureSet, size: int, threads: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (pixels f32[b, 3, H, W], labels int64[b]) in order, b = `size` but for the last; decoded ahead by threads.

    The transform must draw no random numbers. Raises DataError for a picture that cannot be read.
    """
    import torch

    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(pictures.__getitem__, range(len(pictures)))
        while part := list(islice(decoded, size)):
            yield torch.stack([pixels for pixels, _ in part]), torch.tensor([label for _, label in part])
