"""DMC and DMC-OT: first the image tower learns against fixed text vectors, then prompts against the fixed image tower.

Published (arXiv 2511.10974, its outline; no method section could be read): two stages, in each of which one tower is
frozen and anchors the other; class-wise Gaussians for generative replay; in DMC-OT their calibration across successive
encoders by optimal transport, and task-specific prompts. Everything else is our reconstruction:

    stage 1   LoRA on keys and values of the image tower (linear layers where it has no attention), the same factors
              carried on from task to task; cross entropy over the classes of the current task against θ⁰'s own text
              vectors, which never move; from the second task on the image tower before holds features near
    between   what both encoders see of the current pictures says how old Gaussians move (memory/calibration.py)
    stage 2   `dmc`: one prompt for all tasks, moved on; `dmc-ot`: a prompt for each task, kept as it is afterwards

One model answers: the newest encoder, and for each class the vector of its prompt, beside which its Gaussian answers
(memory/discriminant.py; ours).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from condu_ray.config import SessionConfig, prompt_lengths
from condu_ray.data import TaskData
from condu_ray.data.loading import BATCH, PictureSet, in_batches
from condu_ray.fusion.layout import Layout
from condu_ray.memory.calibration import best_mode, distances, fit, measure
from condu_ray.memory.gaussians import Gaussians, Sampler
from condu_ray.methods import registry
from condu_ray.methods.batches import loaders
from condu_ray.methods.checkpoint import Checkpoint, Resume
from condu_ray.methods.condu_lora import factors_of
from condu_ray.methods.discriminants import discriminants
from condu_ray.methods.objective import Teacher
from condu_ray.methods.prompt_tuning import PromptedTask, tune_prompts
from condu_ray.methods.protocol import Features, Memory, Stored, TaskState, Vector
from condu_ray.methods.remembered import Remembered, SessionDrift, fingerprint
from condu_ray.methods.states import LatestState
from condu_ray.methods.step import Step
from condu_ray.methods.training import Place, Trained, prompt_steps_for, steps_for, train_task
from condu_ray.models.clip import Clip, Overrides
from condu_ray.models.head import Head
from condu_ray.models.lora import Adapters, inject, merged_weights, plan_adapters
from condu_ray.models.prompts import most_vectors, prompt_tokens, start_vectors

SHARED = "prompt.shared"
VISION = "vision"
"""Prefix of the first stage's result in a checkpoint of the second."""


@lru_cache(maxsize=2)
def _drawn(clip: Clip, rank: int, seed: int) -> Adapters:
    return plan_adapters(clip.model, rank, "attention", seed, "image")


def _adapters(clip: Clip, config: SessionConfig) -> Adapters:
    return _drawn(clip, config.dmc.rank, config.lora.seed)


