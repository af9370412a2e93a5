"""Which pictures a step sees, and with what augmentation: given by (seed, step) alone, whoever asks and whenever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.loading import PictureSet
from condu_ray.errors import DataError
from condu_ray.models.clip import Clip

MOST_LOADERS = 8


def batches(
    task: TaskData, clip: Clip, config: SessionConfig, steps: range, rank: int = 0, size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (pixels f32[b, 3, H, W], labels int64[b]): the share of process `rank` of `size` in each step's batch."""
    loader = DataLoader(
        cast(Any, PictureSet(task.train, clip.train_transform)),
        batch_sampler=Order(len(task.train), config.train.batch_size, config.seed, steps, rank, size),
        num_workers=loaders(config, clip.device),
    )
    try:
        for pixels, labels in loader:
            if clip.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            yield pixels.to(clip.device), labels.to(clip.device)
    except DataError as error:
        # From a loader process it comes with that process's traceback as its message; the last line is the error.
        raise DataError(error.message.splitlines()[-1].rpartition("DataError: ")[2], error.mend) from None


def loaders(config: SessionConfig, device: torch.device) -> int:
    """How many processes decode ahead: as set, or what a GPU does not wait for (jobs/bench_gpu.py)."""
    if config.train.loader_processes is not None:
        return config.train.loader_processes
    return 0 if device.type == "cpu" else min(MOST_LOADERS, torch.get_num_threads() - 1)


class Order:
    """Batches of (index, seed) pairs: epoch after epoch, each a permutation, cut into batches and these by rank."""

    def __init__(self, pictures: int, batch_size: int, seed: int, steps: range, rank: int = 0, size: int = 1) -> None:
        self.pictures, self.batch_size, self.seed, self.steps = pictures, batch_size, seed, steps
        self.rank, self.size = rank, size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        for step in self.steps:
            batch = []
            positions = range(step * self.batch_size, (step + 1) * self.batch_size)
            for position in positions[self.rank :: self.size]:
                epoch, place = divmod(position, self.pictures)
                if epoch != shuffled[0]:
                    shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.pictures)
                batch.append((int(shuffled[1][place]), seed_of(self.seed, "augment", position)))
            yield batch


def seed_of(*parts: object) -> int:
    """A number below 2**56 that depends on the parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")
