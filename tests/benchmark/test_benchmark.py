"""A tiny stream, learned by every method in this process: what is shared, what is measured, what a killed run keeps."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from in_process_crew import InProcessCrew, named_accuracy, silent

from condu_ray import catalogue
from condu_ray.benchmark import run as running
from condu_ray.benchmark.results import OF_ALL_TASKS, OF_ONE_TASK, bounds_of, state_bytes
from condu_ray.benchmark.routing import known_auroc, nearest_right, router_shares
from condu_ray.benchmark.run import measure
from condu_ray.benchmark.settings import Benchmark
from condu_ray.benchmark.stream import Stream
from condu_ray.benchmark.systems import METHODS, SYSTEMS, System, check_methods, plane_rank
from condu_ray.config import ModelSpec, SessionConfig
from condu_ray.data import Picture, Split
from condu_ray.engine import work
from condu_ray.engine.cluster import Cluster
from condu_ray.errors import ConfigError, DataError
from condu_ray.methods import registry
from condu_ray.methods.stored import TASK_OBJECTS
from condu_ray.models.clip import Clip
from condu_ray.store import Manifest, Store, open_store
from condu_ray.tracking.matrix import AccuracyMatrix

TASKS = ["colours", "stripes", "places"]
FIGURES = [
    "transfer",
    "average",
    "last",
    "incremental_average",
    "incremental_last",
    "retention",
    "router_accuracy",
    "router_top2",
    "auroc",
    "router_alone",
]
COSTS = ["seconds", "bytes_per_task", "bytes_shared", "rank"]
SETTINGS = (
    "train: {steps: 12, batch_size: 8, lr: 1.0e-3, towers: image}\nlora: {rank: 4}\nvote: {k: 2}\n"
    "adapter: {epochs: 4}\n"
)


def here(store: Store, config: SessionConfig) -> Any:
    return nullcontext(InProcessCrew(store, config))


def nobody(store: Store, config: SessionConfig) -> Any:
    raise AssertionError("somebody is asked to work")


def order(folder: Path, tasks: dict[str, Path], model: Path, methods: Any = METHODS, **changes: Any) -> Benchmark:
    file = folder / "settings.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(SETTINGS)
    stream = Stream({name: str(tasks[name]) for name in TASKS})
    given: dict[str, Any] = {"stream": stream, "seeds": (0,), "options": {"model": f"local-dir:{model}"}, **changes}
    return Benchmark(methods=tuple(methods), work=folder / "work", file=file, **given)


class Trainings:
    """Which tasks were trained, how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        real = work.train_task

        def counted(clip: Any, method: Any, layout: Any, task: Any, *others: Any, **named: Any) -> Any:
            self.counts[task.name] += 1
            return real(clip, method, layout, task, *others, **named)

        monkeypatch.setattr(work, "train_task", counted)


@pytest.fixture(scope="module")
def done(
    tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Benchmark, dict[str, Any], Counter[str]]:
    """Every method on three tasks: (what was asked, the report, trainings by task)."""
    benchmark = order(tmp_path_factory.mktemp("benchmark"), picture_tasks, tiny_model_dir)
    with pytest.MonkeyPatch.context() as patch:
        trainings = Trainings(patch)
        return benchmark, measure(benchmark, here, silent), trainings.counts


def spaces(system: System) -> list[str]:
    return ["task", *(["named"] if system.votes else []), "candidates", "union"]


def row(found: dict[str, Any], method: str, labels: str = "task") -> dict[str, Any]:
    (one,) = [each for each in found["results"] if (each["method"], each["labels"]) == (method, labels)]
    return one


def test_the_report_has_one_shape(done: Any) -> None:
    _, found, _ = done
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["stream", "model", "results"]
    assert found["stream"] == TASKS
    keys = ["method", "labels", "seed", *FIGURES, *COSTS, "matrix"]
    assert all(list(each) == keys for each in found["results"])
    rows = [(each["method"], each["labels"]) for each in found["results"]]
    every = [(name, labels) for name, system in SYSTEMS.items() for labels in spaces(system)]
    assert rows == [*every, ("linear-probe", "task")]


