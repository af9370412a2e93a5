"""The spine of a session, with the work done in this process."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_crew import InProcessCrew, contents, learn_here, make_store, opened, settings, silent

from condu_ray.config import SessionConfig
from condu_ray.data import open_task
from condu_ray.engine import keeper as keeping
from condu_ray.engine import session, work
from condu_ray.engine.evaluate import _given
from condu_ray.engine.figures import unmeasured
from condu_ray.engine.forget import forget
from condu_ray.engine.fusing import Fuser
from condu_ray.engine.keeper import Keeper
from condu_ray.errors import DataError, FusionError, NotFound, StoreError
from condu_ray.fusion import signs
from condu_ray.methods.stored import state_of
from condu_ray.store import LocalStore, Manifest, ObjectRef, open_store
from condu_ray.store.history import rollback
from condu_ray.voting.open import load_classifier
from condu_ray.voting.pictures import classify_paths

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def two(tiny_model_dir: Path, picture_tasks: Folders, tmp_path_factory: pytest.TempPathFactory) -> SessionConfig:
    """Settings of a store with colours and stripes."""
    config = settings(tmp_path_factory.mktemp("spine") / "store", tiny_model_dir)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    return config


@pytest.fixture
def copy(two: SessionConfig, tmp_path: Path) -> SessionConfig:
    """Settings of a copy of that store, to change."""
    shutil.copytree(two.store, tmp_path / "store")
    return two.model_copy(update={"store": str(tmp_path / "store")})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks whose training was begun, as it happens."""
    begun: list[str] = []
    real = work.train_task

    def counted(clip: Any, method: Any, layout: Any, task: Any, *others: Any, **named: Any) -> Any:
        begun.append(task.name)
        return real(clip, method, layout, task, *others, **named)

    monkeypatch.setattr(work, "train_task", counted)
    return begun


def pictures_of(folder: Path) -> list[Path]:
    return sorted((folder / "test").rglob("*.png"))[::4]


def answers(store: str, pictures: list[Path], **asked: Any) -> list[dict[str, Any]]:
    said = classify_paths(load_classifier(store), pictures, **asked)
    return [{name: value for name, value in each.items() if name != "version"} for each in said]


def deltas(store: LocalStore, manifest: Manifest) -> dict[str, Any]:
    state = state_of(store, manifest)
    return {name: state.delta(name) for name in state.tasks}


def test_a_session_makes_one_version_a_task(two: SessionConfig) -> None:
    store = open_store(two.store)
    assert store.versions() == [1, 2]
    first, second = store.manifest(1), store.manifest(2)
    assert [card.name for card in first.tasks] == ["colours"]
    assert [card.name for card in second.tasks] == ["colours", "stripes"]
    assert (second.parent, second.kind, second.message) == (1, "learn", "learned stripes")
    assert set(second.seconds) >= {"fuse", "evaluate"}
    assert set(first.seconds) >= {"train", "features", "evaluate", "fuse"}


def test_every_version_says_what_is_left_of_each_task(two: SessionConfig) -> None:
    for version in (1, 2):
        for card in open_store(two.store).manifest(version).tasks:
            shares = {name: card.figures[name] for name in ("zero_shot", "own", "before", "expert")}
            assert all(value is not None and 0 <= value <= 100 for value in shares.values()), shares
            assert 0 <= card.figures["relative_l2"] < 1
            assert 0 < card.figures["cosine"] <= 1


def test_a_task_alone_is_kept_whole_by_masks(tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method="condu")
    (made,) = learn_here(config, opened(picture_tasks, "colours"))
    alone = made.task("colours").figures
    assert alone["relative_l2"] == pytest.approx(0, abs=1e-3)
    assert alone["expert"] == alone["own"]


def test_the_version_before_a_task_has_already_measured_it(two: SessionConfig) -> None:
    first, second = open_store(two.store).manifest(1), open_store(two.store).manifest(2)
    assert second.task("stripes").figures["before"] == first.figures["accuracy"]["stripes"]
    assert second.task("colours").figures["before"] == second.task("colours").figures["zero_shot"]


def test_every_object_of_every_version_is_whole(two: SessionConfig) -> None:
    store = open_store(two.store)
    refs = [ref for version in store.versions() for ref in store.manifest(version).objects.values()]
    assert refs
    assert [store.fault(ref) for ref in refs] == [None] * len(refs)


def test_nothing_but_the_versions_objects_is_left(two: SessionConfig) -> None:
    store = open_store(two.store)
    report = store.gc(dry_run=True, in_use_s=0)
    assert (report.objects, report.leftovers) == ([], [])


