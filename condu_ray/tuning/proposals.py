"""What to try next: Optuna's samplers, asked and told one configuration at a time; none is proposed twice."""

from __future__ import annotations

import itertools
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
from optuna.trial import FrozenTrial, TrialState, create_trial

from condu_ray.tuning.objectives import SENSE
from condu_ray.tuning.records import Record
from condu_ray.tuning.settings import Sweep
from condu_ray.tuning.space import Choice, Entry, Integer, Log, Settings, configuration_key, grid

MEMORY = 256
"""Trials that the sampler looks back on, up to twice as many between two clearings: its time grows with them."""

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
    """Proposes configurations of a sweep. New ones count on from the highest number on record, 0 where there is none.

    replayed: trials of an earlier run that are to be proposed again first, in their order. known: those that are told
    as they ended, and not proposed again.
    """

    def __init__(self, sweep: Sweep, replayed: Sequence[Record] = (), known: Sequence[Record] = ()) -> None:
        self._space = {name: distribution(entry) for name, entry in sweep.space.items()}
        self._left = sweep.most - len(known)
        self._names = sweep.goals.names
        points = grid(sweep.space) if sweep.search == "grid" else ()  # type: ignore[arg-type]  # checked by Sweep
        self._draws = sweep.search != "grid"
        self._replayed = [record.settings for record in replayed]
        self._given = {configuration_key(record.settings) for record in known}
        again = self._given | {configuration_key(settings) for settings in self._replayed}
        self._grid = [point for point in itertools.islice(points, sweep.most) if configuration_key(point) not in again]
        self._asked: dict[int, optuna.Trial] = {}
        self._number = 0
        # Not their count: a run may be killed while a trial of a lower number has nothing on record yet.
        self._first_new = max((record.number + 1 for record in (*known, *replayed)), default=0)
        # Moved on by what is known, or a run that goes on would draw the first run's numbers again.
        self._sampler = _sampler(sweep.search, sweep.config.seed + len(replayed) + len(known))
        self._study = self._remembering([self._frozen(record.settings, record.values) for record in known])

    def ask(self) -> tuple[int, Settings] | None:
        """The next configuration; None once there are no more to try."""
        if self._left <= 0:
            return None
        for _ in range(TRIES):
            if self._replayed:
                self._study.enqueue_trial(self._replayed.pop(0))
            else:
                self._number = max(self._number, self._first_new)
                if self._grid:
                    self._study.enqueue_trial(self._grid.pop(0))
                elif not self._draws:
                    return None
            trial = self._study.ask(self._space)
            settings = dict(trial.params)
            if configuration_key(settings) not in self._given:
                break
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            return None
        self._given.add(configuration_key(settings))
        self._left -= 1
        number, self._number = self._number, self._number + 1
        self._asked[number] = trial
        return number, settings

    def report(self, number: int, budget: int, value: float) -> None:
        """What the first objective is after a part of the work."""
        if len(self._names) == 1:  # Optuna takes no parts of several
            self._asked[number].report(value, budget)

    def tell(self, number: int, values: Sequence[float] | None, whole: bool = True) -> None:
        """How a configuration ended; values None: it failed. whole: false where it was stopped early."""
        trial = self._asked.pop(number)
        if trial.study is not self._study:
            self._study.add_trial(self._frozen(dict(trial.params), values))
        elif values is None:
            self._study.tell(trial, state=TrialState.FAIL)
        elif whole or len(self._names) > 1:
            self._study.tell(trial, list(values))
        else:
            self._study.tell(trial, state=TrialState.PRUNED)
        self._remembered += 1
        if self._remembered >= 2 * MEMORY:
            self._study = self._remembering(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _remembering(self, trials: Sequence[FrozenTrial]) -> optuna.Study:
        """A study of these; of many, a quarter of the memory goes to the best and the rest to the newest."""
        study = study_of(self._names, self._sampler)
        if len(trials) > MEMORY:
            ranked = sorted(trials, key=lambda trial: -trial.values[0] if trial.values else float("inf"))
            best = ranked[: MEMORY // 4]
            kept = {id(trial) for trial in best}
            newest = [trial for trial in trials if id(trial) not in kept][-(MEMORY - len(best)) :]
            trials = [*best, *newest]
        study.add_trials(trials)
        self._remembered = len(trials)
        return study

    def _frozen(self, settings: Settings, values: Sequence[float] | None) -> FrozenTrial:
        return frozen(self._space, settings, values)


def study_of(names: Sequence[str], sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
    """An empty study of these objectives."""
    best, least = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    return optuna.create_study(sampler=sampler, directions=[best if SENSE[name] > 0 else least for name in names])


def frozen(space: dict[str, BaseDistribution], settings: Settings, values: Sequence[float] | None) -> FrozenTrial:
    """A trial that has ended; values None: it failed."""
    state = TrialState.FAIL if values is None else TrialState.COMPLETE
    told = None if values is None else list(values)
    return create_trial(state=state, params=settings, distributions=space, values=told)


def _sampler(search: str, seed: int) -> optuna.samplers.BaseSampler:
    if search != "optuna":
        return optuna.samplers.RandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # All settings at once: sees how they go together, and costs a third of one after another.
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def importances(sweep: Sweep, records: Sequence[Record]) -> dict[str, float]:
    """How much of what trials reached each setting explains (PED-ANOVA), sum 1; {} where nothing differs."""
    done = [(record.settings, record.reached) for record in records if record.reached is not None]
    # Places, not values: those of trials that were stopped early are of another kind. Only their order counts.
    places = {reached: float(place) for place, reached in enumerate(sorted({reached for _, reached in done}))}
    if len(places) < 2:
        return {}
    space = {name: distribution(entry) for name, entry in sweep.space.items()}
    study = study_of(sweep.goals.names[:1])
    study.add_trials([frozen(space, settings, [places[reached]]) for settings, reached in done])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that small targets are taken for good
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(value) for name, value in found.items()}
