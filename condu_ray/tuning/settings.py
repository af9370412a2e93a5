"""What a sweep is asked to do: one YAML file, checked whole before anything starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from condu_ray.config import SessionConfig
from condu_ray.engine.keys import EXECUTION, PLACEMENT
from condu_ray.errors import ConfigError, nearest, without_credentials
from condu_ray.methods import registry
from condu_ray.sources import flatten, nest, read_yaml, resolve
from condu_ray.tuning.objectives import SENSE, Goals, Name
from condu_ray.tuning.space import Choice, Entry, Integer, check_names, check_values, kind_of, size

MOST_TRIALS = 1_000_000


class Sweep(BaseModel):
    """session: the settings that stay, as a file of `learn` has them. space: dotted name -> entry (space.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    session: dict[str, Any] = Field(description="settings that stay, as in a file for `learn --config`")
    space: dict[str, Entry] = Field(min_length=1, description="setting -> values to try")
    trials: int = Field(default=16, ge=1, le=MOST_TRIALS, description="most configurations to try; grid: unset, all")
    search: Literal["optuna", "random", "grid"] = Field(
        default="optuna", description="optuna: tree-structured Parzen estimator; grid: each combination in turn"
    )
    early_stopping: Literal["asha", "none"] = Field(
        default="asha", description="asha: trials that lag behind others at the same point end early (training only)"
    )
    reduction: int = Field(default=3, ge=2, le=16, description="asha: one trial in so many goes on at each rung")
    objectives: tuple[Name, ...] = Field(
        default=(), description="unset: accuracy of a single task, else last; several: their Pareto front"
    )
    zero_shot_penalty: float = Field(
        default=0.0, ge=0, le=100, description="points that an accuracy loses for each point of zero-shot loss"
    )
    latency_ms: float | None = Field(
        default=None, gt=0, description="configurations that take longer a picture do not count (inference only)"
    )
    labels: Literal["task", "candidates", "union"] | None = Field(
        default=None, description="how learned tasks are asked; unset: task where training is searched, else union"
    )
    validation_share: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="of the training pictures, that trials are measured on (stratified, seeded)",
    )

    @field_validator("space")
    @classmethod
    def _known(cls, space: dict[str, Entry]) -> dict[str, Entry]:
        check_names(space)
        kind_of(space)
        return space

    @field_validator("objectives", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("objectives")
    @classmethod
    def _once(cls, names: tuple[Name, ...]) -> tuple[Name, ...]:
        if len(set(names)) < len(names):
            raise ValueError("an objective is given twice")
        return names

    @model_validator(mode="after")
    def _together(self) -> Sweep:
        if self.search == "grid" and not all(isinstance(each, Choice | Integer) for each in self.space.values()):
            raise ValueError("search grid needs entries of the kinds choice and integer")
        if self.kind == "training" and (self.latency_ms is not None or "latency" in self.objectives):
            raise ValueError("latency follows from the vote: search for settings of the vote (vote.k ...) under it")
        if self.kind == "inference" and self.labels == "task":
            raise ValueError("labels task asks no vote: use candidates or union")
        if self.kind == "inference" and "accuracy" in self.objectives:
            raise ValueError("objective accuracy asks no vote: use last or average")
        if self.objectives and SENSE[self.objectives[0]] < 0:
            raise ValueError(
                f"the first objective chooses the best, so it must be an accuracy (not {self.objectives[0]})"
            )
        return self

    @property
    def kind(self) -> Literal["training", "inference"]:
        return kind_of(self.space)

    @cached_property
    def config(self) -> SessionConfig:
        """The settings that stay, checked; the environment stands above the file, as for `learn`."""
        given, above = flatten(self.session), _from_environment()
        return resolve({name: value for name, value in given.items() if name not in above})[0]

    @property
    def goals(self) -> Goals:
        """The objectives; by default the accuracy of a single task as trained, or `last` where there is none."""
        several = len(self.config.tasks) > 1 or self.kind == "inference" or self.learner is not None
        return Goals(
            self.objectives or (("last",) if several else ("accuracy",)), self.zero_shot_penalty, self.latency_ms
        )

    @property
    def learner(self) -> str | None:
        """A method that trials train and that has a training of its own, so that no accuracy is measured on the way."""
        searched = self.space.get("method")
        names = searched.corners() if searched else [self.config.method]
        return next((str(name) for name in names if registry.learner(str(name))), None)

    @property
    def asked(self) -> Literal["task", "candidates", "union"]:
        return self.labels or ("task" if self.kind == "training" else "union")

    @property
    def stops_early(self) -> bool:
        return self.kind == "training" and self.early_stopping == "asha" and len(self.goals.names) == 1

    @property
    def most(self) -> int:
        """How many configurations are tried at most: no more than there are; of a grid all, unless told otherwise."""
        asked = MOST_TRIALS if self.search == "grid" and "trials" not in self.model_fields_set else self.trials
        return int(min(asked, size(self.space)))

    def terms(self) -> dict[str, Any]:
        """What must stay the same for as long as a sweep's folder is used: all but how many trials."""
        return {
            **self.model_dump(mode="json", exclude={"trials", "session"}),
            "session": _lasting(self.config),
            "order": list(self.config.tasks),
        }


def with_defaults(terms: dict[str, Any]) -> dict[str, Any]:
    """`terms` as they were written, and the defaults of what was no entry or setting then."""
    entries = {name: field.default for name, field in Sweep.model_fields.items() if not field.is_required()}
    known = {name: value for name, value in entries.items() if name != "trials"}
    found = {**json.loads(json.dumps(known)), **terms}
    return {**found, "session": {**_lasting(SessionConfig()), **found["session"]}}


def _from_environment() -> set[str]:
    """Dotted names of the settings that the environment gives."""
    return {name for name, origin in resolve({})[1].items() if origin == "environment"}


def _lasting(config: SessionConfig) -> dict[str, Any]:
    """The session's settings by dotted name, but for where and how it runs."""
    settings = flatten(config.model_dump(mode="json")).items()
    return {name: value for name, value in settings if name == "tasks" or name not in PLACEMENT | EXECUTION}


def read_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep file. Raises ConfigError that lists every fault."""
    content = read_yaml(path, "write session:, space: and what else docs/sweeps.md has")
    known = Sweep.model_fields
    faults = [f"no entry '{name}' ({nearest(str(name), known)})" for name in content if name not in known]
    try:
        sweep = Sweep.model_validate({name: value for name, value in content.items() if name in known})
    except ValidationError as error:
        faults += _faults(error)
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults), "docs/sweeps.md has every entry")
    _check(sweep, path)
    return sweep


def _check(sweep: Sweep, path: Path) -> None:
    """What needs the settings that stay."""
    config, goals = sweep.config, sweep.goals
    info = config.system
    faults = []
    if not config.tasks:
        faults.append("session.tasks names no task")
    if sweep.kind == "training" and not info.trains:
        faults.append(f"method {config.method} trains nothing")
    if sweep.kind == "inference" and info.single:
        faults.append(f"method {config.method} is one model: nobody votes")
    if goals.names == ("accuracy",) and goals.penalty:
        faults.append("zero_shot_penalty needs the objective last or average")
    if goals.unseen and len(config.tasks) == 1:
        faults.append(
            "zero-shot loss and average need two tasks or more, the later ones unseen by the earlier versions"
        )
    if "accuracy" in goals.names and (len(config.tasks) > 1 or len(goals.names) > 1):
        faults.append("objective accuracy is of a single task, before it is fused: use last or average")
    elif "accuracy" in goals.names and sweep.asked != "task":
        faults.append(f"labels {sweep.asked} asks what was fused, and objective accuracy what was trained: use last")
    elif "accuracy" in goals.names and sweep.learner:
        faults.append(f"objective accuracy looks into a training, and {sweep.learner} trains in its own way: use last")
    try:
        check_values(sweep.space, config)
    except ValidationError as error:
        faults += _faults(error)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError(f"{path}: " + "; ".join(faults), "docs/sweeps.md says what goes together")


def _faults(error: ValidationError) -> list[str]:
    found = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if str(part) not in ("Uniform", "Log", "Integer", "Choice"))
        message = fault["msg"].removeprefix("Value error, ")
        found.append(f"{place}: {message}" if place else message)
    return found


def best_session(sweep: Sweep, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `learn --config` takes: the settings that stay, as they were given or as the environment had them, and those
    that were found. A `tracking` that names a password is left out: the file is kept where others may read it."""
    told = flatten(sweep.config.model_dump(mode="json"))
    environment = {name: told[name] for name in _from_environment() if name == "tasks" or name not in PLACEMENT}
    given = {name: value for name, value in flatten(sweep.session).items() if not _secret(name, value)}
    return nest({**given, **environment, **settings})


def _secret(name: str, value: Any) -> bool:
    return name == "tracking" and isinstance(value, str) and value != without_credentials(value)
