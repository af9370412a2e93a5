"""What a front does where replicas die. The replicas are stood for; with real ones: test_serving.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from condu_ray.serving import app
from condu_ray.serving.app import Handle
from condu_ray.serving.messages import Asking, Question, Reply, Standing
from condu_ray.serving.problems import Problem

ASKING = Asking(("a",), (b"",), Question())


def handle(say: Callable[[], Any]) -> Handle:
    """Every call of a replica returns what `say` does, or raises it."""

    async def remote(*arguments: Any) -> Any:
        said = say()
        if isinstance(said, Exception):
            raise said
        return said

    method = SimpleNamespace(remote=remote)
    return Handle(SimpleNamespace(answer=method, standing=method), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dead", [ActorDiedError(), OutOfMemoryError("killed, the node runs low on memory")])
def test_a_request_whose_replica_was_killed_is_asked_again(dead: Exception) -> None:
    said = iter([dead, Reply(version=7)])
    assert asyncio.run(handle(lambda: next(said)).answer(ASKING)).version == 7
    with pytest.raises(Problem, match="gone") as problem:
        asyncio.run(handle(lambda: dead).answer(ASKING))
    assert (problem.value.status, problem.value.busy) == (503, True)


def follow(said: Callable[[int], Any], seconds: float) -> tuple[list[str], int]:
    """The names of the replicas that are known after so long, and how often one was asked."""
    calls = 0

    def say() -> Any:
        nonlocal calls
        calls += 1
        return said(calls)

    async def run() -> list[str]:
        front = handle(say)
        async with front.lifespan(None):  # type: ignore[arg-type]
            await asyncio.sleep(seconds)
        return [each.replica for each in front.standings()]

    return asyncio.run(run()), calls


@pytest.mark.parametrize("fault", [OutOfMemoryError("killed"), RuntimeError("cannot tell")])
def test_whatever_a_replica_says_of_its_standing_the_next_is_asked(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "STANDING_SECONDS", 0.01)
    assert follow(lambda call: fault if call == 1 else Standing("one", 1, 1, None, None), 0.3)[0] == ["one"]


def test_replicas_that_are_gone_are_not_asked_for_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "STANDING_SECONDS", 0.1)
    monkeypatch.setattr(app, "GONE_SECONDS", 0.1)
    known, calls = follow(lambda call: Standing(f"restart-{min(call, 50)}", 1, 1, None, None), 2.0)
    assert len(known) <= 3
    assert calls < 150  # each second one a replica that is there, not one for every replica that ever was
