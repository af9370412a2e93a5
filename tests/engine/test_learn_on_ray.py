"""The work of a session on a real Ray cluster, with processes killed in the middle of it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from command_line import Learned, condu
from in_process_crew import InProcessCrew, contents, learn_here, make_store, opened, settings, silent
from ray_processes import ray_processes

from condu_ray.config import SessionConfig
from condu_ray.engine.cluster import Cluster, connected
from condu_ray.engine.crew import CHUNK
from condu_ray.engine.evaluate import snapshot_of
from condu_ray.engine.figures import learned_pictures
from condu_ray.engine.pool import those_ready
from condu_ray.engine.ray_crew import RayCrew
from condu_ray.engine.scoring import Scorer
from condu_ray.engine.session import _jobs, learn
from condu_ray.engine.train import train
from condu_ray.errors import DataError, TrainingError
from condu_ray.methods.batches import Order
from condu_ray.sources import resolve
from condu_ray.store import Store, open_store
from condu_ray.store.header import fixed_settings

Folders = dict[str, Path]
pytestmark = pytest.mark.usefixtures("ray_cluster")

ONE, TWO = Cluster(((1, 0),), joined=True), Cluster(((2, 0),), joined=True)


def nothing(done: int, total: int, note: str) -> None:
    pass


def delta_of(store: Store, key: str) -> Any:
    ref = store.find(key, "delta")
    assert ref is not None
    return store.get(ref)


def test_what_needs_the_cluster_is_in_one_process(request: pytest.FixtureRequest) -> None:
    """Else each process of the run would start one: see the version of pytest in pyproject.toml."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@ray")


def test_what_ray_prints_is_no_part_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with connected() as cluster:
        print("(raylet) a worker died")
    out, err = capsys.readouterr()
    assert (cluster.joined, out, err) == (True, "", "(raylet) a worker died\n")


