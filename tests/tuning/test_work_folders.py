"""What jobs keep in their work folders: whole or not there, and named by all that it follows from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ablate_adapters
import bench_sweep
import numpy as np
import pytest
from PIL import Image

from condu_ray.data import open_task
from condu_ray.methods.protocol import Features
from condu_ray.models.clip import Clip


class Killed(BaseException):
    pass


def test_digits_that_were_half_drawn_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, saved = tmp_path / "work" / "digits", Image.Image.save
    left = iter(range(5))

    def killed(self: Any, *given: Any, **others: Any) -> None:
        if next(left, None) is None:
            raise Killed
        saved(self, *given, **others)

    monkeypatch.setattr(bench_sweep, "TRAIN_EACH", 2)
    monkeypatch.setattr(bench_sweep, "TEST_EACH", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(Killed):
            bench_sweep.write_digits(folder)
    assert len(open_task("digits", bench_sweep.write_digits(folder)).train) == 20


def test_features_that_were_half_written_are_written_again(
    tiny_clip: Clip, picture_tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **arrays: Any) -> None:
        path.write_bytes(b"half")
        raise Killed

    tasks = {"colours": str(picture_tasks["colours"])}
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", killed)
        with pytest.raises(Killed):
            ablate_adapters.sessions(tiny_clip, tasks, tmp_path)
    (session,) = ablate_adapters.sessions(tiny_clip, tasks, tmp_path)
    assert len(session.test) == len(session.labels) > 0


def test_figures_are_named_by_all_that_they_follow_from() -> None:
    ones, labels = np.ones((2, 3), np.float32), np.zeros(2, np.int64)
    session = ablate_adapters.Session("one", Features(ones, labels, ones), ones, labels)
    others = [
        replace(session, train=Features(2 * ones, labels, ones)),
        replace(session, train=Features(ones, labels + 1, ones)),
        replace(session, train=Features(ones, labels, 2 * ones)),
        replace(session, test=2 * ones),
        replace(session, labels=labels + 1),
    ]
    assert len({ablate_adapters._digest([each]) for each in (session, *others)}) == 6
