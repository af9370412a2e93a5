"""One trial of a search for training settings: trains as `learn` does, on what is left of the training pictures, and
says from time to time how right it is on those that were set aside. A plain function: Ray only decides where it runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from condu_ray.config import SessionConfig
from condu_ray.data import PictureSet, Split, TaskData, prompts
from condu_ray.data.loading import BATCH, in_batches
from condu_ray.engine import figures as measure
from condu_ray.engine.crew import Crew
from condu_ray.engine.evaluate import BY, snapshot_of
from condu_ray.engine.in_process import InProcessCrew
from condu_ray.engine.keys import train_key
from condu_ray.engine.plan import store_for
from condu_ray.engine.progress import no_update, silent
from condu_ray.engine.scoring import threads_of
from condu_ray.engine.session import learn
from condu_ray.engine.work import BASE, checkpoints
from condu_ray.methods import registry
from condu_ray.methods.objective import set_modes
from condu_ray.methods.rescaling import steps_of
from condu_ray.methods.training import all_steps_for, steps_for, train_task
from condu_ray.models.clip import Clip, class_embeddings
from condu_ray.models.load import load
from condu_ray.store import Store
from condu_ray.tuning.objectives import Goals, Row, figures_of
from condu_ray.tuning.records import Record, Report, Trials
from condu_ray.tuning.space import Settings, applied


@dataclass(frozen=True)
class Assignment:
    """What all trials of a sweep share. tasks: `test` holds the validation pictures. rungs: of a single task, shares of
    its steps at which it is looked at; a stream is looked at after each version."""

    config: SessionConfig
    tasks: tuple[TaskData, ...]
    goals: Goals
    labels: str
    rungs: tuple[float, ...]
    reduction: int
    folder: Path
    threads: int
    device: str

    @property
    def budget(self) -> int:
        """How many reports a whole trial makes."""
        return len(self.rungs) if self.alone else len(self.tasks)

    @property
    def alone(self) -> bool:
        """Whether a trial is one training, looked at before anything is fused."""
        return self.goals.names == ("accuracy",)

    def spent(self, budget: int) -> int:
        """What early stopping counts: versions of a stream, or steps of a task in units of its first rung."""
        return self.reduction ** (budget - 1) if self.alone else budget


def run(assignment: Assignment, number: int, settings: Settings, report: Callable[[Report], None]) -> None:
    """Does what is missing of a trial; what it reported in an earlier run is reported again first.

    report: told each new state after it is in the trial's file. Raises ConduError where the trial cannot go on.
    """
    trials = Trials(assignment.folder)
    record = trials.read(settings) or Record(number, settings)
    for each in record.reports:
        report(each)
    if record.ended:
        return
    record = replace(record, begun=record.begun + 1)
    trials.write(record)
    seconds = record.reports[-1].seconds if record.reports else 0.0
    begun = time.monotonic()
    told = list(record.reports)

    def tell(budget: int, figures: dict[str, float], steps: int) -> None:
        if budget > (told[-1].budget if told else 0):
            values = assignment.goals.values(figures)
            told.append(Report(budget, values, figures, steps, round(seconds + time.monotonic() - begun, 3)))
            whole = budget == assignment.budget
            trials.write(replace(record, reports=tuple(told), state="finished" if whole else "running"))
            report(told[-1])

    place = trials.path(settings).with_suffix("")
    config = applied(assignment.config, settings).model_copy(update={"store": str(place), "tracking": "off"})
    with threads_of(assignment.threads):
        (_one_task if assignment.alone else _stream)(assignment, config, tell)


Tell = Callable[[int, dict[str, float], int], None]
"""(budget used, figures, steps trained)"""


def _one_task(assignment: Assignment, config: SessionConfig, tell: Tell) -> None:
    """Fine-tunes the task from θ⁰; its accuracy is that of the model as trained, before it is fused."""
    (task,) = assignment.tasks
    clip, method = load(config.model_spec, assignment.device), registry.get(config.method)
    store, pictures = store_for(config), measure.test_pictures(task, config)
    steps = steps_for(len(task.train), config)
    marks = {max(1, math.ceil(share * steps)): place for place, share in enumerate(assignment.rungs, start=1)}

    def watch(step: int, model: nn.Module) -> None:
        if step in marks:
            tell(marks[step], {"accuracy": accuracy(clip, model, task, pictures, config)}, step)

    key = train_key(clip.sha256, config, task, BASE)
    layout = method.layout(clip, config)
    train_task(clip, method, layout, task, config, resume=checkpoints(store, key), watch=watch)


@torch.no_grad()
def accuracy(clip: Clip, model: nn.Module, task: TaskData, pictures: Split, config: SessionConfig) -> float:
    """Percent of pictures that a model answers rightly while it trains, its task being named; leaves it training."""
    model.eval()
    seen = replace(clip, model=model)
    table = class_embeddings(seen, [prompts(name, task.templates) for name in task.classes])
    right = 0
    for pixels, labels in in_batches(PictureSet(pictures, clip.eval_transform), BATCH):
        right += int(((seen.images(pixels) @ table.T).argmax(dim=1).cpu() == labels).sum())
    set_modes(model, config.train.batch_norm)
    return 100 * right / len(pictures)


def _stream(assignment: Assignment, config: SessionConfig, tell: Tell) -> None:
    """Learns the tasks one after another into a store of the trial's own, and measures every version."""
    store, tasks = store_for(config), assignment.tasks
    crew = InProcessCrew(store, config, assignment.threads, assignment.device)
    tests = {task.name: (task, measure.test_pictures(task, config)) for task in tasks}
    zero_shot = _zero_shot(crew, tests) if assignment.goals.unseen else [None] * len(tasks)
    rows: list[Row] = []
    steps = 0
    for place, task in enumerate(tasks, start=1):
        learn(store, config, [task], crew, silent)
        steps += all_steps_for(len(task.train), config) + steps_of(task, config)
        rows.append(_row(store, place, tests, crew, assignment))
        tell(place, figures_of(rows, zero_shot), steps)


def _zero_shot(crew: Crew, tests: dict[str, tuple[TaskData, Split]]) -> list[float | None]:
    return [*crew.score([measure.ask("base", *pair) for pair in tests.values()], None, no_update)]


def _row(
    store: Store, version: int, tests: dict[str, tuple[TaskData, Split]], crew: Crew, assignment: Assignment
) -> list[float | None]:
    manifest = store.manifest(version)
    learned = {card.name for card in manifest.tasks}
    by = {name: BY[assignment.labels] if name in learned else "vote" for name in tests}
    asked = [name for name in tests if name in learned or assignment.goals.unseen]
    crew.hold(manifest)
    questions = [measure.ask(by[name], *tests[name]) for name in asked]
    scores = dict(zip(asked, crew.score(questions, snapshot_of(store, manifest), no_update), strict=True))
    return [scores.get(name) for name in tests]
