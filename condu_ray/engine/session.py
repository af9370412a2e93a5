"""One session, whoever does its work: features, train, rescale, fuse, evaluate, commit.

The result of each step is stored under a name made of the step's input (engine/keys.py), so a session that was killed
is given again and goes on after the last finished step. Only the commit changes what readers see. Where another session
commits first, the task is fused and evaluated again onto that version, without being trained again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

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
from condu_ray.methods.stored import task_objects
from condu_ray.methods.training import buffers_in
from condu_ray.sources import flatten
from condu_ray.store import Manifest, ObjectRef, Store, TaskCard, put_first
from condu_ray.store.history import newest
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

ToCome = Mapping[str, tuple[TaskData, Split]]
"""Tasks of this session that are learned later: name -> (task, its test pictures)."""


@dataclass(frozen=True)
class _Ready:
    """A task that is trained, and what was computed of it once, whatever version it is added to."""

    job: Job
    prototypes: ObjectRef
    domain: ObjectRef
    tests: ObjectRef
    pictures: Split
    baseline: measure.Baseline
    delta: ObjectRef | None
    buffers: ObjectRef | None
    losses: list[tuple[int, float]]

    def refs(self) -> list[ObjectRef]:
        """The objects that no version names yet."""
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
    missing = to_learn(store, config, tasks)
    return _Session(store, config, crew, stage).learn(missing) if missing else []


class _Session:
    """The steps of one `learn` on one store, the versions it has made, and the seconds of the version under way."""

    def __init__(self, store: Store, config: SessionConfig, crew: Crew, stage: Stage) -> None:
        self._store, self._config, self._crew, self._stage = store, config, crew, stage
        self._made: list[Manifest] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def _step(self, name: str, shown: str) -> Iterator[Update]:
        """Shows the block as `shown`, and adds the seconds it took to those of the step `name`."""
        begun = time.monotonic()
        with self._stage(shown) as update:
            yield update
        self._seconds[name] = round(self._seconds.get(name, 0.0) + time.monotonic() - begun, 3)

    def learn(self, tasks: Sequence[TaskData]) -> list[Manifest]:
        """Trains the tasks, then adds them one after another. None of them is in the newest version."""
        ready = self._trained(tasks)
        keeper = Keeper(self._store, [ref.path for each in ready for ref in each.refs()])
        for place, one in enumerate(ready):
            keeper.touch()
            to_come = {each.job.data.name: (each.job.data, each.pictures) for each in ready[place + 1 :]}
            manifest = self._add(one, to_come)
            if manifest is not None:
                self._made.append(manifest)
            self._seconds = {}
        return self._made

    def _trained(self, tasks: Sequence[TaskData]) -> list[_Ready]:
        store, info = self._store, self._config.system
        jobs = _jobs(store, self._config, tasks)
        if info.on_features:
            for job in jobs:
                with self._step("features", f"features of {job.data.name}") as update:
                    self._features(job.data, update)
        if info.trains:
            with self._step("train", "training") as update:
                self._crew.train(jobs, update)
            for job in jobs:
                with suppress(StoreError):  # gc takes what is left
                    store.discard_work(job.key)
        return [self._ready(job) for job in jobs]

    def _ready(self, job: Job) -> _Ready:
        store, task = self._store, job.data
        with self._step("features", f"features of {task.name}") as update:
            prototypes, domain = self._features(task, update)
            tests, pictures = self._tests(task)
        delta = store.find(job.key, "delta") if job.key else None
        trained = store.get(delta) if delta else {}
        changed = buffers_in(trained)
        buffers = store.put(content_key("buffers", changed), "buffers", changed) if changed else None
        with self._step("evaluate", f"{task.name} before fusion") as update:
            baseline = measure.baseline(self._crew, task, pictures, delta, buffers, update)
        losses = [(int(step), float(loss)) for step, loss in trained.get("losses", ())]
        return _Ready(job, prototypes, domain, tests, pictures, baseline, delta, buffers, losses)

    def _features(self, task: TaskData, update: Update) -> tuple[ObjectRef, ObjectRef]:
        """Where the task's prototypes and its domain are. Methods that learn on features find them beside."""
        store, config = self._store, self._config
        key = features_key(store.header, config, task)
        prototypes, domain = store.find(key, "prototypes"), store.find(key, "domain")
        lacks = config.system.on_features and store.find(key, FEATURES) is None
        if prototypes is None or domain is None or lacks:
            features, domains, lengths = self._crew.features(task.train, update)
            if lacks:
                put_first(store, key, FEATURES, {"raw": features * lengths[:, None]})
            held = held_out_indices(task.train.labels, config.seed)
            rest = np.setdiff1d(np.arange(len(task.train)), held)
            labels, classes = task.train.labels[rest], len(task.classes)
            sums = FeatureSums.zero(classes, features.shape[1]).add(features[rest], labels)
            made = make_prototypes(sums, self._crew.text_means(task.classes, task.templates), features[held])
            prototypes = put_first(store, key, "prototypes", made.arrays())
            own = make_domain(domains[rest], labels, classes, domains[held], task.train.labels[held])
            domain = put_first(store, key, "domain", own.arrays())
        return prototypes, domain

    def _tests(self, task: TaskData) -> tuple[ObjectRef, Split]:
        """Where the list of the task's test pictures is, and the pictures."""
        pictures = measure.test_pictures(task, self._config)
        packed = measure.pack_pictures(pictures)
        return self._store.put(content_key("tests", packed), "tests", packed), pictures

    def _add(self, one: _Ready, to_come: ToCome) -> Manifest | None:
        """Fuses the task onto the newest version and commits; onto the next newest if another session was faster."""
        for _ in range(MOST_RACES):
            parent = newest(self._store)
            if not to_learn(self._store, self._config, [one.job.data]):
                return None  # another session learned the very same task meanwhile
            try:
                manifest, rescaling = self._next(parent, one, to_come)
                self._store.commit(manifest)
            except StoreError:
                if newest(self._store) == parent:
                    raise
                continue  # what this try began from may be gone, too
            self._tidy(one, rescaling)
            return manifest
        raise StoreError(f"{MOST_RACES} other sessions were faster in a row", "run the same command again")

    def _next(self, parent: Manifest | None, one: _Ready, to_come: ToCome) -> tuple[Manifest, str]:
        """(the version after `parent`, whose objects are in the store; the key of the task's trained rescalers)"""
        config, task = self._config, one.job.data
        _check_start(config, parent, one)
        before = self._before(parent, one)
        steps, given = steps_of(task, config), one.delta.sha256 if one.delta else ""
        key = rescaling = state_key(parent, config, task.name, given, steps)
        rescalers = self._rescalers(rescaling, parent, one)
        if rescalers is not None:
            key = state_key(parent, config, task.name, f"{given} {rescalers.sha256}", steps)
        with self._step("fuse", f"fusing {task.name}"):
            fused = self._crew.fuse(key, parent, task.name, one.delta, rescalers)
        draft = _draft(config, parent, one, fused, before)
        with self._step("evaluate", f"evaluating version {draft.version}") as update:
            manifest = self._measured(draft, fused, one, to_come, update)
        return manifest.model_copy(update={"seconds": self._seconds}), rescaling

    def _before(self, parent: Manifest | None, one: _Ready) -> float | None:
        """Accuracy on the new task by the version before, which has not learned it: how much of zero-shot is kept."""
        if parent is None or not parent.tasks:
            return one.baseline.zero_shot
        name = one.job.data.name
        accuracy = parent.figures["accuracy"]
        if name in accuracy and any(each.version == parent.version for each in self._made):
            return float(accuracy[name])  # measured minutes ago, on the very same pictures
        with self._step("evaluate", f"{name} by version {parent.version}") as update:
            self._crew.hold(parent)
            snapshot = self._snapshot(f"version-{parent.version}", parent)
            return self._crew.score([measure.ask("vote", one.job.data, one.pictures)], snapshot, update)[0]

    def _snapshot(self, key: str, manifest: Manifest) -> Snapshot:
        """What answers in a version besides its state, calibrated for this session's vote."""
        experts = task_experts(self._store, manifest)
        return Snapshot(key, tuple(experts), buffers_of(self._store, manifest), calibrated(experts, self._config.vote))

    def _rescalers(self, key: str, parent: Manifest | None, one: _Ready) -> ObjectRef | None:
        """The task's trained rescalers, stored under `key`; None where the task has those that fusing gives."""
        if not rescales(self._config):
            return None
        with self._step("rescale", f"rescaling {one.job.data.name}") as update:
            found = self._store.find(key, RESCALERS)
            if found is None:
                trained = self._crew.rescalers(parent, one.job.data, one.delta, one.buffers, update)
                found = put_first(self._store, key, RESCALERS, {"rescalers": trained})
        return found

    def _measured(self, draft: Manifest, fused: Fused, one: _Ready, to_come: ToCome, update: Update) -> Manifest:
        """The draft with the figures of every task that can be measured, and the thresholds of its vote."""
        snapshot = self._snapshot(fused.key, draft)
        pictures = measure.learned_pictures(self._store, draft) | {one.job.data.name: one.pictures}
        learned = {card.name: (card, pictures[card.name]) for card in draft.tasks if card.name in pictures}
        accuracy = measure.accuracies(self._crew, snapshot, learned, to_come, update)
        cards = [
            card.model_copy(
                update={"figures": measure.card_figures(card, accuracy, fused, measure.fixed_figures(card.figures))}
            )
            for card in draft.tasks
        ]
        return draft.model_copy(
            update={
                "tasks": cards,
                "state": {**draft.state, **snapshot.calibrated.to_state()},
                "figures": {"accuracy": accuracy, "losses": {one.job.data.name: one.losses}},
            }
        )

    def _tidy(self, one: _Ready, rescaling: str) -> None:
        """Removes what a task's training left: it is in the version. What cannot be removed now is left to gc."""
        store, config = self._store, self._config
        done = {
            (one.job.key, "delta"): one.delta is not None,
            (features_key(store.header, config, one.job.data), FEATURES): config.system.on_features,
            (rescaling, RESCALERS): rescales(config),
        }
        for (key, name), is_there in done.items():
            if is_there:
                with suppress(StoreError):
                    store.discard(key, name)


