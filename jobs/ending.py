"""How a job begins and ends: like a command of condu-ray."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

from condu_ray.cli import INTERRUPTED
from condu_ray.errors import ConduError

P = ParamSpec("P")


def job(main: Callable[P, None]) -> Callable[P, None]:
    """Exits 2 with one sentence for the user's input or surroundings, 130 where it was stopped."""

    @wraps(main)
    def run(*given: P.args, **named: P.kwargs) -> None:
        try:
            main(*given, **named)
        except ConduError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(INTERRUPTED)

    return run


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: names separated by commas, each of which must be known."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if strange := [name for name in found if name not in known]:
            raise ArgumentTypeError(f"there is no {strange[0]!r}, but {', '.join(known)}")
        return found

    return names
