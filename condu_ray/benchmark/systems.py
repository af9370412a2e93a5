"""The rows of the table: the methods of the catalogue, and two baselines that are put together here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from condu_ray.catalogue import info
from condu_ray.config import ModelSpec
from condu_ray.errors import ConfigError, nearest
from condu_ray.methods import registry
from condu_ray.models.load import load
from condu_ray.sources import from_dotted

LINEAR_PROBE = "linear-probe"
LORA_BANK = "lora-bank"
LARGEST_RANK = 1024


@dataclass(frozen=True)
class System:
    """A row of the table. name: as it stands there. method: what its stores are made with, by the catalogue's name."""

    name: str
    method: str

    @property
    def trains_from_base(self) -> bool:
        """Whether every task starts from θ⁰, so that its training does not depend on the tasks before."""
        method = info(self.method)
        return method.trains and not method.ordered

    @property
    def fine_tunes_all(self) -> bool:
        """Whether every task is a full fine-tuning from θ⁰."""
        return self.trains_from_base and self.method != "condu-lora"

    @property
    def continues_a_fine_tuning(self) -> bool:
        """Whether its first task is a full fine-tuning from θ⁰, and each later one goes on from there."""
        method = info(self.method)
        return method.trains and method.ordered and registry.learner(self.method) is None

    @property
    def votes(self) -> bool:
        """Whether experts are chosen for a picture; else one model answers everything."""
        return not info(self.method).single


SYSTEMS = {
    name: System(name, method)
    for name, method in (
        ("zero-shot", "zero-shot"),
        ("finetune", "finetune"),
        ("sequential", "sequential"),
        ("wise-ft", "wise-ft"),
        ("rapf", "rapf"),
        ("calfuse", "calfuse"),
        ("dmc", "dmc"),
        ("dmc-ot", "dmc-ot"),
        (LORA_BANK, "condu-lora"),
        ("condu", "condu"),
        ("condu-lora", "condu-lora"),
        ("condu-sign", "condu-sign"),
    )
}
"""Those that keep their tasks in a store."""

METHODS = (*SYSTEMS, LINEAR_PROBE)


def check_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises ConfigError for none and for an unknown one."""
    if not names:
        raise ConfigError("there is no method to measure", f"give --methods, of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"no method '{name}'", nearest(name, METHODS))
    return tuple(dict.fromkeys(names))


@lru_cache
def plane_rank(model: ModelSpec, towers: str, targets: str) -> int:
    """The rank at which a task's adapters, both factors in half precision, take as many bytes as one bit plane of full
    fine-tuning: the nearest one, 1 to 1024."""
    clip = load(model)
    settings: dict[str, Any] = {"train.towers": towers, "lora.targets": targets, "lora.mode": "exact", "lora.rank": 1}
    config = from_dotted(settings)
    plane = registry.get("finetune").layout(clip, config).parameters / 8
    factors = registry.get("condu-lora").layout(clip, config).parameters
    return min(LARGEST_RANK, max(1, round(plane / (2 * factors))))
