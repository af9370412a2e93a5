"""One vector per class of a task, from θ⁰ (ConDU, semantic prototypes; the released code's recipe).

Legend: B pictures, C classes of a task, D width of the common space, N pictures held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import DataError

HELD_OUT = 64  # pictures of a task, at most
HELD_OUT_SHARE = 5  # one picture in five, so that four fifths of every class still make its image mean
_EPSILON = 1e-12


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """Sums of unit features by class, f64[C, D], and pictures by class, i64[C].

    Values are never written; `add` returns new ones.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @staticmethod
    def zero(classes: int, width: int) -> FeatureSums:
        return FeatureSums(np.zeros((classes, width)), np.zeros(classes, dtype=np.int64))

    def add(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> FeatureSums:
        """With the unit features f32[B, D] of pictures of classes i64[B]."""
        sums, counts = self.sums.copy(), self.counts.copy()
        np.add.at(sums, labels, np.asarray(features, dtype=np.float64))
        np.add.at(counts, labels, 1)
        return FeatureSums(sums, counts)


@dataclass(frozen=True, eq=False)
class Prototypes:
    """What routing keeps of a task.

    unit f32[C, D]: the prototypes, unit length. image_mean, text_mean f32[C, D]: what they are made of (image_mean is 0
    for a class without pictures). counts i64[C]: pictures behind each image mean. held_out f32[N, D]: unit features of
    training pictures that are in no image mean, for calibration.
    """

    unit: NDArray[np.float32]
    image_mean: NDArray[np.float32]
    text_mean: NDArray[np.float32]
    counts: NDArray[np.int64]
    held_out: NDArray[np.float32]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The five arrays by name, for the store."""
        return {name: np.ascontiguousarray(getattr(self, name)) for name in self.__dataclass_fields__}

    def of(self, parts: Literal["both", "image", "text"]) -> Prototypes:
        """The same with prototypes made of image means or text means alone (ours); `both`: as they are.

        A class without pictures keeps its text mean.
        """
        if parts == "both":
            return self
        pictured = (self.counts > 0)[:, None]
        mean = np.where(pictured, self.image_mean, self.text_mean) if parts == "image" else self.text_mean
        return replace(self, unit=_unit(mean.astype(np.float64)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Prototypes:
        """The inverse of `arrays`."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def make_prototypes(sums: FeatureSums, text_means: NDArray[np.float32], held_out: NDArray[np.float32]) -> Prototypes:
    """(image mean + text mean) / 2, made unit; a class without pictures uses its text mean.

    text_means f32[C, D]: mean of the unit text features of a class, not made unit again. Raises DataError where the
    text means are not of as many classes, or of another width, as the sums.
    """
    if sums.sums.shape != text_means.shape:
        raise DataError(
            f"prototypes: image sums are {sums.sums.shape}, text means {text_means.shape}",
            "compute both from the same class list and the same base model",
        )
    text = np.asarray(text_means, dtype=np.float64)
    image = sums.sums / np.maximum(sums.counts, 1)[:, None]
    both = np.where(sums.counts[:, None] > 0, (image + text) / 2, text)
    return Prototypes(
        unit=_unit(both),
        image_mean=image.astype(np.float32),
        text_mean=text.astype(np.float32),
        counts=sums.counts,
        held_out=np.asarray(held_out, dtype=np.float32).reshape(-1, text.shape[1]),
    )


def _unit(means: NDArray[np.float64]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray(means / np.maximum(lengths, _EPSILON), dtype=np.float32)


def held_out_indices(labels: NDArray[np.int64], seed: int, count: int = HELD_OUT) -> NDArray[np.int64]:
    """Which of the training pictures i64[B] to keep out of the image means: at most `count` indices, ascending.

    Classes take turns, each gives at most a fifth of its pictures; so classes with fewer than five give none.
    Our reconstruction; the paper has no calibration.
    """
    labels = np.asarray(labels, dtype=np.int64)
    random = np.random.default_rng(seed)
    turns: list[tuple[int, float, int]] = []
    for label in np.unique(labels):
        pictures = random.permutation(np.flatnonzero(labels == label))
        for turn, picture in enumerate(pictures[: len(pictures) // HELD_OUT_SHARE]):
            turns.append((turn, random.random(), int(picture)))
    return np.sort(np.array([picture for _, _, picture in sorted(turns)[:count]], dtype=np.int64))
