"""What DMC keeps of a task beside the model: Gaussians of its classes, its prompt, and the class vectors they give.

Gaussians belong to one encoder, whose fingerprint they carry. When the encoder moves on they are calibrated
(memory/calibration.py), and the map stays with the task whose session found it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from condu_ray.errors import TrainingError
from condu_ray.memory.calibration import Calibration, Drift, Mode
from condu_ray.memory.gaussians import Gaussians
from condu_ray.methods.protocol import Vector

FINGERPRINT_BYTES = 16


def fingerprint(encoder: Vector | None) -> bytes:
    """Names an encoder by its delta; None: θ⁰'s own."""
    return hashlib.sha256(b"" if encoder is None else encoder.tobytes()).digest()[:FINGERPRINT_BYTES]


@dataclass(frozen=True, eq=False)
class SessionDrift:
    """How far a session's training moved the encoder, and how old statistics were made to follow.

    mode: the calibration that was taken. drift: what every mode would have recovered. distances: W₂ (2-Wasserstein)
    between the current pictures' Gaussians under the two encoders, before and after calibration.
    """

    mode: Mode
    drift: Drift
    distances: tuple[float, float]

    def array(self) -> NDArray[np.float64]:
        """All figures in a fixed order, f64[12]."""
        drift = self.drift
        residuals = [drift.residuals[mode] for mode in get_args(Mode)]
        shares = [drift.shift, drift.symmetric, drift.rotation, drift.relative]
        return np.array([get_args(Mode).index(self.mode), *residuals, *shares, *self.distances])

    @classmethod
    def from_array(cls, values: NDArray[np.float64]) -> SessionDrift:
        mode, *rest = values.tolist()
        modes: tuple[Mode, ...] = get_args(Mode)
        residuals = dict(zip(modes, rest, strict=False))
        shift, symmetric, rotation, relative, before, after = rest[len(modes) :]
        return cls(modes[int(mode)], Drift(residuals, shift, symmetric, rotation, relative), (before, after))


@dataclass(frozen=True, eq=False)
class Remembered:
    """encoder: fingerprint of the encoder that `gaussians` belong to. tokens: int64[C, L], the class names behind
    placeholders. prompt: f32[M, W], the vectors of this task alone. texts: unit vectors f32[C, D]. session_drift: what
    the session that learned this task measured; None for the first task.
    """

    encoder: bytes
    gaussians: Gaussians
    tokens: Tensor
    prompt: Tensor
    texts: Tensor
    session_drift: SessionDrift | None = None

    def calibrated(self, calibration: Calibration, before: bytes, after: bytes, task: str) -> Remembered:
        """The same task under the next encoder. Raises TrainingError where the statistics are not those of `before`."""
        if self.encoder != before:
            raise TrainingError(
                f"the statistics of task {task} belong to another encoder than the one that was trained further",
                "learn in a store that only dmc or dmc-ot has written",
            )
        return replace(self, encoder=after, gaussians=calibration.gaussians(self.gaussians))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By name, for the store."""
        drift = {} if self.session_drift is None else {"drift": self.session_drift.array()}
        return {
            "encoder": np.frombuffer(self.encoder, np.uint8),
            **self.gaussians.arrays(),
            "tokens": self.tokens.cpu().numpy().astype(np.int32),
            "prompt": self.prompt.cpu().numpy(),
            "texts": self.texts.cpu().numpy(),
            **drift,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Remembered:
        return cls(
            arrays["encoder"].tobytes(),
            Gaussians.from_arrays(arrays),
            torch.from_numpy(arrays["tokens"].astype(np.int64)),
            torch.tensor(arrays["prompt"]),
            torch.tensor(arrays["texts"]),
            SessionDrift.from_array(arrays["drift"]) if "drift" in arrays else None,
        )
