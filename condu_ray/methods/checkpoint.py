"""Everything that a running task needs to go on to the same bits after its process died."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from condu_ray.methods.step import Losses

Checkpoint = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Resume:
    """Loads and saves the checkpoint of a running task (None: none yet).

    The arrays that `save` gets are those of the running model: they change once it returns.
    """

    load: Callable[[], Checkpoint | None] = lambda: None
    save: Callable[[Checkpoint], None] = lambda checkpoint: None


def checkpoint_of(
    step: int,
    losses: Losses,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    model: nn.Module,
) -> Checkpoint:
    """Parameters, AdamW's moments and buffers after `step` steps; on the CPU, without a copy where they are there."""
    arrays: Checkpoint = {"step": np.array([step]), "losses": np.array(losses, np.float64).reshape(-1, 2)}
    for name, parameter in parameters.items():
        arrays[f"parameter/{name}"] = parameter.detach().cpu().numpy()
        if moments := optimiser.state.get(parameter):  # none where a model does not use a parameter
            arrays[f"first/{name}"] = moments["exp_avg"].cpu().numpy()
            arrays[f"second/{name}"] = moments["exp_avg_sq"].cpu().numpy()
    arrays.update({f"buffer/{name}": tensor.cpu().numpy() for name, tensor in model.named_buffers()})
    return arrays


@torch.no_grad()
def restore(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, model: nn.Module
) -> tuple[int, Losses]:
    """Puts a checkpoint back in place; returns the steps done and the losses so far."""
    step = int(checkpoint["step"][0])
    for name, parameter in parameters.items():
        parameter.copy_(torch.tensor(checkpoint[f"parameter/{name}"]))
        if f"first/{name}" in checkpoint:
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter).copy_(torch.tensor(checkpoint[f"first/{name}"])),
                "exp_avg_sq": torch.empty_like(parameter).copy_(torch.tensor(checkpoint[f"second/{name}"])),
            }
    for name, tensor in model.named_buffers():
        tensor.copy_(torch.tensor(checkpoint[f"buffer/{name}"]))
    return step, [(int(at), float(loss)) for at, loss in checkpoint["losses"]]