def _lengths(clip: Clip, config: SessionConfig) -> tuple[int, int]:
    return prompt_lengths(config, most_vectors(clip) // 2)


def _start(clip: Clip, config: SessionConfig, length: int) -> Tensor:
    return start_vectors(clip, length, config.lora.seed)


def layout(clip: Clip, config: SessionConfig) -> Layout:
    """The factors of the image tower's adapters, and the prompt that tasks share."""
    shared = _lengths(clip, config)[0]
    prompt = {SHARED: _start(clip, config, shared).cpu().numpy()} if shared else {}
    return Layout.of({**_adapters(clip, config).start, **prompt})


def _vision(layout: Layout) -> Layout:
    """The layout of the image tower's factors alone; its vector is the first part of the whole one."""
    own = tuple(entry for entry in layout.entries if entry.name != SHARED)
    rest = [entry.offset for entry in layout.entries if entry.name == SHARED]
    return Layout(own, rest[0] if rest else layout.total)


def empty(layout: Layout, config: SessionConfig) -> TaskState:
    return LatestState(layout)


def load(layout: Layout, config: SessionConfig, meta: Mapping[str, Any], objects: Stored) -> TaskState:
    return LatestState.load(layout, meta, objects)


def prepare(
    clip: Clip, layout: Layout, config: SessionConfig, start: Vector | None
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    adapters = _adapters(clip, config)
    model = copy.deepcopy(clip.model).float()
    parameters = inject(model, adapters, factors_of(adapters, layout, start))
    if any(entry.name == SHARED for entry in layout.entries):
        moved = np.zeros(layout.total, np.float32) if start is None else start
        parameters[SHARED] = nn.Parameter(_Model(clip, layout, config, moved).shared)
        model.register_parameter("shared_prompt", parameters[SHARED])
    return model, parameters


def expert(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> Overrides:
    adapters = _adapters(clip, config)
    return merged_weights(clip.model, adapters, factors_of(adapters, layout, delta))


def adapter(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector) -> None:
    return None


def head(clip: Clip, layout: Layout, config: SessionConfig, delta: Vector, memory: Memory) -> Head:
    texts = {task: torch.tensor(kept["texts"], device=clip.device) for task, kept in memory.items()}
    return Head(texts=texts, discriminants=discriminants(memory, config, device=clip.device))


def learn(
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
    """Both stages. The first is shared by the processes of a group; each then does the same small rest.

    Raises TrainingError for a loss that is not finite, and for statistics of another encoder than the state's.
    """
    prompt_tokens(clip, task.classes, sum(_lengths(clip, config)))  # refused before anything is trained
    pictures = len(task.train)
    first, second = steps_for(pictures, config), prompt_steps_for(pictures, config)
    start = before.delta(before.tasks[-1]) if before.tasks else None
    model = _Model(clip, layout, config, np.zeros(layout.total, np.float32) if start is None else start)
    kept = {name: Remembered.from_arrays(before.memory[name]) for name in before.tasks}  # in the order learned
    stages = _Stages(resume if place.rank == 0 else Resume(resume.load))
    seen_before = model.seen(task) if kept else None
    vision = stages.vision()
    if vision is None:
        vision = model.train_vision(
            task,
            model.teacher() if kept and config.dmc.distillation else None,
            place,
            stages.first(),
            lambda step: on_step(replace(step, steps=first + second)),
        )
        stages.keep(vision)
    after = model.with_vision(vision.delta)
    seen = after.seen(task)
    drift = None
    if seen_before is not None:
        kept, drift = _follow(kept, model.encoder, after.encoder, seen_before, seen, task.train.labels, config)
    prompts = after.prompts(task, kept)
    old_classes = Gaussians.joined([each.gaussians for each in kept.values()]) if kept else None
    tuned = tune_prompts(
        task.name,
        clip,
        prompts,
        after.shared,
        seen / np.maximum(np.linalg.norm(seen, axis=1, keepdims=True), 1e-12),
        task.train.labels,
        Sampler(old_classes, config.choices.shrinkage, config.memory.gamma) if old_classes else None,
        config,
        second,
        stages.second(vision),
        lambda step: on_step(replace(step, step=first + step.step, steps=first + second)),
    )
    gaussians = Gaussians.fit(seen, task.train.labels, len(task.classes), config.memory.covariance)
    new = Remembered(after.encoder, gaussians, prompts[-1].tokens, tuned.own, tuned.texts[-1], drift)
    old = {name: replace(each, texts=texts) for (name, each), texts in zip(kept.items(), tuned.texts[:-1], strict=True)}
    return Trained(
        after.with_shared(tuned.shared).delta,
        vision.buffers,
        vision.losses + [(first + step, loss) for step, loss in tuned.losses],
        {name: each.arrays() for name, each in {**old, task.name: new}.items()},
    )


def _follow(
    kept: Mapping[str, Remembered],
    before: bytes,
    after: bytes,
    seen_before: NDArray[np.float32],
    seen: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: SessionConfig,
) -> tuple[dict[str, Remembered], SessionDrift]:
    """Old statistics under the encoder `after`, told from pictures that both saw, f32[N, D] each."""
    settings = config.dmc
    shrinkage, kind = settings.shrinkage, settings.compared
    drift = measure(seen_before, seen, labels, config.seed, shrinkage=shrinkage, kind=kind)
    asked = config.choices.memory_calibration
    mode = best_mode(drift) if asked == "auto" else asked
    calibration = fit(
        mode,
        seen_before,
        seen,
        labels,
        shrinkage=shrinkage,
        strength=settings.strength,
        kind=kind,
        diagonal=config.memory.covariance == "diagonal",
    )
    moved = {name: each.calibrated(calibration, before, after, name) for name, each in kept.items()}
    return moved, SessionDrift(mode, drift, distances(calibration, seen_before, seen))


@dataclass(frozen=True, eq=False)
class _Model:
    """The one model at some time. delta: f32[layout.total], relative to θ⁰ and the prompt's start."""

    clip: Clip
    layout: Layout
    config: SessionConfig
    delta: Vector

    @property
    def encoder(self) -> bytes:
        """Fingerprint of the image tower."""
        return fingerprint(self.delta[: _vision(self.layout).total])

    @property
    def shared(self) -> Tensor:
        """The prompt that tasks share, f32[M, W]."""
        start = _start(self.clip, self.config, _lengths(self.clip, self.config)[0])
        moved = self.layout.views(self.delta).get(SHARED)
        return start if moved is None else start + torch.tensor(moved, device=start.device)

    def with_vision(self, vision: Vector) -> _Model:
        return replace(self, delta=np.concatenate([vision, self.delta[len(vision) :]]))

    def with_shared(self, shared: Tensor) -> _Model:
        delta = self.delta.copy()
        if len(shared):
            start = _start(self.clip, self.config, len(shared))
            self.layout.views(delta)[SHARED][:] = (shared - start).cpu().numpy()
        return replace(self, delta=delta)

    @torch.no_grad()
    def seen(self, task: TaskData) -> NDArray[np.float32]:
        """Features of the task's pictures before they are made unit, with the evaluation transform, f32[N, D]."""
        tower = expert(self.clip, self.layout, self.config, self.delta)
        pictures = PictureSet(task.train, self.clip.eval_transform)
        seen = in_batches(pictures, BATCH, 1 + loaders(self.config, self.clip.device))
        return torch.cat([self.clip.raw_images(pixels, tower) for pixels, _ in seen]).cpu().numpy()

    def teacher(self) -> Teacher:
        """This image tower, to hold the features of the one that goes on from it."""
        tower = expert(self.clip, self.layout, self.config, self.delta)
        return Teacher(lambda pixels: self.clip.images(pixels, tower), self.config.dmc.distillation)

    def train_vision(
        self,
        task: TaskData,
        teacher: Teacher | None,
        place: Place,
        resume: Resume,
        on_step: Callable[[Step], None],
    ) -> Trained:
        """The first stage, from this image tower on; its delta is that of the tower alone."""
        # Gaussians belong to an encoder, so that its running statistics must not be each task's own.
        settings = self.config.train.model_copy(update={"towers": "image", "batch_norm": "frozen"})
        vision = _vision(self.layout)
        return train_task(
            self.clip,
            registry.get(self.config.method),
            vision,
            task,
            self.config.model_copy(update={"train": settings}),
            self.delta[: vision.total],
            place,
            resume,
            on_step,
            teacher=teacher,
        )

    def prompts(self, task: TaskData, kept: Mapping[str, Remembered]) -> list[PromptedTask]:
        """The prompts of old tasks, then the new task's, which starts as a copy of the newest of them."""
        shared, own = _lengths(self.clip, self.config)
        newest = list(kept.values())[-1].prompt if kept else _start(self.clip, self.config, own)
        old = [PromptedTask(each.tokens, each.prompt, each.texts) for each in kept.values()]
        return [*old, PromptedTask(prompt_tokens(self.clip, task.classes, shared + own), newest.to(self.clip.device))]


class _Stages:
    """One checkpoint, which the two stages of a training write in turn.

    found: what an earlier run left; dropped once a stage has taken it, since it is as large as the model's moments.
    """

    def __init__(self, resume: Resume) -> None:
        self.resume, self.found = resume, resume.load()

    def vision(self) -> Trained | None:
        """The result of the first stage, where an earlier run finished it; else None."""
        if self.found is None or f"{VISION}/delta" not in self.found:
            return None
        losses = [(int(step), float(loss)) for step, loss in self.found[f"{VISION}/losses"]]
        return Trained(self.found[f"{VISION}/delta"], {}, losses)

    def first(self) -> Resume:
        return Resume(self._taken, self.resume.save)

    def _taken(self) -> Checkpoint | None:
        found, self.found = self.found, None
        return found

    def keep(self, vision: Trained) -> None:
        self.resume.save(_named(vision))

    def second(self, vision: Trained) -> Resume:
        begun = self.found is not None and f"{VISION}/delta" in self.found and "step" in self.found
        return Resume(
            lambda: self._taken() if begun else None,
            lambda checkpoint: self.resume.save({**checkpoint, **_named(vision)}),
        )


def _named(vision: Trained) -> Checkpoint:
    return {f"{VISION}/{name}": values for name, values in vision.arrays().items()}