def test_what_starts_from_the_base_model_is_trained_once(done: Any) -> None:
    """Full fine-tuning, LoRA with a shared A, and exact LoRA; after the first task also sequential and wise-ft."""
    benchmark, _, trained = done
    assert trained == {"colours": 3, "stripes": 5, "places": 5}
    cards = {name: open_store(benchmark.work / "seed-0" / name).manifest().tasks for name in SYSTEMS}
    keys = {name: [card.train_key for card in each] for name, each in cards.items()}
    assert keys["finetune"] == keys["condu"] == keys["condu-sign"]
    assert keys["sequential"][0] == keys["wise-ft"][0] == keys["finetune"][0]
    assert keys["sequential"][1] != keys["finetune"][1]
    assert len({keys["condu-lora"][0], keys["lora-bank"][0], keys["condu"][0]}) == 3


def test_matrices_are_what_sessions_and_evaluations_measured(done: Any) -> None:
    benchmark, found, _ = done
    for name in SYSTEMS:
        store = open_store(benchmark.work / "seed-0" / name)
        matrices = [row(found, name, labels)["matrix"] for labels in spaces(SYSTEMS[name])]
        for version in store.versions():
            accuracy = store.manifest(version).figures["accuracy"]
            assert matrices[0][version - 1] == [accuracy[task] for task in TASKS]
            # Before it is learned, a task is answered by the vote among its own classes, whatever the labels.
            assert all(each[version - 1][version:] == matrices[0][version - 1][version:] for each in matrices)


def test_a_named_task_is_measured_as_a_user_who_names_it_is_answered(done: Any) -> None:
    benchmark, found, _ = done
    for name in ("finetune", "condu-sign"):
        expected = named_accuracy(str(benchmark.work / "seed-0" / name))
        assert row(found, name, "named")["matrix"][-1] == pytest.approx([expected[task] for task in TASKS])


def test_one_model_for_all_does_not_care_whether_the_task_is_named(done: Any) -> None:
    _, found, _ = done
    for name in ("zero-shot", "sequential", "wise-ft"):
        assert row(found, name, "candidates")["matrix"] == row(found, name)["matrix"]
        assert row(found, name)["router_accuracy"] is None
        assert row(found, name)["auroc"] is row(found, name)["router_alone"] is None


def test_every_competing_class_can_only_cost_a_single_model(done: Any) -> None:
    _, found, _ = done
    for name in ("zero-shot", "sequential"):
        assert np.all(np.array(row(found, name, "union")["matrix"]) <= row(found, name, "candidates")["matrix"])


def test_figures_follow_from_the_matrix(done: Any) -> None:
    benchmark, found, _ = done
    zero_shot, individual = bounds_of(benchmark, 0)
    assert zero_shot == row(found, "zero-shot")["last"]
    assert individual == row(found, "finetune")["last"]
    assert individual > zero_shot
    for each in found["results"]:
        matrix = AccuracyMatrix(TASKS, each["matrix"])
        assert (each["transfer"], each["average"], each["last"]) == (matrix.transfer(), matrix.average(), matrix.last())
        assert each["retention"] == pytest.approx(100 * (each["last"] - zero_shot) / (individual - zero_shot))
    assert row(found, "finetune")["retention"] == pytest.approx(100)
    assert row(found, "zero-shot")["retention"] == 0


def test_the_router_is_the_same_for_all_that_vote(done: Any) -> None:
    _, found, _ = done
    figures = {
        tuple(row(found, name)[key] for key in ("router_accuracy", "router_top2", "auroc", "router_alone"))
        for name in ("finetune", "lora-bank", "condu", "condu-lora", "condu-sign")
    }
    ((first, two, auroc, alone),) = figures
    assert 0 <= alone <= 100
    assert 0 <= first <= two <= 100
    assert 0 <= auroc <= 1


def test_the_probe_answers_learned_tasks_and_zero_shot_the_others(done: Any) -> None:
    _, found, _ = done
    probe, zero_shot = np.array(row(found, "linear-probe")["matrix"]), np.array(row(found, "zero-shot")["matrix"])
    above = np.triu_indices(3, 1)
    assert np.array_equal(probe[above], zero_shot[above])
    assert np.all(probe == np.where(np.tri(3, dtype=bool), probe[-1], zero_shot))
    assert probe[-1].mean() > zero_shot[-1].mean()


