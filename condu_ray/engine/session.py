"""The session spine: train, features, rescale, fuse, evaluate, commit.

Each step is found again by the name of its input. Only the last step changes what readers see. A session that died is
given again and goes on after the last finished step; one that loses a race re-fuses onto the winner without training
again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from condu_ray.config import SessionConfig, fuses, rescales
from condu_ray.data import Split, TaskData
from condu_ray.engine import figures as measure
from condu_ray.engine.crew import Crew
from condu_ray.engine.fusing import Fused
from condu_ray.engine.keeper import Keeper
from condu_ray.engine.keys import (
    FEATURES,
    PLACEMENT,
    content_key,
    features_key,
    state_key,
    train_key,
    training_settings,
)
from condu_ray.engine.progress import Stage, Update
from condu_ray.engine.scoring import Snapshot
from condu_ray.engine.work import BASE, Job
from condu_ray.errors import DataError, FusionError, StoreError
from condu_ray.fusion import signs
from condu_ray.methods.rescaling import steps_of
from condu_ray.methods.stored import TASK_OBJECTS
from condu_ray.methods.training import buffers_in
from condu_ray.sources import flatten
from condu_ray.store import Manifest, ObjectRef, Store, TaskCard, put_first
from condu_ray.store.history import newest
from condu_ray.voting.classifier import TaskExpert
from condu_ray.voting.domains import make_domain
from condu_ray.voting.open import buffers_of, task_experts
from condu_ray.voting.prototypes import (
    FeatureSums,
    held_out_indices,
    make_prototypes,
)
from condu_ray.voting.router import calibrated

MOST_RACES = 50
RESCALERS = "trained-rescalers"


@dataclass
class _Clock:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str):  # type: ignore[no-untyped-def]
        begun = time.monotonic()
        yield
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.monotonic() - begun, 3)


@dataclass(frozen=True)
class _Known:
    """What a task brings to every try at a commit."""

    job: Job
    prototypes: ObjectRef
    domain: ObjectRef
    tests: ObjectRef
    pictures: Split
    figures: measure.Baseline
    delta: ObjectRef | None
    buffers: ObjectRef | None
    losses: list[tuple[int, float]]

    def refs(self) -> list[ObjectRef]:
        given = (self.prototypes, self.domain, self.tests, self.delta, self.buffers)
        return [ref for ref in given if ref is not None]


def to_learn(store: Store, config: SessionConfig, tasks: Sequence[TaskData]) -> list[TaskData]:
    """Those of `tasks` that the newest version does not hold yet.

    Raises DataError where a name is taken by other pictures, or was learned with other settings, FusionError where the
    state would not take in so many: after the training it would be too late.
    """
    manifest = newest(store)
    missing = []
    for task in tasks:
        card = manifest.task(task.name) if manifest else None
        if card is None:
            missing.append(task)
        elif other := _difference(card, config, task):
            raise DataError(
                f"task {task.name} was learned in version {card.learned_in} {other}",
                f"choose another name, or `condu-ray forget {task.name}` first",
            )
    taken = manifest.state["method"].get("next_uid", 0) if manifest else 0
    if missing and fuses(config) and config.choices.triggers == "sign" and taken + len(missing) > signs.MOST_TASKS:
        raise FusionError(
            f"{store.url} has taken in {taken} tasks, forgotten ones counted, and takes in {signs.MOST_TASKS} at most, "
            f"not {len(missing)} more",
            "start another store",
        )
    return missing


def _difference(card: TaskCard, config: SessionConfig, task: TaskData) -> str | None:
    """What a task of that name was learned with instead, if anything."""
    others = _other_settings(card, config, task)
    splits_otherwise = task.split_made and any(each.startswith(("seed ", "test_share ")) for each in others)
    if card.fingerprint != task.fingerprint and not splits_otherwise:
        return f"from other pictures, labels or templates ({card.source})"
    return f"with other settings ({'; '.join(others)})" if others else None


def _other_settings(card: TaskCard, config: SessionConfig, task: TaskData) -> list[str]:
    """What differs from the settings a task was learned with; one that is younger than the task had its default."""
    # Another share may make the same split of a few pictures.
    other_split = task.split_made and card.fingerprint != task.fingerprint and "test_share" in card.settings
    split = {"test_share": config.test_share} if other_split else {}
    asked, learned = (flatten(each) for each in ({**training_settings(config), **split}, card.settings))
    usual = flatten(training_settings(SessionConfig(method=config.method)))
    learned = {**usual, **learned}
    return [f"{name} {learned[name]}, not {value}" for name, value in asked.items() if learned[name] != value]


def learn(store: Store, config: SessionConfig, tasks: Sequence[TaskData], crew: Crew, stage: Stage) -> list[Manifest]:
    """Learns what is missing of `tasks`, one version a task, in this order; returns the versions that it made."""
    todo = to_learn(store, config, tasks)
    if not todo:
        return []
    clock = _Clock()
    jobs = _jobs(store, config, todo)
    info = config.system
    if info.on_features:
        for job in jobs:
            with clock("features"), stage(f"features of {job.data.name}") as update:
                _features(store, config, crew, job.data, update)
    if info.trains:
        with clock("train"), stage("training") as update:
            crew.train(jobs, update)
        for job in jobs:
            with suppress(StoreError):  # gc takes what is left
                store.discard_work(job.key)
    known = []
    for job in jobs:
        with clock("features"), stage(f"features of {job.data.name}") as update:
            prototypes, domain = _features(store, config, crew, job.data, update)
            tests, pictures = _tests(store, config, job.data)
        delta = store.find(job.key, "delta") if job.key else None
        trained = store.get(delta) if delta else {}
        changed = buffers_in(trained)
        buffers = store.put(content_key("buffers", changed), "buffers", changed) if changed else None
        with clock("evaluate"), stage(f"{job.data.name} before fusion") as update:
            base = measure.baseline(crew, job.data, pictures, delta, buffers, update)
        losses = [(int(step), float(loss)) for step, loss in trained.get("losses", ())]
        known.append(_Known(job, prototypes, domain, tests, pictures, base, delta, buffers, losses))
    made, keeper = list[Manifest](), Keeper(store, [ref.path for each in known for ref in each.refs()])
    for index, one in enumerate(known):
        keeper.touch()
        later = {each.job.data.name: (each.job.data, each.pictures) for each in known[index + 1 :]}
        manifest = _add(store, config, crew, one, later, made, clock, stage)
        if manifest is not None:
            made.append(manifest)
        clock = _Clock()
    return made


def _jobs(store: Store, config: SessionConfig, tasks: Sequence[TaskData]) -> list[Job]:
    info, manifest = config.system, newest(store)
    if not info.trains:
        return [Job("", task) for task in tasks]
    origin, jobs = _origin(manifest) if info.ordered else BASE, list[Job]()
    for task in tasks:
        key = train_key(store.header.model_sha256, config, task, origin)
        if info.ordered:
            jobs.append(Job(key, task, manifest.version if manifest else None, origin))
            origin = key
        else:
            jobs.append(Job(key, task))
    return jobs


def _origin(manifest: Manifest | None) -> str:
    """Names the training that gave a version its newest delta."""
    return str(manifest.state["trained"]) if manifest and manifest.tasks else BASE


def _features(
    store: Store, config: SessionConfig, crew: Crew, task: TaskData, update: Update
) -> tuple[ObjectRef, ObjectRef]:
    """Where the task's prototypes and its domain are. Systems that learn on features find them beside."""
    key = features_key(store.header, config, task)
    prototypes, domain = store.find(key, "prototypes"), store.find(key, "domain")
    lacks = config.system.on_features and store.find(key, FEATURES) is None
    if prototypes is None or domain is None or lacks:
        features, domains, lengths = crew.features(task.train, update)
        if lacks:
            put_first(store, key, FEATURES, {"raw": features * lengths[:, None]})
        held = held_out_indices(task.train.labels, config.seed)
        rest = np.setdiff1d(np.arange(len(task.train)), held)
        labels, classes = task.train.labels[rest], len(task.classes)
        sums = FeatureSums.zero(classes, features.shape[1]).add(features[rest], labels)
        made = make_prototypes(sums, crew.text_means(task.classes, task.templates), features[held])
        prototypes = put_first(store, key, "prototypes", made.arrays())
        own = make_domain(domains[rest], labels, classes, domains[held], task.train.labels[held])
        domain = put_first(store, key, "domain", own.arrays())
    return prototypes, domain