def test_a_session_on_ray_gives_what_one_process_gives(
    learned: Learned, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    """Bit for bit: deltas, prototypes, fused states and figures of both versions."""
    here = settings(tmp_path / "here", tiny_model_dir)
    learn_here(here, opened(picture_tasks, *learned.tasks), threads=2)  # of a worker: four cores for two tasks
    assert contents(learned.store) == contents(here.store)


def test_a_session_on_ray_leaves_nothing_behind(learned: Learned) -> None:
    report = open_store(learned.store).gc(dry_run=True, in_use_s=0)
    assert (report.objects, report.leftovers) == ([], [])


def test_pictures_are_routed_in_their_order_by_however_many_actors(learned: Learned) -> None:
    store = open_store(learned.store)
    config, _ = resolve({}, fixed=fixed_settings(str(learned.store)))
    manifest, snapshot = store.manifest(), snapshot_of(store, store.manifest())
    some = list(learned_pictures(store, manifest).values())
    pictures = some[1].take(np.arange(CHUNK + 5) % len(some[1]))
    others = ray_processes("Worker")
    crew = RayCrew(store, config, TWO)
    try:
        for few, hired in ((4, 1), (CHUNK + 5, 2)):  # a process costs seconds and a model's memory
            crew.features(pictures.take(range(few)), nothing)
            assert len(set(ray_processes("Worker")) - set(others)) == hired
        order, score, nearest = crew.route(pictures, snapshot, nothing)
    finally:
        crew.close()
    expected, sure, near = Scorer(store.url, config).routed(pictures, snapshot)
    assert np.array_equal(order, expected)
    assert np.array_equal(np.sort(order, axis=1), np.tile([0, 1], (len(pictures), 1)))
    np.testing.assert_allclose(score, sure, rtol=1e-5)
    assert np.array_equal(nearest, near)


def test_a_copy_of_a_store_is_not_written_to_by_the_actor_of_the_other(
    learned: Learned, picture_tasks: Folders, tmp_path: Path
) -> None:
    """On a cluster that stays, the fusion actor of a store outlives the session; a copy has the same id."""
    config, _ = resolve({"train.steps": 4, "train.batch_size": 8}, fixed=fixed_settings(str(learned.store)))
    copy = open_store(shutil.copytree(learned.store, tmp_path / "copy"))
    jobs = _jobs(copy, config, opened(picture_tasks, "places"))
    InProcessCrew(copy, config).train(jobs, nothing)
    before = contents(learned.store)
    first, second = RayCrew(open_store(learned.store), config, ONE), RayCrew(copy, config, ONE)
    first.hold(open_store(learned.store).manifest())
    fused = second.fuse("state-of-places", copy.manifest(), "places", copy.find(jobs[0].key, "delta"), None)
    assert [copy.fault(ref) for ref in fused.objects.values()] == [None] * len(fused.objects)
    assert contents(learned.store) == before


def test_a_store_that_may_not_be_written_is_said_before_training(
    learned: Learned, picture_tasks: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def mkdir(path: Any, *given: Any, **named: Any) -> None:
        if str(path).startswith(str(learned.store)):
            raise PermissionError(13, "Permission denied")
        real(path, *given, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)
    said = condu("learn", "places", "--data", picture_tasks["places"], "--store", learned.store, "--workers", "1")
    assert said.code == 2
    assert "give this user the permission or choose another --store" in said.err
    assert open_store(learned.store).versions() == [1, 2]


def test_a_killed_training_goes_on_to_the_same_bits(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    def prepared(name: str) -> tuple[SessionConfig, Store, Any]:
        config = settings(tmp_path / name, tiny_model_dir, train__steps=150, train__checkpoint_seconds=1e-6)
        store = make_store(config)
        return config, store, _jobs(store, config, opened(picture_tasks, "colours"))

    killed: list[int] = []
    seen: list[int] = []

    def kill_once(done: int, total: int, note: str) -> None:
        seen.append(done)
        if not killed and 0 < done < total:
            killed.extend(ray_processes("RayTrainWorker"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    config, store, jobs = prepared("killed")
    train(store, config, jobs, ONE, kill_once)
    assert killed
    other, undisturbed, _ = prepared("undisturbed")
    InProcessCrew(undisturbed, other).train(jobs, nothing)
    ours, theirs = delta_of(store, jobs[0].key), delta_of(undisturbed, jobs[0].key)
    np.testing.assert_array_equal(ours["delta"], theirs["delta"])
    np.testing.assert_array_equal(ours["losses"], theirs["losses"])


def test_workers_that_find_no_place_say_so_until_they_find_one(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, workers=1, cpus_per_worker=3)
    store = make_store(config)
    jobs = _jobs(store, config, opened(picture_tasks, "colours"))
    others = ray.util.placement_group([{"CPU": 2}])  # of the cluster's four cores
    assert others.wait(30)
    notes: list[str] = []

    def give_way(done: int, total: int, note: str) -> None:
        if note.startswith("waiting") and not notes:
            ray.util.remove_placement_group(others)
            notes.append(note)

    train(store, config, jobs, Cluster(((4, 0),), joined=True), give_way)
    assert notes == ["waiting for 1 x 3 CPU: 2 CPU free (`ray status`); fewer --cpus-per-worker need less"]
    assert delta_of(store, jobs[0].key)


def test_two_processes_train_a_task_together(tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path) -> None:
    config = settings(tmp_path / "two", tiny_model_dir, parallel="data", workers=2)
    store, one = make_store(config), settings(tmp_path / "one", tiny_model_dir)
    jobs = _jobs(store, config, opened(picture_tasks, "colours"))
    train(store, config, jobs, TWO, nothing)
    alone = make_store(one)
    InProcessCrew(alone, one).train(jobs, nothing)
    ours, theirs = (delta_of(each, jobs[0].key)["delta"] for each in (store, alone))
    # AdamW's first steps are as large for a tiny gradient as for a large one, so its rounding shows.
    assert np.linalg.norm(ours - theirs) <= 0.05 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_what_one_of_two_processes_finds_wrong_ends_both(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    """A picture went away: the process that needs it says so, and the other does not wait for it for ever."""
    config = settings(tmp_path / "store", tiny_model_dir, parallel="data", workers=2)
    folder = Path(shutil.copytree(picture_tasks["colours"], tmp_path / "colours"))
    store = make_store(config)
    jobs = _jobs(store, config, opened({"colours": folder}, "colours"))
    (first,) = Order(36, 8, config.seed, range(1), rank=1, size=2)
    Path(jobs[0].data.train.pictures[first[0][0]].path).unlink()
    with pytest.raises(DataError, match=r"cannot be read any more \(no such file\)"):
        train(store, config, jobs, TWO, nothing)


def test_a_loss_that_is_no_number_is_one_sentence(tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path) -> None:
    store, given = tmp_path / "store", ["--train.steps=4", "--train.batch-size=8", "--tracking=off", "--workers=1"]
    given += ["--model", f"local-dir:{tiny_model_dir}", "--train.lr=0.9", "--train.weight-decay=1e30"]
    said = condu("learn", "colours", "--data", picture_tasks["colours"], "--store", store, *given)
    assert said.code == 2
    assert "error: task colours:" in said.err
    assert "--train.lr" in said.err
    assert "Traceback" not in said.err
    assert open_store(store).versions() == []


def test_a_process_that_cannot_start_is_one_sentence() -> None:
    class Stillborn:
        def __init__(self) -> None:
            raise OSError("no store there")

    with pytest.raises(TrainingError, match=r"a process of this session is gone \(.*no store there\)") as found:
        those_ready([ray.remote(num_cpus=0)(Stillborn).remote()], "CPU core", nothing)
    assert "let every node see the store" in str(found.value)


def test_one_that_is_lost_while_it_starts_ends_no_session_that_has_others() -> None:
    class Struck:
        def __init__(self, lost: bool) -> None:
            if lost:
                os._exit(1)

        def answer(self) -> int:
            return 1

    lost, well = (ray.remote(num_cpus=0)(Struck).remote(each) for each in (True, False))
    assert those_ready([lost, well], "CPU core", nothing) == [well]
    assert ray.get(well.answer.remote()) == 1
    lost = ray.remote(num_cpus=0)(Struck).remote(True)
    assert those_ready([lost], "CPU core", nothing, needed=False) == []
    with pytest.raises(TrainingError, match="a process of this session is gone"):
        those_ready([lost], "CPU core", nothing)


class Unlucky(RayCrew):
    """A crew that loses its fusion actor before each fuse and each need of the state, and once all of its pool.

    Where fusing is shared out it loses the actors that share it, before each fuse.
    """

    def fuse(self, *given: Any) -> Any:
        shards = self._config.fusion.shards
        if shards > 1:
            super().fuse(*given)  # its shards are hired by now
            ray.get(self._fusion.hold.remote(given[1]))
            assert self.kill("Shard") == shards
        else:
            self.kill_fusion_actor()
        return super().fuse(*given)

    def _with_state(self, *given: Any) -> Any:
        self.kill_fusion_actor()
        if not hasattr(self, "struck"):
            self.struck = self.kill("Worker")
        return super()._with_state(*given)

    def kill_fusion_actor(self) -> None:
        """This store's alone: those of other tests would all start again."""
        pid = ray.get(self._fusion.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)

    def kill(self, name: str) -> int:
        pids = ray_processes(name)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": "condu"}, id="masks", marks=pytest.mark.slow),
        pytest.param({"method": "condu-sign", "fusion__tune_rescalers": 3}, id="signs"),
        pytest.param({"fusion__shards": 3}, id="shards", marks=pytest.mark.slow),
    ],
)
def test_killed_actors_change_no_result(
    changes: dict[str, Any], tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    unlucky, calm = (settings(tmp_path / name, tiny_model_dir, workers=1, **changes) for name in ("unlucky", "calm"))
    tasks = opened(picture_tasks, "colours", "stripes")
    learn_here(calm, tasks)
    store = make_store(unlucky)
    InProcessCrew(store, unlucky).train(_jobs(store, unlucky, tasks), nothing)  # what is trained is not trained again
    crew = Unlucky(store, unlucky, ONE)
    try:
        learn(store, unlucky, tasks, crew, silent)
    finally:
        crew.close()
    assert crew.struck == 1
    assert contents(unlucky.store) == contents(calm.store)
