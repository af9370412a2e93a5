"""The one protocol that every system follows. A system is a module with these functions and no state of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.data import TaskData
from condu_ray.fusion.layout import Layout
from condu_ray.models.clip import Clip, Overrides
from condu_ray.models.head import Head
from condu_ray.models.lora import LowRank

if TYPE_CHECKING:
    from condu_ray.methods.checkpoint import Resume
    from condu_ray.methods.step import Step
    from condu_ray.methods.training import Place, Trained

Vector = NDArray[np.float32]
"""f32[layout.total]: a delta in layout order."""

Stored = Mapping[str, Mapping[str, NDArray[Any]]]
"""Object name -> arrays, as they come back from a store."""

Arrays = dict[str, dict[str, NDArray[Any]]]
"""Object name -> arrays. Along one lineage of versions the same name always means the same bytes."""

Memory = Mapping[str, Mapping[str, NDArray[Any]]]
"""Task -> what a system keeps of it beside its delta: class statistics, prompts, whatever it needs to learn on."""

NO_MEMORY: Memory = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Features:
    """What θ⁰ sees of a task's training pictures, with the evaluation transform.

    raw: f32[N, D], before they are made unit. labels: i64[N]. texts: f32[C, D], by the text tower, unit vectors.
    """

    raw: NDArray[np.float32]
    labels: NDArray[np.int64]
    texts: NDArray[np.float32]


class TaskState(Protocol):
    """What a system keeps of its tasks. Immutable: every change returns a new state."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names in the order learned."""

    @property
    def memory(self) -> Memory:
        """What the system keeps beside deltas; nothing for most."""

    def add(self, task: str, delta: Vector, memory: Memory = NO_MEMORY) -> TaskState:
        """The state after `task`. memory: as its training gave it; that of tasks which it does not name stays.

        Raises FusionError for a name that is taken or a delta that is not finite.
        """

    def forget(self, task: str) -> TaskState:
        """The state without `task`; every other task's delta stays as it is, bit for bit.

        Raises FusionError for a task that is not in it.
        """

    def delta(self, task: str) -> Vector | None:
        """The delta that this task's expert has now; None where the base model answers.

        Raises FusionError for a task that is not in the state.
        """

    def objects(self) -> Arrays:
        """Everything large that a version needs to hold."""

    def meta(self) -> dict[str, Any]:
        """Everything small, as JSON."""


class Method(Protocol):
    """What a system does with a task; which of them train, and in order, stands in catalogue.py."""

    def layout(self, clip: Clip, config: SessionConfig) -> Layout:
        """What is fused: fixed for the life of a store."""

    def empty(self, layout: Layout, config: SessionConfig) -> TaskState:
        """The state before the first task."""

    def load(self, layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> TaskState:
        """The state that `objects()` and `meta()` of an earlier one describe."""

    def prepare(
        self, clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
    ) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """A private f32 copy of the model at θ⁰, or at θ⁰ + `start`, and its tensors to train by layout name."""

    def expert(self, clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
        """What stands in for θ⁰'s own parameters when the expert of this delta answers."""

    def adapter(self, clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> LowRank | None:
        """The same expert as what is added beside θ⁰; None where the method or the model has no such form."""

    def head(self, clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> Head | None:
        """What follows the towers when the expert of this delta answers; None: labels meet the towers' own features.

        memory: of the state, or of the training, that the delta comes from.
        """


class Learner(Method, Protocol):
    """A system whose training is more than to tune the parameters that `prepare` gives (methods/training.py)."""

    def learn(
        self,
        clip: Clip,
        layout: Layout,
        task: TaskData,
        config: SessionConfig,
        before: TaskState,
        features: Features | None,
        place: Place,
        resume: Resume,
        on_step: Callable[[Step], None],
    ) -> Trained:
        """Trains `task` on top of the state `before`; the delta is relative to θ⁰.

        features: where the catalogue says that the method learns on them. Every process of a group calls this alike and
        gets the same; only rank 0 saves checkpoints. Raises TrainingError for a loss that is not finite.
        """