def _jobs(store: Store, config: SessionConfig, tasks: Sequence[TaskData]) -> list[Job]:
    """The trainings of these tasks; by an ordered method the first starts from the newest version, each other from the
    one before."""
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


def _check_start(config: SessionConfig, parent: Manifest | None, one: _Ready) -> None:
    """The delta must still be there, and, for systems that go on from task to task, start where the model is now."""
    info = config.system
    moved = info.ordered and _origin(parent) != one.job.origin
    if moved or (info.trains and one.delta is None):
        raise StoreError(
            f"another session changed the store while {one.job.data.name} was learned",
            "run the same command again, it goes on from there",
        )


def _draft(config: SessionConfig, parent: Manifest | None, one: _Ready, fused: Fused, before: float | None) -> Manifest:
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
        figures={"zero_shot": one.baseline.zero_shot, "own": one.baseline.own, "before": before},
        settings={**training_settings(config), "test_share": config.test_share},
    )
    kept = list(parent.tasks) if parent else []
    objects = {f"prototypes-{version}": one.prototypes, f"domain-{version}": one.domain, f"tests-{version}": one.tests}
    if one.buffers is not None:
        objects[f"buffers-{version}"] = one.buffers
    return Manifest(
        version=version,
        parent=parent.version if parent else None,
        kind="learn",
        tasks=[*kept, card],
        objects={**task_objects(parent), **objects, **fused.objects},
        state={"method": fused.meta, "trained": one.job.key},
        settings=config.model_dump(exclude=PLACEMENT),
        message=f"learned {task.name}",
    )