def test_what_is_counted_as_a_tasks_and_as_shared() -> None:
    sizes = {"birth-0": 8, "birth-1": 8, "flips-1": 4, "rescalers-1": 2, "u-1": 64, "prototypes-1": 5, "tests-1": 3}
    objects = {
        name: {"path": f"objects/k/{name}.safetensors", "bytes": size, "sha256": "0" * 64}
        for name, size in sizes.items()
    }
    card = {"classes": [], "templates": [], "source": "", "fingerprint": "", "method": "condu", "train_key": ""}
    tasks = [{**card, "name": name, "uid": uid, "learned_in": 1, "pictures": {}} for uid, name in enumerate("ab")]
    manifest = Manifest.model_validate({"version": 1, "kind": "learn", "tasks": tasks, "objects": objects})
    assert state_bytes(manifest) == (11, 64)


def test_bytes_are_of_the_state_alone(done: Any, tiny_clip: Clip) -> None:
    benchmark, found, _ = done
    config = SessionConfig.model_validate({"train": {"towers": "image"}})
    parameters = registry.get("finetune").layout(tiny_clip, config).parameters
    for name in SYSTEMS:
        manifest = open_store(benchmark.work / "seed-0" / name).manifest()
        known = (*OF_ONE_TASK, *OF_ALL_TASKS, *TASK_OBJECTS, "probe-")
        assert [each for each in manifest.objects if not each.startswith(known)] == [], name
        assert (row(found, name)["bytes_per_task"], row(found, name)["bytes_shared"]) == state_bytes(manifest)
    assert row(found, "zero-shot")["bytes_per_task"] == row(found, "zero-shot")["bytes_shared"] == 0
    assert row(found, "finetune")["bytes_per_task"] == pytest.approx(4 * parameters, rel=0.05)
    assert row(found, "sequential")["bytes_per_task"] == 0
    for name in ("sequential", "wise-ft", "condu", "condu-sign"):
        assert row(found, name)["bytes_shared"] == pytest.approx(4 * parameters, rel=0.2)
    for name in ("condu", "condu-sign"):
        assert parameters / 8 <= row(found, name)["bytes_per_task"] < parameters / 2


def adapted(rank: int) -> SessionConfig:
    given = {"method": "condu-lora", "lora": {"mode": "exact", "rank": rank}, "train": {"towers": "image"}}
    return SessionConfig.model_validate(given)


def test_the_bank_of_adapters_is_as_large_as_a_bit_plane(done: Any, tiny_clip: Clip, tiny_model_dir: Path) -> None:
    _, found, _ = done
    rank = row(found, "lora-bank")["rank"]
    assert rank == plane_rank(ModelSpec(name=f"local-dir:{tiny_model_dir}"), "image", "mlp")
    plane = registry.get("finetune").layout(tiny_clip, adapted(rank)).parameters / 8

    def miss(rank: int) -> float:
        return abs(2 * registry.get("condu-lora").layout(tiny_clip, adapted(rank)).parameters - plane)

    assert miss(rank) <= min(miss(rank + 1), miss(max(1, rank - 1)))
    assert row(found, "condu-lora")["rank"] == 4
    assert row(found, "condu")["rank"] is None


def test_seconds_are_those_of_training_and_fusing(done: Any) -> None:
    _, found, _ = done
    assert row(found, "zero-shot")["seconds"] is None
    full = row(found, "finetune")["seconds"]
    assert all(row(found, name)["seconds"] > 0 for name in METHODS if name != "zero-shot")
    assert row(found, "condu")["seconds"] > full / 2  # the training is counted, though another method did it


def test_a_picture_for_each_matrix(done: Any) -> None:
    benchmark, found, _ = done
    drawn = {path.name for path in (benchmark.work / "pictures").iterdir()}
    assert drawn == {f"{each['method']}-{each['labels']}-seed-0.png" for each in found["results"]}


def test_a_finished_benchmark_only_reads(done: Any) -> None:
    benchmark, found, _ = done
    assert measure(benchmark, nobody, silent) == found


