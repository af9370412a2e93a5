"""The systems by name. Reading this list imports no torch; `get` does."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from condu_ray.config import VoteConfig
from condu_ray.errors import ConfigError, nearest

if TYPE_CHECKING:
    from condu_ray.methods.protocol import Learner, Method


@dataclass(frozen=True)
class MethodInfo:
    """What a user reads about a system before choosing it."""

    name: str
    module: str
    summary: str
    source: str
    trains: bool
    ordered: bool
    """True: training starts from the state before, so tasks are learned one after another."""
    on_features: bool = False
    """True: it learns on what θ⁰ sees, which the engine computes once, and not on pictures."""
    single: bool = False
    """True: one model answers everything, so there is nobody to vote."""


METHODS = {
    info.name: info
    for info in (
        MethodInfo(
            "condu",
            "condu",
            "full fine-tuning, fused into one delta with one bit a parameter and task",
            "ConDU, arXiv 2503.10705; rescalers a row are our reconstruction",
            trains=True,
            ordered=False,
        ),
        MethodInfo(
            "condu-sign",
            "condu",
            "full fine-tuning, one bit a parameter and task: its sign, and its size where there is room",
            "ours, docs/fusion.md",
            trains=True,
            ordered=False,
        ),
        MethodInfo(
            "condu-lora",
            "condu_lora",
            "LoRA adapters, fused the same way",
            "ConDU (LoRA); a frozen shared A with B = 0 at the start is our reconstruction",
            trains=True,
            ordered=False,
        ),
        MethodInfo(
            "zero-shot",
            "zero_shot",
            "the base model answers everything",
            "baseline (CLIP)",
            trains=False,
            ordered=False,
            single=True,
        ),
        MethodInfo(
            "finetune",
            "finetune",
            "one separate dense model a task: the upper bound, and its cost",
            "baseline",
            trains=True,
            ordered=False,
        ),
        MethodInfo(
            "sequential",
            "sequential",
            "one model fine-tuned on task after task: it forgets",
            "baseline",
            trains=True,
            ordered=True,
            single=True,
        ),
        MethodInfo(
            "wise-ft",
            "wise_ft",
            "one model, after each task averaged with the one before: it forgets less",
            "WiSE-FT, arXiv 2109.01903; after each task as in ZSCL, arXiv 2303.06628",
            trains=True,
            ordered=True,
            single=True,
        ),
        MethodInfo(
            "rapf",
            "adapter",
            "one adapter on the base model's features, replay of class Gaussians, fused by SVD",
            "RAPF, arXiv 2407.14143, as read in its public code; cap on hinge pairs, draws and least steps ours",
            trains=True,
            ordered=True,
            on_features=True,
            single=True,
        ),
        MethodInfo(
            "calfuse",
            "adapter",
            "the same, fused by QR, with distillation and a calibrated share of the base model's feature",
            "CalFuse, arXiv 2503.18672: its parts are published, every formula is our reconstruction",
            trains=True,
            ordered=True,
            on_features=True,
            single=True,
        ),
        MethodInfo(
            "dmc",
            "dmc",
            "one model: LoRA on the image tower, then a prompt with replay from class Gaussians",
            "DMC, arXiv 2511.10974 (two stages, Gaussian replay); all else our reconstruction",
            trains=True,
            ordered=True,
            single=True,
        ),
        MethodInfo(
            "dmc-ot",
            "dmc",
            "dmc with a prompt a task, and Gaussians that follow by optimal transport",
            "DMC-OT, arXiv 2511.10974 (calibration, task prompts); which transport is our reconstruction",
            trains=True,
            ordered=True,
            single=True,
        ),
    )
}


def info(name: str) -> MethodInfo:
    """Raises ConfigError, offering the nearest right name."""
    if name not in METHODS:
        raise ConfigError(f"no method '{name}'", nearest(name, METHODS))
    return METHODS[name]


def vote_of(name: str, vote: VoteConfig) -> VoteConfig:
    """How this system's experts answer: as set, or, where one model answers everything, by that model alone."""
    if not info(name).single:
        return vote
    return VoteConfig(k=1, combine="weighted", base_weight=0.0, adaptive=False, union="joint", within="expert")


def get(name: str) -> Method:
    """The system itself: its module follows methods/protocol.py."""
    return cast("Method", import_module(f"condu_ray.methods.{info(name).module}"))


def learner(name: str) -> Learner | None:
    """The system, where it has a training of its own; None where it tunes parameters for the task's loss."""
    found = get(name)
    return cast("Learner", found) if hasattr(found, "learn") else None