def _tests(store: Store, config: SessionConfig, task: TaskData) -> tuple[ObjectRef, Split]:
    pictures = measure.test_pictures(task, config)
    packed = measure.pack_pictures(pictures)
    return store.put(content_key("tests", packed), "tests", packed), pictures


def _add(
    store: Store,
    config: SessionConfig,
    crew: Crew,
    one: _Known,
    later: dict[str, tuple[TaskData, Split]],
    made: Sequence[Manifest],
    clock: _Clock,
    stage: Stage,
) -> Manifest | None:
    """Fuses the task onto the newest version and commits; onto the next newest if another session was faster."""
    for _ in range(MOST_RACES):
        parent = newest(store)
        if not to_learn(store, config, [one.job.data]):
            return None  # another session learned the very same task meanwhile
        try:
            manifest, rescaling = _next(store, config, crew, parent, one, later, made, clock, stage)
            store.commit(manifest)
        except StoreError:
            if newest(store) == parent:
                raise
            continue  # what this try began from may be gone, too
        _tidy(store, config, one, rescaling)
        return manifest
    raise StoreError(f"{MOST_RACES} other sessions were faster in a row", "run the same command again")


def _next(
    store: Store,
    config: SessionConfig,
    crew: Crew,
    parent: Manifest | None,
    one: _Known,
    later: dict[str, tuple[TaskData, Split]],
    made: Sequence[Manifest],
    clock: _Clock,
    stage: Stage,
) -> tuple[Manifest, str]:
    """(the version after `parent`, whose objects are in the store; the name of the task's trained rescalers, if any)"""
    task = one.job.data
    _check_start(config, parent, one)
    before = _before(store, config, crew, parent, one, made, clock, stage)
    steps, given = steps_of(task, config), one.delta.sha256 if one.delta else ""
    key = rescaling = state_key(parent, config, task.name, given, steps)
    rescalers = _rescalers(store, config, crew, rescaling, parent, one, clock, stage)
    if rescalers is not None:
        key = state_key(parent, config, task.name, f"{given} {rescalers.sha256}", steps)
    with clock("fuse"), stage(f"fusing {task.name}"):
        fused = crew.fuse(key, parent, task.name, one.delta, rescalers)
    draft = _draft(config, parent, one, fused, before)
    with clock("evaluate"), stage(f"evaluating version {draft.version}") as update:
        manifest = _measured(store, config, crew, draft, fused, one, later, update)
    return manifest.model_copy(update={"seconds": clock.seconds}), rescaling


