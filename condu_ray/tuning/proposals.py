"""What to try next: Optuna's samplers, asked and told one configuration at a time; none is proposed twice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from condu_ray.tuning.objectives import SENSE
from condu_ray.tuning.records import Record
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.space import Choice, Entry, Integer, Log, Settings, grid, told_apart

TRIES = 200
"""Proposals in a row that may be known already before the space is taken for exhausted."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def distribution(entry: Entry) -> BaseDistribution:
    if isinstance(entry, Choice):
        return CategoricalDistribution(entry.choice)
    if isinstance(entry, Integer):
        return IntDistribution(*entry.integer)
    if isinstance(entry, Log):
        return FloatDistribution(*entry.log, log=True)
    return FloatDistribution(*entry.uniform)


class Proposals:
    """Proposes configurations of a sweep. Numbers count from 0, in the order proposed.

    replayed: configurations of an earlier run that are to be proposed again first, in their order. known: those that
    are told as they ended, and not proposed again.
    """

    def __init__(self, sweep: Sweep, replayed: Sequence[Settings] = (), known: Sequence[Record] = ()) -> None:
        self._space = {name: distribution(entry) for name, entry in sweep.space.items()}
        self._left = sweep.most - len(known)
        self._names = sweep.goals.names
        self._grid = grid(sweep.space) if sweep.search == "grid" else None  # type: ignore[arg-type]  # checked by Sweep
        self._replayed = list(replayed)
        self._given: set[str] = set()
        self._asked: dict[int, optuna.Trial] = {}
        # Moved on by what is known, or a run that goes on would draw the first run's numbers again.
        seed = sweep.config.seed + len(replayed) + len(known)
        best, least = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
        directions = [best if SENSE[name] > 0 else least for name in self._names]
        self.study = optuna.create_study(sampler=_sampler(sweep.search, seed), directions=directions)
        self._number = 0
        for record in known:
            self._given.add(told_apart(record.settings))
            self._number = max(self._number, record.number + 1)
            self.study.add_trial(self._frozen(record))

    def ask(self) -> tuple[int, Settings] | None:
        """The next configuration; None once there are no more to try."""
        if self._left <= 0:
            return None
        for _ in range(TRIES):
            if self._replayed:
                self.study.enqueue_trial(self._replayed.pop(0))
            elif self._grid is not None:
                point = next(self._grid, None)
                if point is None:
                    return None
                if told_apart(point) in self._given:
                    continue
                self.study.enqueue_trial(point)
            trial = self.study.ask(self._space)
            settings = dict(trial.params)
            if told_apart(settings) not in self._given:
                break
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            return None
        self._given.add(told_apart(settings))
        self._left -= 1
        number, self._number = self._number, self._number + 1
        self._asked[number] = trial
        return number, settings

    def report(self, number: int, budget: int, value: float) -> None:
        """What the first objective is after a part of the work."""
        self._asked[number].report(value, budget)

    def tell(self, number: int, values: Sequence[float] | None, whole: bool = True) -> None:
        """How a configuration ended; values None: it failed. whole: false where it was stopped early."""
        trial = self._asked.pop(number)
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        elif whole or len(self._names) > 1:
            self.study.tell(trial, list(values))
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def _frozen(self, record: Record) -> optuna.trial.FrozenTrial:
        return create_trial(
            state=TrialState.FAIL if record.values is None else TrialState.COMPLETE,
            params=record.settings,
            distributions=self._space,
            values=None if record.values is None else list(record.values),
        )


def _sampler(search: str, seed: int) -> optuna.samplers.BaseSampler:
    if search != "optuna":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def importances(sweep: Sweep, records: Sequence[Record]) -> dict[str, float]:
    """How much of what the first objective does each setting explains (PED-ANOVA), sum 1; {} where nothing differs."""
    done = [record for record in records if record.values is not None]
    if len(done) < 2 or len({record.values[0] for record in done if record.values}) < 2:
        return {}
    study = Proposals(sweep, known=done).study
    sense = SENSE[sweep.goals.names[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that small targets are taken for good
        found = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
            target=lambda trial: -sense * trial.values[0],
        )
    return {name: float(value) for name, value in found.items()}
