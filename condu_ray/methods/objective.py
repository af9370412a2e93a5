"""What a task is trained for: the loss of a batch, in which precision, and how its gradient is added up.

Cross entropy over the task's classes with label smoothing, first prompt template, logit scale frozen (ConDU's released
scripts); in DMC also how far features move away from an earlier image tower's (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.data.templates import prompts
from condu_ray.errors import TrainingError
from condu_ray.models.clip import Clip, class_embeddings

BETAS = (0.9, 0.999)  # of AdamW, whatever it trains


@dataclass(frozen=True, eq=False)
class Teacher:
    """Holds an image tower near where it was: weight · mean over the batch of |ẑ − ẑ_teacher|², of unit features.

    images: f32[B, 3, H, W] -> unit features f32[B, D], without a gradient.
    """

    images: Callable[[Tensor], Tensor]
    weight: float

    def loss(self, pixels: Tensor, unit: Tensor) -> Tensor:
        return self.weight * (unit - self.images(pixels)).square().sum(dim=1).mean()


class TaskLoss(nn.Module):
    """Cross entropy of a batch against the task's classes; one module, so that DDP sees every parameter."""

    def __init__(
        self, clip: Clip, model: nn.Module, task: TaskData, config: SessionConfig, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.smoothing = config.train.label_smoothing
        self.text_learns = config.train.towers == "both"
        self.register_buffer("text", _text_of(clip, task, config), persistent=False)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        model = cast(Any, self.model)
        image_BD = model.encode_image(pixels, normalize=True)
        text_CD = model.encode_text(self.text, normalize=True) if self.text_learns else self.text
        logits_BC = model.logit_scale.detach().exp() * image_BD @ text_CD.T
        loss = nn.functional.cross_entropy(logits_BC.float(), labels, label_smoothing=self.smoothing)
        return loss if self.teacher is None else loss + self.teacher.loss(pixels, image_BD.float())


def _text_of(clip: Clip, task: TaskData, config: SessionConfig) -> Tensor:
    """Tokens of the first prompt of each class, or fixed class vectors where only the image tower learns."""
    texts = [prompts(name, task.templates) for name in task.classes]
    if config.train.towers == "both":
        return clip.tokenizer([each[0] for each in texts]).to(clip.device)
    return class_embeddings(clip, texts)


def set_modes(model: nn.Module, batch_norm: Literal["frozen", "updated"]) -> None:
    """Training mode; with `frozen`, running statistics are used and stay as they are."""
    model.train()
    if batch_norm == "frozen":
        # A running variance that is fused like a parameter could turn negative; frozen ones stay θ⁰'s.
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def precision(clip: Clip, config: SessionConfig) -> Callable[[], Any]:
    """Makes the context in which a forward pass runs."""
    device = clip.device.type
    wanted = config.train.precision
    half = wanted == "bf16" or (wanted == "auto" and device == "cuda" and torch.cuda.is_bf16_supported(False))
    return lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=half)


def backward(
    loss_of: Callable[[Tensor, Tensor], Any],
    pixels: Tensor,
    labels: Tensor,
    config: SessionConfig,
    autocast: Callable[[], Any],
    size: int = 1,
) -> float:
    """Adds up the gradient of the global batch's mean loss; returns the mean loss of this share.

    size: how many processes share the batch and average their gradients. Raises TrainingError where a batch
    normalisation that is updated sees a single value a channel.
    """
    batch_size = config.train.batch_size
    # As many parts in every process, whatever its share: each part's backward pass waits for the others.
    parts = min(config.train.accumulate, batch_size // size)
    total = 0.0
    for some_pixels, some_labels in zip(pixels.tensor_split(parts), labels.tensor_split(parts), strict=True):
        try:
            with autocast():
                loss = loss_of(some_pixels, some_labels)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                "batch normalisation has nothing to measure in a single picture",
                "use a larger --train.batch-size, a smaller --train.accumulate, fewer --workers, or "
                "--train.batch-norm frozen",
            ) from error
        # Gradients are averaged over processes, whose shares may differ by one picture.
        (loss * (len(some_labels) * size / batch_size)).backward()
        total += float(loss.detach()) * len(some_labels) / len(labels)
    return total


def check_finite(task: str, where: str, loss: float, parameters: Iterable[nn.Parameter], mend: str) -> None:
    """Raises TrainingError unless the loss and its gradient are numbers. where: `step 3 of 8`.

    The gradient is looked at too: it is the same in every process, so all of them stop or none.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
        raise TrainingError(f"task {task}: the {what} is {value} at {where}", mend)