def _tidy(store: Store, config: SessionConfig, one: _Known, rescaling: str) -> None:
    """Removes what is left of a task's training: it is in the version. What cannot be removed now is left to gc."""
    done = {
        (one.job.key, "delta"): one.delta is not None,
        (features_key(store.header, config, one.job.data), FEATURES): config.system.on_features,
        (rescaling, RESCALERS): rescales(config),
    }
    for (key, name), is_there in done.items():
        if is_there:
            with suppress(StoreError):
                store.discard(key, name)


def _check_start(config: SessionConfig, parent: Manifest | None, one: _Known) -> None:
    """The delta must still be there, and, for systems that go on from task to task, start where the model is now."""
    info = config.system
    moved = info.ordered and _origin(parent) != one.job.origin
    if moved or (info.trains and one.delta is None):
        raise StoreError(
            f"another session changed the store while {one.job.data.name} was learned",
            "run the same command again, it goes on from there",
        )


def _before(
    store: Store,
    config: SessionConfig,
    crew: Crew,
    parent: Manifest | None,
    one: _Known,
    made: Sequence[Manifest],
    clock: _Clock,
    stage: Stage,
) -> float | None:
    """Accuracy on the new task by the version before, which has not learned it: how much of zero-shot is kept."""
    if parent is None or not parent.tasks:
        return one.figures.zero_shot
    name = one.job.data.name
    accuracy = parent.figures["accuracy"]
    if name in accuracy and any(each.version == parent.version for each in made):
        return float(accuracy[name])  # measured minutes ago, on the very same pictures
    with clock("evaluate"), stage(f"{name} by version {parent.version}") as update:
        crew.hold(parent)
        experts = task_experts(store, parent)
        snapshot = _snapshot(f"version-{parent.version}", config, experts, buffers_of(store, parent))
        return crew.score([measure.ask("vote", one.job.data, one.pictures)], snapshot, update)[0]


