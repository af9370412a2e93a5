"""A session with sign triggers trains each new task's rescalers, once, and touches no other task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_crew import InProcessCrew, contents, learn_here, make_store, opened, settings, silent
from test_session_spine import answers, interrupt, pictures_of

from condu_ray.config import SessionConfig
from condu_ray.engine import scoring
from condu_ray.engine.forget import forget
from condu_ray.engine.plan import need
from condu_ray.engine.session import learn
from condu_ray.methods.stored import layout_of, state_of
from condu_ray.store import Store, open_store

Folders = dict[str, Path]


def sign(store: Path, model: Path, steps: int = 3) -> SessionConfig:
    return settings(store, model, method="condu-sign", fusion__tune_rescalers=steps)


class Dies(InProcessCrew):
    """A session that is ended between rescaling and fusing."""

    def fuse(self, *given: Any) -> Any:
        raise KeyboardInterrupt


@pytest.fixture
def rescalings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks whose rescalers were trained, as it happens."""
    done: list[str] = []
    real = scoring.train_rescalers

    def counted(*given: Any) -> Any:
        done.append(given[3].name)
        return real(*given)

    monkeypatch.setattr(scoring, "train_rescalers", counted)
    return done


def arrays_of(store: Store, version: int) -> dict[tuple[str, str], Any]:
    refs = store.manifest(version).objects
    return {(name, part): values for name, ref in refs.items() for part, values in store.get(ref).items()}


def test_each_new_task_gets_its_own_rescalers_and_the_others_keep_theirs(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, rescalings: list[str]
) -> None:
    tasks = opened(picture_tasks, "colours", "stripes")
    plain, trained = (sign(tmp_path / str(steps), tiny_model_dir, steps) for steps in (0, 3))
    for config in (plain, trained):
        learn_here(config, tasks)
    assert rescalings == ["colours", "stripes"], "no steps are no training"
    without, store = open_store(plain.store), open_store(trained.store)
    for version in (1, 2):
        assert "rescale" in store.manifest(version).seconds
        assert "rescale" not in without.manifest(version).seconds
        theirs, ours = arrays_of(without, version), arrays_of(store, version)
        other = [part for name, part in ours if not np.array_equal(ours[name, part], theirs[name, part])]
        assert other == ["rescalers"] * version
    first, second = store.manifest(1), store.manifest(2)
    assert first.objects["signs-0"] == second.objects["signs-0"]
    report = store.gc(dry_run=True, in_use_s=0)
    assert (report.objects, report.leftovers) == ([], [])


def test_forgetting_leaves_the_rescaled_others_bit_for_bit(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = sign(tmp_path / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    store, pictures = open_store(config.store), pictures_of(picture_tasks["stripes"])
    said, delta = answers(config.store, pictures, task="stripes"), state_of(store, store.manifest()).delta("stripes")
    made = forget(store, "colours")
    np.testing.assert_array_equal(state_of(store, made).delta("stripes"), delta)
    assert answers(config.store, pictures, task="stripes") == said


def test_a_session_that_died_after_rescaling_finds_its_rescalers(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, rescalings: list[str]
) -> None:
    killed, calm = (sign(tmp_path / name, tiny_model_dir) for name in ("killed", "calm"))
    tasks, store = opened(picture_tasks, "colours"), make_store(killed)
    with pytest.raises(KeyboardInterrupt):
        learn(store, killed, tasks, Dies(store, killed), silent)
    assert (rescalings, store.versions()) == (["colours"], [])
    learn_here(killed, tasks)
    assert rescalings == ["colours"]
    learn_here(calm, tasks)
    assert contents(killed.store) == contents(calm.store)


def test_rescalers_of_other_steps_are_not_taken(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, rescalings: list[str]
) -> None:
    """A store that is older than the setting does not fix it."""
    config = sign(tmp_path / "store", tiny_model_dir)
    other = config.model_copy(update={"fusion": config.fusion.model_copy(update={"tune_rescalers": 5})})
    tasks, store = opened(picture_tasks, "colours"), make_store(config)
    with pytest.raises(KeyboardInterrupt):
        learn(store, config, tasks, Dies(store, config), silent)
    assert len(learn(store, other, tasks, InProcessCrew(store, other), silent)) == 1
    assert rescalings == ["colours", "colours"]


def test_the_loser_of_a_race_trains_its_rescalers_again_for_the_state_it_then_has(
    tiny_model_dir: Path,
    picture_tasks: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rescalings: list[str],
) -> None:
    raced, serial = (sign(tmp_path / name, tiny_model_dir) for name in ("raced", "serial"))
    interrupt(monkeypatch, lambda: learn_here(raced, opened(picture_tasks, "stripes")))
    learn_here(raced, opened(picture_tasks, "colours"))
    assert rescalings == ["colours", "stripes", "colours"]
    for name in ("stripes", "colours"):
        learn_here(serial, opened(picture_tasks, name))
    open_store(raced.store).gc(in_use_s=0)  # what the loser had made for version 1
    assert contents(raced.store) == contents(serial.store)


def test_the_need_counts_what_rescaling_takes(tiny_model_dir: Path, tmp_path: Path) -> None:
    plain, trained = (sign(tmp_path / "store", tiny_model_dir, steps) for steps in (0, 3))
    layout = layout_of(make_store(plain).header)
    without, found = (asdict(need(config, layout, 1000, [], 0)) for config in (plain, trained))
    assert {name for name in found if found[name] > without[name]} == {"scorer"}
