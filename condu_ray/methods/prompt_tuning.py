"""Learns prompt vectors on cached features of an image tower that stays: the second stage of DMC.

    loss = CE over all classes seen of { features of the current pictures } ∪ { draws from Gaussians of old classes }

The outline (the image tower frozen, replay from class-wise Gaussians so that new prompts do not bias the classifier) is
published (DMC, arXiv 2511.10974); batches, balance and optimiser are our reconstruction. AdamW with weight decay 1e-4,
gradients clipped at norm 1 and a cosine are those of PromptFusion's public code, by DMC's first author.

Legend: N pictures, C classes, M vectors a prompt, W width of a token, D width of the common space.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from condu_ray.config import SessionConfig
from condu_ray.memory.gaussians import Sampler
from condu_ray.methods.batches import Order, seed_of
from condu_ray.methods.checkpoint import Resume, checkpoint_of, restore
from condu_ray.methods.objective import BETAS, check_finite, precision
from condu_ray.methods.step import Log, Losses, Step
from condu_ray.methods.training import schedule
from condu_ray.models.clip import Clip
from condu_ray.models.prompts import PromptedClasses

WEIGHT_DECAY = 1e-4
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True, eq=False)
class PromptedTask:
    """Classes that one task taught. tokens: int64[C, L]; own: f32[M_own, W], the vectors of this task alone.

    texts: unit vectors f32[C, D], where they are known and stay as long as no vector changes.
    """

    tokens: Tensor
    own: Tensor
    texts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Tuned:
    """shared f32[M_shared, W]; own f32[M_own, W] of the newest task; texts: by task, unit vectors f32[C, D]."""

    shared: Tensor
    own: Tensor
    texts: list[Tensor]
    losses: Losses


def tune_prompts(
    name: str,
    clip: Clip,
    tasks: Sequence[PromptedTask],
    shared: Tensor,
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    sampler: Sampler | None,
    config: SessionConfig,
    steps: int,
    resume: Resume,
    on_step: Callable[[Step], None],
) -> Tuned:
    """Learns `shared` and the own vectors of the last of `tasks`; those of earlier tasks stay.

    features: unit features f32[N, D] of the newest task's pictures with its labels i64[N]. sampler: draws features of
    the classes of all tasks before, numbered through; None before the second. The same seed gives the same
    bits, also after `resume`. Raises TrainingError for a loss or gradient that is not finite.
    """
    prompts = _Prompts(clip, tasks, shared)
    replayed = _Replay(sampler, tasks, features.shape[1], config, limited=len(shared) > 0)
    optimiser = torch.optim.AdamW(
        list(prompts.learned.values()), lr=config.dmc.prompt_lr, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    saved_state, nothing = resume.load(), nn.Module()
    first, losses = restore(saved_state, prompts.learned, optimiser, nothing) if saved_state else (0, [])
    autocast = precision(clip, config)
    log, saved = Log(name, steps, on_step, losses), time.monotonic()
    size = config.train.batch_size
    order = Order(len(labels), size, config.seed, range(first, steps))
    for step, batch in zip(range(first, steps), order, strict=True):
        chosen = [index for index, _ in batch]
        old, drawn, of_drawn = replayed.draws(step)
        classes = np.concatenate([old, prompts.current])
        images = torch.from_numpy(np.concatenate([drawn, features[chosen]])).to(clip.device)
        # Labels by their place in `classes`; the current ones come last.
        right = torch.from_numpy(np.concatenate([of_drawn, len(old) + labels[chosen]])).to(clip.device)
        for group in optimiser.param_groups:
            group["lr"] = config.dmc.prompt_lr * schedule(step, steps, 0.0)
        optimiser.zero_grad(set_to_none=True)
        with autocast():
            texts = prompts.vectors(classes)
        logits = clip.logit_scale * functional.normalize(images, dim=-1) @ texts.float().T
        loss = functional.cross_entropy(logits, right)
        loss.backward()  # type: ignore[no-untyped-call]
        where, mend = f"prompt step {step + 1} of {steps}", "use a smaller --dmc.prompt-lr"
        check_finite(name, where, float(loss.detach()), prompts.learned.values(), mend)
        nn.utils.clip_grad_norm_(prompts.learned.values(), LARGEST_GRADIENT)
        optimiser.step()
        log.done(step + 1, float(loss.detach()), size)
        if step < steps - 1 and time.monotonic() - saved >= config.train.checkpoint_seconds:
            resume.save(checkpoint_of(step + 1, log.losses, prompts.learned, optimiser, nothing))
            saved = time.monotonic()
    return prompts.tuned(log.losses)


class _Prompts:
    """The classes of all tasks, numbered in the order learned, with vectors that learn."""

    def __init__(self, clip: Clip, tasks: Sequence[PromptedTask], shared: Tensor) -> None:
        self._shared, self._own = nn.Parameter(shared.clone()), nn.Parameter(tasks[-1].own.clone())
        self.learned = {name: each for name, each in (("shared", self._shared), ("own", self._own)) if len(each)}
        self._sizes = [len(task.tokens) for task in tasks]
        self.current = np.arange(sum(self._sizes[:-1]), sum(self._sizes))
        self._fixed = [task.own.to(clip.device) for task in tasks[:-1]]
        self._encoder = PromptedClasses(
            clip, torch.cat([task.tokens for task in tasks]), len(shared) + len(tasks[-1].own)
        )
        self._task = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor(self._sizes)).to(clip.device)
        # Where no vector is shared, old classes keep their vectors: they are encoded once in their life.
        known = [task.texts for task in tasks[:-1] if task.texts is not None]
        constant = not len(shared) and len(known) == len(tasks) - 1 and len(known) > 0
        self._constant = torch.cat(known).to(clip.device) if constant else None

    def vectors(self, classes: NDArray[np.int64]) -> Tensor:
        """Unit vectors f32[C, D] of these classes, with a gradient; all of the current ones come last."""
        if self._constant is None:
            return self._encoded(torch.from_numpy(classes))
        old = classes[: len(classes) - len(self.current)]
        return torch.cat([self._constant[torch.from_numpy(old)], self._encoded(torch.from_numpy(self.current))])

    def _encoded(self, classes: Tensor) -> Tensor:
        own = torch.stack([*self._fixed, self._own])[self._task[classes]]
        shared = self._shared.expand(len(classes), -1, -1)
        return self._encoder.vectors(torch.cat([shared, own], dim=1), classes)

    @torch.no_grad()
    def tuned(self, losses: Losses) -> Tuned:
        texts = self.vectors(np.arange(sum(self._sizes))).float()
        return Tuned(self._shared.detach(), self._own.detach(), list(torch.split(texts, self._sizes)), losses)


class _Replay:
    """Which old classes compete in a step, and features drawn from them.

    As many draws a class as a current class has pictures in a batch, times `dmc.replay`; where that is less than one,
    one draw of that share of the old classes, in each step of others. limited: every class has to be encoded, so that a
    step takes as many old ones as `dmc.classes_per_step` leaves room for.
    """

    def __init__(
        self, sampler: Sampler | None, tasks: Sequence[PromptedTask], width: int, config: SessionConfig, limited: bool
    ) -> None:
        self._sampler, self._seed, self._session = sampler, config.seed, len(tasks)
        self._old, current = sum(len(task.tokens) for task in tasks[:-1]), len(tasks[-1].tokens)
        share = config.dmc.replay * config.train.batch_size / current
        self._each, self._share = max(1, round(share)), min(1.0, share)
        self._most = max(1, config.dmc.classes_per_step - current) if limited else self._old
        self._none = np.empty((0, width), np.float32)

    def draws(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """(old classes i64[C], features f32[draws, D], the place in the first of each draw's class)."""
        old = np.arange(self._old)
        if self._old > self._most:
            random = np.random.default_rng(seed_of(self._seed, "old classes", self._session, step))
            old = np.sort(random.choice(old, self._most, replace=False))
        places = self._drawn(len(old), step)
        if self._sampler is None or not len(places):
            return old, self._none, np.empty(0, np.int64)
        key = (self._seed, self._session, step)
        drawn = [self._sampler.draw(int(label), self._each, key) for label in old[places]]
        return old, np.concatenate(drawn), np.repeat(places, self._each)

    def _drawn(self, count: int, step: int) -> NDArray[np.int64]:
        """Which of the old classes that compete in a step are drawn from, by place."""
        if self._share == 1:
            return np.arange(count)
        random = np.random.default_rng(seed_of(self._seed, "drawn classes", self._session, step))
        some = min(count, int(self._share * self._old + random.random()))  # right on average over steps
        return np.sort(random.choice(count, some, replace=False))