def _snapshot(key: str, config: SessionConfig, experts: list[TaskExpert], buffers: dict[str, Any]) -> Snapshot:
    return Snapshot(key, tuple(experts), buffers, calibrated(experts, config.vote))


def _rescalers(
    store: Store,
    config: SessionConfig,
    crew: Crew,
    key: str,
    parent: Manifest | None,
    one: _Known,
    clock: _Clock,
    stage: Stage,
) -> ObjectRef | None:
    """The rescalers that the task gets in the state called `key`; None where they are those that fusing gives."""
    if not rescales(config):
        return None
    with clock("rescale"), stage(f"rescaling {one.job.data.name}") as update:
        found = store.find(key, RESCALERS)
        if found is None:
            trained = crew.rescalers(parent, one.job.data, one.delta, one.buffers, update)
            found = put_first(store, key, RESCALERS, {"rescalers": trained})
    return found


def _draft(config: SessionConfig, parent: Manifest | None, one: _Known, fused: Fused, before: float | None) -> Manifest:
    """The new manifest, all but its figures."""
    task = one.job.data
    version = parent.version + 1 if parent else 1
    card = TaskCard(
        name=task.name,
        uid=version,
        classes=list(task.classes),
        templates=list(task.templates),
        source=task.source,
        fingerprint=task.fingerprint,
        method=config.method,
        train_key=one.job.key,
        learned_in=version,
        pictures={"train": len(task.train), "test": len(task.test)},
        figures={"zero_shot": one.figures.zero_shot, "own": one.figures.own, "before": before},
        settings={**training_settings(config), "test_share": config.test_share},
    )
    kept = list(parent.tasks) if parent else []
    objects = {name: ref for name, ref in (parent.objects if parent else {}).items() if name.startswith(TASK_OBJECTS)}
    objects |= {f"prototypes-{version}": one.prototypes, f"domain-{version}": one.domain}
    objects |= {f"tests-{version}": one.tests, **fused.objects}
    if one.buffers is not None:
        objects[f"buffers-{version}"] = one.buffers
    settings = config.model_dump(exclude=PLACEMENT)
    return Manifest(
        version=version,
        parent=parent.version if parent else None,
        kind="learn",
        tasks=[*kept, card],
        objects=objects,
        state={"method": fused.meta, "trained": one.job.key},
        settings=settings,
        message=f"learned {task.name}",
    )


def _measured(
    store: Store,
    config: SessionConfig,
    crew: Crew,
    draft: Manifest,
    fused: Fused,
    one: _Known,
    later: dict[str, tuple[TaskData, Split]],
    update: Update,
) -> Manifest:
    snapshot = _snapshot(fused.key, config, task_experts(store, draft), buffers_of(store, draft))
    pictures = measure.learned_pictures(store, draft) | {one.job.data.name: one.pictures}
    learned = {card.name: (card, pictures[card.name]) for card in draft.tasks if card.name in pictures}
    accuracy = measure.accuracies(crew, snapshot, learned, later, update)
    cards = [
        card.model_copy(
            update={"figures": measure.card_figures(card, accuracy, fused, measure.fixed_figures(card.figures))}
        )
        for card in draft.tasks
    ]
    state = {**draft.state, **snapshot.calibrated.to_state()}
    return draft.model_copy(
        update={
            "tasks": cards,
            "state": state,
            "figures": {"accuracy": accuracy, "losses": {one.job.data.name: one.losses}},
        }
    )
