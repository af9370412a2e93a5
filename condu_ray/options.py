"""Turns every setting into a command-line option of the same name, so that file, environment and options agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape

from condu_ray.config import SessionConfig, fields


def with_settings(
    *left_out: str, of: type[BaseModel] = SessionConfig
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds an option for every setting but those `left_out`; the command gets those that were given as `settings`.

    Values stay text here: config.py checks them, with the same sentences as for a file.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        given = {name.replace(".", "__"): (name, info) for name, info in fields(of) if name not in left_out}

        @wraps(command)
        def run(**arguments: Any) -> None:
            settings = {name: arguments.pop(key) for key, (name, _) in given.items()}
            command(**arguments, settings={name: value for name, value in settings.items() if value is not None})

        own = inspect.signature(command, eval_str=True).parameters
        panel = command.__name__ if of is not SessionConfig else "session"
        options = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str | None, _option(name, info, panel)],
            )
            for key, (name, info) in given.items()
        ]
        kept = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in own.items() if name != "settings"]
        run.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in [*kept, *options]}
        return run

    return decorate


def _option(name: str, info: FieldInfo, panel: str) -> Any:
    section = name.partition(".")[0] if "." in name else panel
    default = "" if info.default is None else f" [default: {_word(info.default)}]"
    return typer.Option(
        f"--{name.replace('_', '-')}",
        help=escape(f"{info.description}{default}"),  # what stands in brackets would be read as a style
        metavar=_metavar(info.annotation),
        rich_help_panel=f"Settings: {section}",
        show_default=False,
    )


def _metavar(kind: Any) -> str:
    kinds = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    if kinds:
        return "|".join(str(choice) for choice in get_args(kinds[0]))
    names = {int: "N", float: "X", bool: "yes|no"}
    return next((names[each] for each in (kind, *get_args(kind)) if each in names), "TEXT")


def _word(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ",".join(default) or "none" if isinstance(default, tuple) else str(default)
