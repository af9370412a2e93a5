"""What is shown of a training that waits: at its start, and once its workers' node is gone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from condu_ray.engine import train
from condu_ray.engine.placement import Group
from condu_ray.methods.step import Step


def test_a_training_that_stands_still_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives the workers of a lost node no place before there is another; the last step was shown without end."""
    clock, place = [0.0], ["waiting for 2 x 1 CPU"]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(train, "unplaced", lambda group: place[0])
    shown = list[tuple[int, int, str]]()
    tell = train.teller(Group(2, 1, 0, shared=True), 40, lambda *given: shown.append(given))

    tell({})
    place[0] = ""
    tell({})
    steps = {"birds": Step("birds", 7, 40, 1.5, 30.0)}
    tell(steps)
    place[0] = "waiting for 2 x 1 CPU"
    for _ in range(2):
        clock[0] += train.STILL_SECONDS - 1
        tell(dict(steps))
    clock[0] += 1
    tell({"birds": Step("birds", 8, 40, 1.4, 30.0)})

    running = "birds 7/40 loss 1.50 30 pictures/s"
    assert [note for _, _, note in shown] == [
        "waiting for 2 x 1 CPU",
        "",
        running,
        running,
        "waiting for 2 x 1 CPU",
        "birds 8/40 loss 1.40 30 pictures/s",
    ]
    assert [done for done, _, _ in shown] == [0, 0, 7, 7, 7, 8]