def test_it_goes_on_with_other_workers_and_shards(done: Any) -> None:
    benchmark, found, _ = done
    placed = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0.5, "fusion.shards": 2}
    elsewhere = Benchmark(**{**vars(benchmark), "options": {**benchmark.options, **placed}})
    assert measure(elsewhere, nobody, silent) == found


def test_another_stream_or_setting_needs_another_folder(done: Any) -> None:
    benchmark, _, _ = done
    turned = Benchmark(**{**vars(benchmark), "stream": benchmark.stream.reversed()})
    with pytest.raises(ConfigError, match=r"holds a benchmark with tasks \['colours'.*use another --work"):
        measure(turned, nobody, silent)
    fewer = Benchmark(**{**vars(benchmark), "options": {**benchmark.options, "eval_pictures": 5}})
    with pytest.raises(ConfigError, match="holds a benchmark with eval_pictures 1000, not 5"):
        measure(fewer, nobody, silent)


def test_other_pictures_need_another_folder(done: Any, picture_tasks: dict[str, Path], tmp_path: Path) -> None:
    """What is learned stands beside what would be."""
    benchmark, _, _ = done
    shutil.copytree(benchmark.work, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "seed-0" / "condu")
    data = dict(benchmark.stream.tasks) | {"places": str(shutil.copytree(picture_tasks["places"], tmp_path / "places"))}
    again = Benchmark(**{**vars(benchmark), "work": tmp_path / "work", "stream": Stream(data)})
    shutil.copy(tmp_path / "places" / "train" / "edge" / "03.png", tmp_path / "places" / "train" / "edge" / "04.png")
    for seeds in ((0,), (0, 1)):
        asked = Benchmark(**{**vars(again), "seeds": seeds})
        with pytest.raises(DataError, match=r"task places has other pictures now than zero-shot learned.*--work"):
            measure(asked, nobody, silent)
    other = Benchmark(**{**vars(again), "seeds": (0, 1), "methods": ("zero-shot",)})
    with pytest.raises(DataError, match="task places has other pictures now"):  # the first seed is done
        measure(other, nobody, silent)


def test_a_setting_that_is_younger_than_the_folder_had_its_default(done: Any, tmp_path: Path) -> None:
    benchmark, found, _ = done
    shutil.copytree(benchmark.work, tmp_path / "work")
    claim = tmp_path / "work" / "benchmark.json"
    terms = json.loads(claim.read_text())
    del terms["vote.within"]
    claim.write_text(json.dumps(terms))
    moved = Benchmark(**{**vars(benchmark), "work": tmp_path / "work"})
    assert measure(moved, nobody, silent) == found
    other = Benchmark(**{**vars(moved), "options": {**benchmark.options, "vote.within": "expert"}})
    with pytest.raises(ConfigError, match="vote.within both, not expert"):
        measure(other, nobody, silent)


class Killed(Exception):
    """The process ends here."""


class Mortal(InProcessCrew):
    """Dies when it has been asked to score or to train so many times."""

    left = 0

    def score(self, *given: Any) -> Any:
        self._age()
        return super().score(*given)

    def train(self, *given: Any) -> Any:
        self._age()
        return super().train(*given)

    @classmethod
    def _age(cls) -> None:
        if cls.left == 0:
            raise Killed
        cls.left -= 1


