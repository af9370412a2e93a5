"""Where settings come from: a YAML file (nested), the environment (`CONDU_TRAIN__STEPS=500`), options (dotted names).

An option beats the environment, which beats the file, which beats what the store was made with, which beats the
default.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from condu_ray.config import SECTIONS, WATCHED, ServeConfig, SessionConfig, fields, fixed_by_store
from condu_ray.errors import ConfigError, nearest

SERVE_PREFIX = "CONDU_SERVE__"


def from_dotted(settings: Mapping[str, Any]) -> SessionConfig:
    """Settings from dotted names that are known to be valid; defaults elsewhere."""
    return SessionConfig.model_validate(nest(settings))


def resolve_serving(options: Mapping[str, Any]) -> ServeConfig:
    """Settings of `serve` from defaults, the environment (CONDU_SERVE__PORT) and options, which win.

    Raises ConfigError that lists every fault at once.
    """
    given = {name.upper(): value for name, value in os.environ.items() if name.upper().startswith(SERVE_PREFIX)}
    values: dict[str, Any] = {name.removeprefix(SERVE_PREFIX).lower(): value for name, value in given.items()}
    origin = dict.fromkeys(values, "environment") | dict.fromkeys(options, "option")
    values |= options
    if isinstance(origins := values.get("origins"), str):
        values["origins"] = tuple(each.strip() for each in origins.split(",") if each.strip())
    known = ServeConfig.model_fields
    faults = [
        f"no setting '{name}' (from {origin[name]}; {nearest(name, known)})" for name in values if name not in known
    ]
    try:
        config = ServeConfig.model_validate({name: value for name, value in values.items() if name in known})
    except ValidationError as error:
        faults += _faults(error, origin)
    if faults:
        raise ConfigError("; ".join(faults), "see `condu-ray serve --help` for names and limits")
    return config


def resolve_watched(settings: Mapping[str, Any]) -> ServeConfig:
    """Settings that running replicas take up: `user_config` in a Serve config file.

    Raises ConfigError for any other, and for values that are wrong.
    """
    faults = [f"no setting '{name}' ({nearest(name, WATCHED)})" for name in settings if name not in WATCHED]
    try:
        config = ServeConfig.model_validate({name: value for name, value in settings.items() if name in WATCHED})
    except ValidationError as error:
        faults += _faults(error, dict.fromkeys(settings, "user_config"))
    if faults:
        raise ConfigError("; ".join(faults), "mend `user_config` of Replica, and deploy again")
    return config


def resolve(
    options: Mapping[str, Any], file: Path | None = None, fixed: Mapping[str, Any] | None = None
) -> tuple[SessionConfig, dict[str, str]]:
    """Merges defaults, a YAML file, the environment and options (dotted names -> values).

    fixed: what an existing store was made with; it stands for the defaults, and another value is refused.
    Returns the settings and, for every dotted name, where its value came from.
    Raises ConfigError that lists every fault at once.
    """
    known = dict(fields())
    merged: dict[str, Any] = {}
    origin = dict.fromkeys(known, "default")
    layers = [(dict(fixed or {}), "store")]
    layers += [(_from_file(file), f"file {file}")] if file else []
    layers += [(_from_environment(), "environment"), (dict(options), "option")]
    faults: list[str] = []
    for layer, source in layers:
        for name, value in layer.items():
            if name in known:
                merged[name] = value
                origin[name] = source
            else:
                faults.append(f"no setting '{name}' (from {source}; {nearest(name, known)})")
    try:
        config = SessionConfig.model_validate(nest(merged))
    except ValidationError as error:
        faults += _faults(error, origin)
    if faults:
        raise ConfigError("; ".join(faults), "see `condu-ray learn --help` for names and limits")
    found = fixed_by_store(config)
    if other := [name for name, value in (fixed or {}).items() if found.get(name, value) != value]:
        raise ConfigError(
            "; ".join(
                f"{name} is {found[name]} (from {origin[name]}), but this store was made with {(fixed or {})[name]}"
                for name in other
            ),
            f"leave {', '.join(other)} out, or use another --store",
        )
    return config, origin


class _Loader(yaml.SafeLoader):
    """YAML that refuses a name given twice, where the plain loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{name}' is given twice", problem_mark=node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)

    def construct_whole_mapping(self, node: yaml.MappingNode) -> dict[Hashable, Any]:
        """At once, not in two steps as the plain loader does for mappings that hold themselves: these are refused."""
        return self.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_whole_mapping)


def _from_file(path: Path) -> dict[str, Any]:
    found = read_yaml(path, "write settings as 'name: value' lines")
    try:
        return flatten(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.mend) from None


def read_yaml(path: Path, form: str) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one. form: what to write where it holds something else.

    Raises ConfigError for what cannot be read, is no YAML, or gives a name twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", "give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: is not YAML ({line}{error.problem})", "mend that line") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML ({error})", "give a text file in UTF-8") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML lets through what Python says of a date that is none, a number too long, or brackets too deep.
        raise ConfigError(f"{path}: is not YAML ({str(error).splitlines()[0]})", "put that value in quotes") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}", form)
    return content


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Turns nested settings into dotted names; `tasks` stays one value, a section without content gives nothing.

    Raises ConfigError for a name that is there in both forms.
    """
    found: dict[str, Any] = {}
    for name, value in _pairs(nested):
        if name in found:
            raise ConfigError(f"{name} is given twice, nested and with dots", "leave one of them out")
        found[name] = value
    return found


def _pairs(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name != "tasks":
            yield from _pairs(value, f"{name}.")
        elif value is not None or name not in SECTIONS:
            yield name, value


def _from_environment() -> dict[str, Any]:
    source = EnvSettingsSource(
        cast(type[BaseSettings], SessionConfig), env_prefix="CONDU_", env_nested_delimiter="__", case_sensitive=False
    )
    try:
        nested = source()
    except SettingsError as error:
        raise ConfigError(f"environment: {error}", "mend that CONDU_ variable") from None
    for name in SECTIONS:
        if not isinstance(nested.get(name, {}), Mapping):
            variable = f"CONDU_{name.upper()}"
            raise ConfigError(f"environment: {variable} holds no settings", f"set {variable}__NAME=VALUE for each")
    found = flatten(nested)
    known = [*SECTIONS, *dict(fields())]
    for variable, value in os.environ.items():
        name = variable.lower().removeprefix("condu_").replace("__", ".")
        # Only a near miss is a slip: others' variables may start like ours (Kubernetes sets some for each service).
        if variable.lower().startswith("condu_") and get_close_matches(name, known, n=1, cutoff=0.85):
            found.setdefault(name, value)
    return {name: value for name, value in found.items() if name not in SECTIONS}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return nested


def _faults(error: ValidationError, origin: Mapping[str, str]) -> list[str]:
    lines = []
    for fault in error.errors():
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:  # of settings that do not go together
            lines.append(message)
            continue
        name = ".".join(str(part) for part in fault["loc"][:2])
        name = name if name in origin else str(fault["loc"][0])
        value = "" if name == "token" else f" = {fault['input']!r}"  # secrets stay out of messages
        lines.append(f"{name}{value} (from {origin.get(name, 'option')}): {message}")
    return lines
