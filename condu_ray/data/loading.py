"""Pictures as a data set for training: a transform applied to each, with augmentation that any worker repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from condu_ray.data.picture import load_picture
from condu_ray.data.task import Split

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