def test_a_killed_run_goes_on_and_gives_the_same(
    done: Any, picture_tasks: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Trainings(monkeypatch)
    benchmark = order(tmp_path, picture_tasks, tiny_model_dir, ("condu", "sequential"))
    deaths = 0
    for lives in (0, 3, 2, 4, 3, 100):
        Mortal.left = lives
        try:
            found = measure(benchmark, lambda store, config: nullcontext(Mortal(store, config)), silent)
        except Killed:
            deaths += 1
    assert deaths == 5
    assert trainings.counts == {"colours": 1, "stripes": 2, "places": 2}
    for method in ("condu", "sequential"):
        for labels in spaces(SYSTEMS[method]):
            assert row(found, method, labels)["matrix"] == row(done[1], method, labels)["matrix"]


def test_settings_of_its_own_for_a_task_keep_transfer(
    done: Any, picture_tasks: dict[str, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Cut into two sessions, the first knows nothing of the last task; it is measured all the same."""
    sources = {name: str(picture_tasks[name]) for name in TASKS}
    stream = Stream(sources, settings={}, full={"places": {"vote.temperature": 0.07}})
    benchmark = order(tmp_path, picture_tasks, tiny_model_dir, ("finetune",), stream=stream)
    found = measure(benchmark, here, silent)
    assert open_store(benchmark.work / "seed-0" / "finetune").manifest(1).figures["accuracy"].keys() == {*TASKS[:2]}
    assert row(found, "finetune")["last"] == row(done[1], "finetune")["last"]
    assert row(found, "finetune")["transfer"] is not None


def test_a_second_seed_opens_the_same_pictures_and_trains_anew(
    picture_tasks: dict[str, Path], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Trainings(monkeypatch)
    benchmark = order(tmp_path, picture_tasks, tiny_model_dir, ("finetune",), seeds=(0, 1))
    found = measure(benchmark, here, silent)
    assert [each["seed"] for each in found["results"]] == [0] * 4 + [1] * 4
    assert trainings.counts == dict.fromkeys(TASKS, 2)


def test_methods_by_name() -> None:
    assert {name for name in METHODS if name not in catalogue.METHODS} == {"linear-probe", "lora-bank"}
    assert set(catalogue.METHODS) <= set(METHODS)
    assert check_methods(["condu", "condu", "zero-shot"]) == ("condu", "zero-shot")
    with pytest.raises(ConfigError, match=r"no method 'conduu': did you mean condu\?"):
        check_methods(["conduu"])
    with pytest.raises(ConfigError, match="there is no method to measure"):
        check_methods([])


def test_router_shares_by_hand() -> None:
    order = np.array([[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]])
    owners = np.array([0, 1, 1, 1])
    assert router_shares(order, owners) == (50, 75)
    assert router_shares(order[:, :1] * 0, owners * 0) == (None, None)
    assert router_shares(np.array([[0, 1], [0, 1]]), np.array([0, 1])) == (50, None)


def test_nearest_right_by_hand() -> None:
    """Two tasks of two and three classes, which the version learned the other way round; means over tasks."""
    tests = Split(tuple(Picture("") for _ in range(5)), np.array([0, 1, 0, 2, 2]))
    owners, learned = np.array([0, 0, 1, 1, 1]), np.array([1, 0])
    assert nearest_right(np.array([3, 4, 0, 2, 2]), [3, 2], learned, owners, tests) == 100
    assert nearest_right(np.array([3, 3, 0, 1, 4]), [3, 2], learned, owners, tests) == pytest.approx((50 + 100 / 3) / 2)


def test_auroc_by_hand() -> None:
    known = np.array([True, True, False, False])
    assert known_auroc(np.array([3.0, 2.0, 1.0, 0.0]), known) == 1
    assert known_auroc(np.array([3.0, 1.0, 2.0, 1.0]), known) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_a_cluster_that_goes_on_keeps_no_fusion_actor_of_a_finished_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each system and seed one stayed on the head, with its process and the state of its store."""
    events = list[str]()

    class Crew:
        def __init__(self, store: Any, config: SessionConfig, cluster: Cluster) -> None:
            self._store = store.url

        def close(self) -> None:
            events.append(f"close {self._store}")

        def dismiss(self) -> None:
            events.append(f"dismiss {self._store}")

    def use(benchmark: Any, crews: Any, stage: Any) -> dict[str, Any]:
        for url in ("a", "a", "b"):
            with crews(SimpleNamespace(url=url), SessionConfig()):
                events.append(f"work {url}")
        return {}

    @contextmanager
    def connected() -> Iterator[Cluster]:
        yield Cluster(((2, 0),), joined=True)
        events.append("left")

    for name, stand_in in {"RayCrew": Crew, "measure": use, "connected": connected}.items():
        monkeypatch.setattr(running, name, stand_in)
    running.run(None, silent)  # type: ignore[arg-type]
    assert events == ["work a", "close a", "work a", "close a", "dismiss a", "work b", "close b", "dismiss b", "left"]
