"""Slow calls off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def run_in(pool: Executor, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
    """What the call returns, made in a thread of the pool."""
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: call(*arguments, **named))