def test_the_same_work_gives_the_same_bytes(
    two: SessionConfig, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    again = settings(tmp_path / "again", tiny_model_dir)
    learn_here(again, opened(picture_tasks, "colours"))
    learn_here(again, opened(picture_tasks, "colours", "stripes"))
    theirs, ours = contents(two.store), contents(again.store)
    # Measured beforehand only where both tasks are given at once.
    del theirs["00000001.json"]["figures"]["accuracy"]["stripes"]
    assert ours == theirs


def test_learning_again_has_nothing_to_do(copy: SessionConfig, picture_tasks: Folders, trainings: list[str]) -> None:
    before = contents(copy.store)
    assert learn_here(copy, opened(picture_tasks, "colours", "stripes")) == []
    assert (contents(copy.store), trainings) == (before, [])


def test_a_taken_name_with_other_pictures_is_refused(copy: SessionConfig, picture_tasks: Folders) -> None:
    folders = {"colours": picture_tasks["places"]}
    with pytest.raises(DataError, match=r"colours was learned in version 1 from other pictures.*forget colours"):
        learn_here(copy, opened(folders, "colours"))


def test_a_taken_name_with_other_settings_says_which(copy: SessionConfig, picture_tasks: Folders) -> None:
    other = copy.model_copy(update={"train": copy.train.model_copy(update={"steps": 9})})
    with pytest.raises(DataError, match=r"other settings \(train\.steps 4, not 9\)"):
        learn_here(other, opened(picture_tasks, "colours"))


def test_more_tasks_than_a_store_takes_in_are_refused_before_they_are_trained(
    copy: SessionConfig, picture_tasks: Folders, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signs, "MOST_TASKS", 2)
    forget(open_store(copy.store), "stripes")
    with pytest.raises(FusionError, match=r"has taken in 2 tasks, forgotten ones counted, .* 2 at most, not 1 more"):
        learn_here(copy, opened(picture_tasks, "places"))
    assert trainings == []
    assert learn_here(copy, opened(picture_tasks, "colours")) == []


def test_forgetting_leaves_the_others_bit_for_bit(copy: SessionConfig, picture_tasks: Folders) -> None:
    store = open_store(copy.store)
    pictures = pictures_of(picture_tasks["stripes"])
    expected = answers(copy.store, pictures, task="stripes")
    before = deltas(store, store.manifest())
    made = forget(store, "colours")
    assert [card.name for card in made.tasks] == ["stripes"]
    assert (made.version, made.kind) == (3, "forget")
    assert not any(name.endswith("-1") and name.startswith("prototypes") for name in made.objects)
    np.testing.assert_array_equal(deltas(store, made)["stripes"], before["stripes"])
    assert answers(copy.store, pictures, task="stripes") == expected
    with pytest.raises(NotFound, match=r"colours is not in version 3"):
        answers(copy.store, pictures, task="colours")


def test_after_forgetting_the_next_task_is_learned(copy: SessionConfig, picture_tasks: Folders) -> None:
    store = open_store(copy.store)
    forget(store, "colours")
    (made,) = learn_here(copy, opened(picture_tasks, "places"))
    assert [card.name for card in made.tasks] == ["stripes", "places"]
    (again,) = learn_here(copy, opened(picture_tasks, "colours"))
    assert [card.name for card in again.tasks] == ["stripes", "places", "colours"]
    assert set(again.figures["accuracy"]) == {"stripes", "places", "colours"}


def test_all_tasks_can_be_forgotten_and_learned_anew(copy: SessionConfig, picture_tasks: Folders) -> None:
    store = open_store(copy.store)
    forget(store, "colours")
    empty = forget(store, "stripes")
    assert empty.tasks == []
    (made,) = learn_here(copy, opened(picture_tasks, "colours"))
    assert [card.name for card in made.tasks] == ["colours"]
    assert made.task("colours").figures["relative_l2"] < 0.5


def test_forgetting_what_is_not_there_offers_the_nearest_name(copy: SessionConfig) -> None:
    with pytest.raises(NotFound, match=r"no task colour in version 2: did you mean colours\?"):
        forget(open_store(copy.store), "colour")


def test_forgetting_after_another_writer_forgets_from_its_version(
    copy: SessionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(copy.store)
    interrupt(monkeypatch, lambda: rollback(open_store(copy.store), 2))
    made = forget(store, "colours")
    assert (made.version, [card.name for card in made.tasks]) == (4, ["stripes"])


def test_rollback_then_learn(copy: SessionConfig, picture_tasks: Folders, trainings: list[str]) -> None:
    store = open_store(copy.store)
    assert rollback(store, 1).version == 3
    (made,) = learn_here(copy, opened(picture_tasks, "places"))
    assert [card.name for card in made.tasks] == ["colours", "places"]
    assert trainings == ["places"]
    assert [store.fault(ref) for ref in made.objects.values()] == [None] * len(made.objects)
    assert answers(copy.store, pictures_of(picture_tasks["places"]), task="places")


@pytest.mark.parametrize("triggers", ["mask", "sign"])
def test_what_was_rolled_back_is_learned_again_on_other_hardware(
    triggers: str, copy: SessionConfig, picture_tasks: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It rounds otherwise, and the objects of the version that was rolled back stay what they are."""
    config = copy
    if triggers == "mask":
        config = settings(tmp_path / "masks", copy.model.removeprefix("local-dir:"), method="condu")
        learn_here(config, opened(picture_tasks, "colours", "stripes"))
    store, real = open_store(config.store), work.train_task

    def rounded(*given: Any, **named: Any) -> Any:
        trained = real(*given, **named)
        return replace(trained, delta=trained.delta * np.float32(1.0001))

    monkeypatch.setattr(work, "train_task", rounded)
    rollback(store, 1)
    (made,) = learn_here(config, opened(picture_tasks, "stripes"))
    assert [card.name for card in made.tasks] == ["colours", "stripes"]
    assert made.objects.keys() >= store.manifest(2).objects.keys() - {"tests-2", "prototypes-2", "domain-2"}
    every = [ref for version in store.versions() for ref in store.manifest(version).objects.values()]
    assert [store.fault(ref) for ref in every] == [None] * len(every)


def test_buffers_that_other_hardware_rounded_otherwise_are_kept_beside(
    conv_model_dir: Path, picture_tasks: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "store", conv_model_dir, train__batch_norm="updated")
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    store, real = open_store(config.store), work.train_task

    def rounded(*given: Any, **named: Any) -> Any:
        trained = real(*given, **named)
        changed = {name: values * 2 for name, values in trained.buffers.items()}
        return replace(trained, buffers=changed)

    monkeypatch.setattr(work, "train_task", rounded)
    rollback(store, 1)
    (made,) = learn_here(config, opened(picture_tasks, "stripes"))
    before, after = (
        store.get(store.manifest(each).objects[name]) for each, name in ((2, "buffers-2"), (4, "buffers-4"))
    )
    assert before.keys() == after.keys()
    assert made.version == 4
    assert all(np.array_equal(after[name], 2 * values) for name, values in before.items())


def test_tasks_that_wait_for_their_turn_are_not_taken_by_gc(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of many tasks lasts longer than what nobody asks for is kept."""
    monkeypatch.setattr(keeping, "TOUCH_SECONDS", 0.0)
    config = settings(tmp_path / "store", tiny_model_dir)
    store = make_store(config)

    class Slow(InProcessCrew):
        def fuse(self, *given: Any) -> Any:
            store.gc()
            fused = super().fuse(*given)
            for file in Path(config.store).glob("objects/*/*"):
                os.utime(file, (time.time() - 25 * 3600,) * 2)
            return fused

    made = session.learn(store, config, opened(picture_tasks, "colours", "stripes"), Slow(store, config), silent)
    assert [each.version for each in made] == [1, 2]
    assert trainings == ["colours", "stripes"]


def test_an_old_version_that_cannot_be_read_stops_no_session(copy: SessionConfig, picture_tasks: Folders) -> None:
    """Nor does it lose an object that it may name."""
    store = open_store(copy.store)
    named = set(Path(copy.store).glob("objects/*/*"))
    (Path(copy.store) / "versions" / "00000001.json").write_text("{", encoding="utf-8")
    assert [each.version for each in learn_here(copy, opened(picture_tasks, "places"))] == [3]
    assert named <= set(Path(copy.store).glob("objects/*/*"))
    store.discard(*object_of(store.manifest(2).objects["domain-1"]))
    assert named <= set(Path(copy.store).glob("objects/*/*"))


def object_of(ref: ObjectRef) -> tuple[str, str]:
    """Key and name of an object."""
    _, key, file = ref.path.split("/")
    return key, file.removesuffix(".safetensors")


def test_the_way_back_from_a_damaged_newest_version_is_open(copy: SessionConfig) -> None:
    (Path(copy.store) / "versions" / "00000002.json").write_text("", encoding="utf-8")
    assert rollback(open_store(copy.store), 1).version == 3
    assert [card.name for card in open_store(copy.store).manifest().tasks] == ["colours"]


def test_a_version_that_is_removed_while_it_is_built_upon_is_no_fault(
    copy: SessionConfig, picture_tasks: Folders, trainings: list[str]
) -> None:
    """Another session made the next one, and whoever looks after the store has cleaned up."""
    store = open_store(copy.store)

    class Overtaken(InProcessCrew):
        overtaken = False

        def fuse(self, *given: Any) -> Any:
            if not self.overtaken:
                self.overtaken = True
                forget(store, "colours")
                store.gc(keep=1)
            return super().fuse(*given)

    (made,) = session.learn(store, copy, opened(picture_tasks, "places"), Overtaken(store, copy), silent)
    assert (made.version, [card.name for card in made.tasks]) == (4, ["stripes", "places"])
    assert trainings == ["places"]


def test_other_prototypes_are_asked_for_with_thresholds_of_their_own(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    """A version answers as if it had been learned with them."""
    votes = [{"router": "cosine"}, {"router": "cosine", "prototypes": "text", "k": 1}]
    classifiers = []
    for number, vote in enumerate(votes):
        given = {f"vote__{name}": value for name, value in vote.items()}
        config = settings(tmp_path / str(number), tiny_model_dir, **given)
        learn_here(config, opened(picture_tasks, "colours", "stripes"))
        classifiers.append(load_classifier(config.store, vote=votes[1]))
    paths = pictures_of(picture_tasks["colours"]) + pictures_of(picture_tasks["stripes"])
    asked, learned = (classify_paths(each, paths) for each in classifiers)
    assert asked == learned


def test_what_a_fuser_has_done_is_done_again_once_gc_has_taken_it(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    """It outlives the session that asked for it, where it is the actor of a cluster."""
    config = settings(tmp_path / "store", tiny_model_dir)
    store = make_store(config)
    (job,) = session._jobs(store, config, opened(picture_tasks, "colours"))
    InProcessCrew(store, config).train([job], silent)
    fuser, delta = Fuser(config.store), store.find(job.key, "delta")
    first = fuser.add("state", None, "colours", delta, None)
    for ref in first.objects.values():
        (Path(config.store) / ref.path).unlink()
    assert fuser.add("state", None, "colours", delta, None).objects == first.objects
    assert [store.fault(ref) for ref in first.objects.values()] == [None] * len(first.objects)


def test_a_long_training_says_again_that_its_finished_tasks_are_in_use(
    copy: SessionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(copy.store)
    (path,) = {ref.path for name, ref in store.manifest(1).objects.items() if name == "domain-1"}
    file = Path(store.url) / path
    folder = Path(store.work("ray-train-1"))
    keeper = Keeper(store, [path, "objects/none/delta.safetensors"], "ray-train-1")

    def age() -> float:
        for each in (file, folder):
            os.utime(each, (0, 0))
        keeper.touch()
        return max(file.stat().st_mtime, folder.stat().st_mtime)

    assert age() == 0  # not all the time
    monkeypatch.setattr(keeping, "TOUCH_SECONDS", 0.0)
    assert age() > 0


def interrupt(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    """Lets `other` happen just before the next commit."""
    real = LocalStore.commit

    def commit(store: LocalStore, manifest: Manifest) -> None:
        monkeypatch.setattr(LocalStore, "commit", real)
        other()
        real(store, manifest)

    monkeypatch.setattr(LocalStore, "commit", commit)


def test_the_loser_of_a_race_fuses_again_and_does_not_train_again(
    tiny_model_dir: Path,
    picture_tasks: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainings: list[str],
) -> None:
    raced, serial = (settings(tmp_path / name, tiny_model_dir) for name in ("raced", "serial"))
    interrupt(monkeypatch, lambda: learn_here(raced, opened(picture_tasks, "stripes")))
    (made,) = learn_here(raced, opened(picture_tasks, "colours"))
    assert trainings == ["colours", "stripes"]
    assert (made.version, [card.name for card in made.tasks]) == (2, ["stripes", "colours"])
    for name in ("stripes", "colours"):
        learn_here(serial, opened(picture_tasks, name))
    open_store(raced.store).gc(in_use_s=0)  # what the loser had fused for version 1
    assert contents(raced.store) == contents(serial.store)


def test_the_loser_of_a_race_for_the_same_task_has_nothing_left_to_do(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: list[str]
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir)
    interrupt(monkeypatch, lambda: learn_here(config, opened(picture_tasks, "colours")))
    assert learn_here(config, opened(picture_tasks, "colours")) == []
    assert (open_store(config.store).versions(), trainings) == ([1], ["colours"])


@pytest.mark.parametrize("method", ["sequential", "wise-ft"])
def test_one_model_that_goes_on_from_task_to_task_starts_where_it_is(
    method: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    """Given one after another or at once, the last task's model is the same; a forgotten name changes no start."""
    at_once, apart, forgot = (settings(tmp_path / name, tiny_model_dir, method=method) for name in "abc")
    learn_here(at_once, opened(picture_tasks, "colours", "stripes"))
    for name in ("colours", "stripes"):
        learn_here(apart, opened(picture_tasks, name))
    last = {config.store: open_store(config.store).manifest() for config in (at_once, apart)}
    assert last[at_once.store].objects == last[apart.store].objects
    shutil.copytree(apart.store, forgot.store)
    forget(open_store(forgot.store), "stripes")
    rollback(open_store(apart.store), 1)
    (moved,) = learn_here(forgot, opened(picture_tasks, "places"))
    (back,) = learn_here(apart, opened(picture_tasks, "places"))
    assert moved.objects["latest-3"].sha256 != back.objects["latest-2"].sha256
    assert moved.task("places").train_key != back.task("places").train_key


def test_one_model_that_was_moved_on_by_another_session_is_not_set_back(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method="sequential")
    interrupt(monkeypatch, lambda: learn_here(config, opened(picture_tasks, "stripes")))
    with pytest.raises(StoreError, match=r"another session changed the store.*run the same command again"):
        learn_here(config, opened(picture_tasks, "colours"))
    (made,) = learn_here(config, opened(picture_tasks, "colours"))
    assert [card.name for card in made.tasks] == ["stripes", "colours"]


@pytest.mark.parametrize("method", ["zero-shot", "finetune", "condu-lora", "condu-sign"])
def test_every_method_learns_forgets_and_learns_on(
    method: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method=method, lora__rank=4)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    forget(open_store(config.store), "colours")
    (made,) = learn_here(config, opened(picture_tasks, "places"))
    assert (made.version, [card.name for card in made.tasks]) == (4, ["stripes", "places"])
    assert answers(config.store, pictures_of(picture_tasks["places"]))[0]["label_space"] == "union"


def test_a_delta_that_is_gone_is_not_taken_for_an_untrained_one(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    class Forgetful(InProcessCrew):
        def train(self, jobs: Any, update: Any) -> None:
            super().train(jobs, update)
            self._store.discard(jobs[0].key, "delta")

    config = settings(tmp_path / "store", tiny_model_dir)
    store = make_store(config)
    with pytest.raises(StoreError, match=r"run the same command again"):
        session.learn(store, config, opened(picture_tasks, "colours"), Forgetful(store, config), silent)
    assert store.versions() == []


def test_what_was_trained_on_is_not_evaluated_on_where_the_split_is_made_here(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method="zero-shot", seed=5, test_share=0.3)
    unsplit = {"colours": picture_tasks["colours"] / "train"}
    task = open_task("colours", unsplit["colours"], seed=5, test_share=0.3)
    assert task.split_made
    learn_here(config, [task])
    later = settings(tmp_path / "store", tiny_model_dir, method="zero-shot", test_share=0.5)
    (made,) = learn_here(later, opened(picture_tasks, "stripes"))  # another task's split changes nothing
    asked = settings(tmp_path / "store", tiny_model_dir, tasks=[f"colours={unsplit['colours']}"])
    ((card, pictures),) = _given(asked, made, silent)
    assert card.name == "colours"
    assert pictures == task.test


def damage_one(folder: Path) -> None:
    (folder / "test" / "blue" / "12.png").write_bytes(b"no picture")


def show_another(folder: Path) -> None:
    shutil.copy(folder / "test" / "red" / "12.png", folder / "test" / "blue" / "12.png")


@pytest.mark.parametrize("spoil", [shutil.rmtree, damage_one, show_another])
def test_a_task_whose_test_pictures_are_others_now_is_not_measured_and_stops_no_session(
    spoil: Callable[[Path], None], tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir)
    shutil.copytree(picture_tasks["colours"], tmp_path / "colours")
    learn_here(config, opened({"colours": tmp_path / "colours"}, "colours"))
    spoil(tmp_path / "colours")
    (made,) = learn_here(config, opened(picture_tasks, "stripes"))
    assert set(made.figures["accuracy"]) == {"stripes"}
    assert unmeasured(made) == ["colours"]
    assert made.task("colours").figures["expert"] is None
    assert made.task("colours").figures["relative_l2"] is not None
