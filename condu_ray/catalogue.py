"""The methods by name: what a user reads before choosing one, which settings it reads, and its defaults for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from condu_ray.errors import ConfigError, nearest

MethodName = Literal[
    "condu",
    "condu-sign",
    "condu-lora",
    "zero-shot",
    "finetune",
    "sequential",
    "wise-ft",
    "rapf",
    "calfuse",
    "dmc",
    "dmc-ot",
]
Section = Literal["train", "lora", "fusion", "adapter", "memory", "dmc", "vote"]
Triggers = Literal["mask", "sign"]
AdapterBasis = Literal["qr", "svd", "identity", "none"]
Calibration = Literal["none", "fixed", "schedule", "learnable", "search"]
Shrinkage = Literal["rapf", "convex", "none"]
MemoryCalibration = Literal["none", "mean", "sdc", "ot", "linear", "auto"]

PROMPT_LENGTH = 16  # CoOp's (arXiv 2109.01134)


@dataclass(frozen=True)
class Choices:
    """The values that a method gives to settings which are left unset (config.py describes each setting).

    triggers: `fusion.triggers`. basis, calibration, distillation: of `adapter.*`. shrinkage, discriminant: of
    `memory.*`. shared_prompt, task_prompt, memory_calibration: of `dmc.*`.
    """

    triggers: Triggers = "mask"
    basis: AdapterBasis = "none"
    calibration: Calibration = "none"
    distillation: float = 0.0
    shrinkage: Shrinkage = "convex"
    discriminant: bool = True
    shared_prompt: int = 0
    task_prompt: int = 0
    memory_calibration: MemoryCalibration = "none"


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without importing it.

    name: as in `--method`. module: its file in methods/, without .py. summary, source: as `condu-ray methods` prints
    them. reads: the sections of the settings that change its results. ordered: each training starts from what the task
    before left, so tasks are learned one after another. rates: default of `train.lr`, for base models of
    SMALL_MODEL_PARAMETERS (methods/training.py) or more and for smaller ones. choices: defaults of its other settings.
    """

    name: MethodName
    module: str
    summary: str
    source: str
    reads: tuple[Section, ...]
    ordered: bool = False
    rates: tuple[float, float] = (1e-5, 5e-4)
    choices: Choices = Choices()

    @property
    def trains(self) -> bool:
        """Whether it learns at all."""
        return bool(self.reads)

    @property
    def on_features(self) -> bool:
        """Whether it is trained on θ⁰'s features of pictures, which a session computes once, not on the pictures."""
        return "adapter" in self.reads

    @property
    def remembers(self) -> bool:
        """Whether it keeps a Gaussian for each class, from which it draws features of old classes."""
        return "memory" in self.reads

    @property
    def single(self) -> bool:
        """Whether one model answers for all tasks, so that there are no experts to choose from."""
        return "vote" not in self.reads


METHODS: dict[str, MethodInfo] = {
    each.name: each
    for each in (
        MethodInfo(
            "condu",
            "condu",
            "full fine-tuning, fused into one delta with one bit a parameter and task",
            "ConDU, arXiv 2503.10705; rescalers a row are our reconstruction",
            reads=("train", "fusion", "vote"),
        ),
        MethodInfo(
            "condu-sign",
            "condu",
            "full fine-tuning, one bit a parameter and task: its sign, and its size where there is room",
            "ours, docs/fusion.md",
            reads=("train", "fusion", "vote"),
            choices=Choices(triggers="sign"),
        ),
        MethodInfo(
            "condu-lora",
            "condu_lora",
            "LoRA adapters, fused the same way",
            "ConDU (LoRA); a frozen shared A with B = 0 at the start is our reconstruction",
            reads=("train", "lora", "fusion", "vote"),
            rates=(1e-3, 1e-2),
        ),
        MethodInfo(
            "zero-shot",
            "zero_shot",
            "the base model answers everything",
            "baseline (CLIP)",
            reads=(),
        ),
        MethodInfo(
            "finetune",
            "finetune",
            "one separate dense model a task: the upper bound, and its cost",
            "baseline",
            reads=("train", "vote"),
        ),
        MethodInfo(
            "sequential",
            "sequential",
            "one model fine-tuned on task after task: it forgets",
            "baseline",
            reads=("train",),
            ordered=True,
        ),
        MethodInfo(
            "wise-ft",
            "wise_ft",
            "one model, after each task averaged with the one before: it forgets less",
            "WiSE-FT, arXiv 2109.01903; after each task as in ZSCL, arXiv 2303.06628",
            reads=("train",),
            ordered=True,
        ),
        MethodInfo(
            "rapf",
            "adapter",
            "one adapter on the base model's features, replay of class Gaussians, fused by SVD",
            "RAPF, arXiv 2407.14143, as read in its public code; cap on hinge pairs, draws and least steps ours",
            reads=("adapter", "memory"),
            ordered=True,
            choices=Choices(basis="svd", shrinkage="none", discriminant=False),
        ),
        MethodInfo(
            "calfuse",
            "adapter",
            "the same, fused by QR, with distillation and a calibrated share of the base model's feature",
            "CalFuse, arXiv 2503.18672: its parts are published, every formula is our reconstruction",
            reads=("adapter", "memory"),
            ordered=True,
            choices=Choices(basis="qr", calibration="search", distillation=1.0),
        ),
        MethodInfo(
            "dmc",
            "dmc",
            "one model: LoRA on the image tower, then a prompt with replay from class Gaussians",
            "DMC, arXiv 2511.10974 (two stages, Gaussian replay); all else our reconstruction",
            reads=("train", "memory", "dmc"),
            ordered=True,
            rates=(1e-3, 1e-3),
            choices=Choices(shared_prompt=PROMPT_LENGTH),
        ),
        MethodInfo(
            "dmc-ot",
            "dmc",
            "dmc with a prompt a task, and Gaussians that follow by optimal transport",
            "DMC-OT, arXiv 2511.10974 (calibration, task prompts); which transport is our reconstruction",
            reads=("train", "memory", "dmc"),
            ordered=True,
            rates=(1e-3, 1e-3),
            choices=Choices(task_prompt=PROMPT_LENGTH, memory_calibration="ot"),
        ),
    )
}


def info(name: str) -> MethodInfo:
    """Raises ConfigError, offering the nearest right name."""
    if name not in METHODS:
        raise ConfigError(f"no method '{name}'", nearest(name, METHODS))
    return METHODS[name]
