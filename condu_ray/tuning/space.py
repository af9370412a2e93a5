"""A search space: which values a setting may take, as written in YAML, checked against the setting itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from condu_ray.config import SessionConfig, fields
from condu_ray.engine.keys import EXECUTION, PLACEMENT
from condu_ray.errors import ConfigError, nearest
from condu_ray.sources import flatten, from_dotted

Scalar = bool | int | float | str | None

NOT_SEARCHED = PLACEMENT | EXECUTION | {"model", "pretrained", "seed", "test_share", "eval_pictures"}
"""Settings that say where a session runs, what it starts from or how it is measured."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Uniform(_Entry):
    """Any number of a range, all alike."""

    uniform: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        _rising(*self.uniform)
        return self

    def corners(self) -> list[Scalar]:
        return list(self.uniform)


class Log(_Entry):
    """Any number of a range, all orders of magnitude alike."""

    log: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> Log:
        _rising(*self.log)
        if self.log[0] <= 0:
            raise ValueError(f"a logarithmic range starts above 0 (found {self.log[0]:g})")
        return self

    def corners(self) -> list[Scalar]:
        return list(self.log)


class Integer(_Entry):
    """Any whole number of a range, both ends included."""

    integer: tuple[int, int]

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        _rising(*self.integer)
        return self

    def corners(self) -> list[Scalar]:
        return list(self.integer)


class Choice(_Entry):
    """One of a list."""

    choice: tuple[Scalar, ...]

    @model_validator(mode="after")
    def _several(self) -> Choice:
        if len(self.choice) < 2 or len({_typed(value) for value in self.choice}) < len(self.choice):
            raise ValueError("a choice needs two or more values, each once")
        return self

    def corners(self) -> list[Scalar]:
        return list(self.choice)


KINDS: dict[str, type[_Entry]] = {"uniform": Uniform, "log": Log, "integer": Integer, "choice": Choice}


def _rising(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"a range goes from a smaller number to a larger (found {low:g} to {high:g})")


def _typed(value: Scalar) -> tuple[str, Scalar]:
    return type(value).__name__, value


def _entry(value: Any) -> Any:
    """Chooses the kind of entry by its one key."""
    if isinstance(value, _Entry):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"write one of {{uniform: [low, high]}}, {{log: ...}}, {{integer: ...}}, {{choice: [...]}} ({value!r})"
        )
    (kind,) = value
    if kind not in KINDS:
        raise ValueError(f"no kind of entry '{kind}' ({nearest(str(kind), KINDS)})")
    return KINDS[kind].model_validate(value)


Entry = Annotated[Uniform | Log | Integer | Choice, BeforeValidator(_entry)]
Space = Mapping[str, Entry]
Settings = dict[str, Scalar]
"""Dotted name -> value."""


def configuration_key(settings: Mapping[str, Scalar]) -> str:
    """The same text for the same configuration alone."""
    return json.dumps(dict(settings), sort_keys=True)


def kind_of(space: Space) -> Literal["training", "inference"]:
    """`inference` where the space holds settings of the vote alone. Raises ValueError for both kinds at once."""
    votes = [name for name in space if name.startswith("vote.")]
    if votes and len(votes) < len(space):
        other = next(name for name in space if name not in votes)
        raise ValueError(
            f"{votes[0]} is searched by answering again and {other} by training: search for one kind at a time, the "
            "settings of training first"
        )
    return "inference" if votes else "training"


def check_names(space: Space) -> None:
    """Raises ValueError that names the first entry which is no setting, or one that cannot be searched for."""
    known = [name for name, _ in fields() if name not in NOT_SEARCHED]
    for name in space:
        if name in NOT_SEARCHED:
            raise ValueError(f"{name} says where a session runs or how it is measured: put it under session")
        if name not in known:
            raise ValueError(f"no setting '{name}' ({nearest(name, known)})")


def check_values(space: Space, base: SessionConfig) -> None:
    """Raises ValueError for a value that its setting does not take: each end of a range, and each choice."""
    own = flatten(base.model_dump())
    for name, entry in space.items():
        for value in entry.corners():
            found = flatten(from_dotted({**own, name: value}).model_dump())[name]
            if isinstance(entry, Integer) and type(found) is not int:
                raise ValueError(f"{name} is not a whole number: use uniform or log")
            if isinstance(entry, Uniform | Log) and type(found) is not float:
                raise ValueError(f"{name} is a {type(found).__name__}: use integer or choice")


def applied(base: SessionConfig, settings: Mapping[str, Scalar]) -> SessionConfig:
    """`base` with these values. Raises ConfigError where they do not go together."""
    try:
        return from_dotted({**flatten(base.model_dump()), **settings})
    except ValidationError as error:
        said = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise ConfigError(said, "narrow the space") from None


def grid(space: Mapping[str, Choice | Integer]) -> Iterator[Settings]:
    """Every combination, the last entry changing fastest."""
    if not space:
        yield {}
        return
    (name, entry), *others = space.items()
    # Not itertools.product, which writes out each range first, however long.
    for value in entry.choice if isinstance(entry, Choice) else range(entry.integer[0], entry.integer[1] + 1):
        for rest in grid(dict(others)):
            yield {name: value, **rest}


def size(space: Space) -> float:
    """How many settings there are to try; infinite where a range is continuous."""
    total = 1.0
    for entry in space.values():
        if isinstance(entry, Choice):
            total *= len(entry.choice)
        elif isinstance(entry, Integer):
            total *= entry.integer[1] - entry.integer[0] + 1
        else:
            return math.inf
    return total
