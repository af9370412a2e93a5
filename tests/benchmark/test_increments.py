"""Class-incremental streams: which classes a session learns, whose names are understood, and what is refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process_crew import InProcessCrew, silent
from PIL import Image

from condu_ray.benchmark.increments import RECIPES, SETS, cuts, increments, is_incremental, unknown
from condu_ray.benchmark.run import measure
from condu_ray.benchmark.settings import Benchmark, sessions
from condu_ray.benchmark.stream import Stream
from condu_ray.benchmark.systems import SYSTEMS
from condu_ray.benchmark.work import check, claim
from condu_ray.data import classes_of, open_task
from condu_ray.errors import ConfigError, DataError
from condu_ray.store import open_store
from condu_ray.tracking.matrix import AccuracyMatrix

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


def write_set(folder: Path, classes: list[str], train: int = 3, test: int = 2) -> Path:
    for label, name in enumerate(classes):
        for number in range(train + test):
            pixels = np.random.default_rng([label, number]).integers(0, 60, (16, 16, 3))
            pixels[..., label % 3] += 20 * label % 190
            file = folder / ("train" if number < train else "test") / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "animals", CLASSES)


@given(classes=st.integers(2, 300), base=st.integers(0, 150), increment=st.integers(2, 60))
def test_every_class_is_in_one_session_of_at_least_two(classes: int, base: int, increment: int) -> None:
    if (base or increment) > classes or base == 1:
        with pytest.raises(ConfigError):
            cuts(classes, base, increment)
        return
    found = cuts(classes, base, increment)
    every = [place for first, last in found for place in range(first, last + 1)]
    assert every == list(range(1, classes + 1))
    assert all(last > first for first, last in found)
    assert all(last - first + 1 == increment for first, last in found[1:-1])


def test_published_streams_have_their_sessions() -> None:
    assert len(cuts(100, 0, 10)) == len(cuts(200, 0, 20)) == 10
    assert [last - first + 1 for first, last in cuts(100, 50, 10)] == [50, 10, 10, 10, 10, 10]
    assert [last - first + 1 for first, last in cuts(101, 0, 10)] == [*[10] * 9, 11]


def test_classes_come_in_the_order_of_the_seed_and_are_numbered_anew(animals: Path) -> None:
    stream = increments("b0", str(animals), 3, None)
    assert list(stream.tasks) == ["session-1", "session-2"]
    tasks = [open_task(name, source) for name, source in stream.tasks.items()]
    order = [CLASSES[place] for place in np.random.RandomState(1993).permutation(len(CLASSES))]
    assert [*tasks[0].classes, *tasks[1].classes] == order
    for task in tasks:
        for picture, label in zip(task.test.pictures, task.test.labels, strict=True):
            assert f"/{task.classes[label]}/" in picture.path


def test_an_order_may_be_a_file_of_names_or_numbers(animals: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("gnu\nfox\nelk\ndog\ncat\nbee\nant\n")
    (tmp_path / "numbers.txt").write_text("6\n5\n4\n3\n2\n1\n0\n")
    for name in ("names.txt", "numbers.txt"):
        stream = increments("b3", str(animals), 2, str(tmp_path / name))
        assert [classes_of(source) for source in stream.tasks.values()] == [("gnu", "fox", "elk"), ("dog", "cat")] + [
            ("bee", "ant")
        ]
    (tmp_path / "short.txt").write_text("gnu\nfox\n")
    (tmp_path / "strange.txt").write_text("gnu\nfox\nelk\ndog\ncat\nbee\nyak\n")
    for name, said in (("short.txt", "2 lines"), ("strange.txt", "'yak' is none"), ("none.txt", "no class order")):
        with pytest.raises(DataError, match=said):
            [open_task("t", each) for each in increments("b3", str(animals), 2, str(tmp_path / name)).tasks.values()]


def test_several_sets_make_one_stream(animals: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "more", ["oak", "elm", "ash", "fir"])
    stream = increments("b0", f"{animals},{other}", 2, "0")
    assert len(stream.tasks) == 3 + 2
    assert {name for source in stream.tasks.values() for name in classes_of(source)} == {
        *CLASSES,
        *("oak", "elm", "ash", "fir"),
    }


def test_what_cannot_be_cut_is_one_sentence(animals: Path) -> None:
    for given_increment, said in (
        (None, "needs the number of classes"),
        (1, "sessions of 1 classes"),
        (8, "of 8 of 7"),
    ):
        with pytest.raises(ConfigError, match=said):
            increments("b0", str(animals), given_increment, None)
    with pytest.raises(DataError, match="there are no classes 5 to 9 of 7"):
        open_task("t", f"{animals}#5-9")
    assert "b50" in str(unknown("b5o", ("mtil-1",)))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_find_their_set_and_carry_published_settings(name: str, tmp_path: Path) -> None:
    kind = next(each for each in SETS if name.startswith(each))
    chosen = SETS[kind]
    write_set(tmp_path / chosen.folders[-1], [f"class {number}" for number in range(chosen.classes)], 1, 1)
    assert is_incremental(name)
    stream = increments(name, str(tmp_path), None, None)
    sizes = [len(classes_of(source)) for source in stream.tasks.values()]
    assert sum(sizes) == chosen.classes
    benchmark = Benchmark(stream, ("rapf",), (2,), tmp_path / "work")
    (config, _), *_ = sessions(benchmark, SYSTEMS["rapf"], 2)
    batch, draws = (50, 4000) if name == "cifar100-b50-5" else (chosen.settings["adapter.batch_size"], 2000)
    assert (config.model, config.adapter.batch_size) == ("ViT-B-16-quickgelu", batch)
    assert config.memory.per_epoch == draws
    assert config.adapter.epochs == 15, "what RAPF read its tables with"
    with pytest.raises(DataError, match=f"lacks 1 of {kind}"):
        increments(name, str(tmp_path / "work"), None, None) if (tmp_path / "work").mkdir() is None else None


def claimed(stream: Stream, work: Path) -> None:
    benchmark = Benchmark(stream, ("zero-shot",), (0,), work)
    check(benchmark)
    claim(benchmark)


def test_a_work_folder_is_for_one_order_of_one_set_wherever_that_lies(animals: Path, tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_text("gnu\nfox\nelk\ndog\ncat\nbee\nant\n")
    moved, other = write_set(tmp_path / "moved", CLASSES), write_set(tmp_path / "other", [*CLASSES[:-1], "yak"])
    claimed(increments("b0", str(animals), 3, None), tmp_path / "work")
    claimed(increments("b0", str(moved), 3, None), tmp_path / "work")
    for data, order, said in (
        (animals, "7", r"parts \['#1-3@1993', '#4-7@1993'\], not \['#1-3@7', '#4-7@7'\]"),
        (animals, str(tmp_path / "order.txt"), r"not \['#1-3@order.txt', '#4-7@order.txt'\]"),
        (other, None, "holds a benchmark with class 6 gnu, not yak: use another --work, or the same stream"),
    ):
        with pytest.raises(ConfigError, match=said):
            claimed(increments("b0", str(data), 3, order), tmp_path / "work")
    turned = increments("b0", str(animals), 3, "7").classes  # of the same cut, as a file with other lines would make it
    with pytest.raises(ConfigError, match="class 1 "):
        claimed(replace(increments("b0", str(animals), 3, None), classes=turned), tmp_path / "work")


def test_a_work_folder_of_an_earlier_release_goes_on(animals: Path, tmp_path: Path) -> None:
    stream, file = increments("b0", str(animals), 3, None), tmp_path / "work" / "benchmark.json"
    claimed(stream, tmp_path / "work")
    terms = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in terms.items() if name not in ("parts", "classes")}))
    claimed(stream, tmp_path / "work")
    assert json.loads(file.read_text()) == terms


def test_torchvision_has_cifar100_alone() -> None:
    with pytest.raises(ConfigError, match="torchvision has no cub200"):
        increments("cub200-b0-20", "torchvision", None, None)


def test_a_session_counts_every_picture_of_the_classes_so_far_once() -> None:
    matrix = AccuracyMatrix(["a", "b"], [[80.0, 10.0], [50.0, 90.0]])
    assert matrix.incremental_row([1, 3]) == [80.0, 80.0]
    assert AccuracyMatrix(["a", "b"], [[80.0, None], [None, 90.0]]).incremental_row([1, 3]) == [80.0, None]


@pytest.mark.parametrize("measured_on", [1000, 4])
def test_the_benchmark_measures_systems_that_learn_class_by_class(
    animals: Path, tiny_model_dir: Path, tmp_path: Path, measured_on: int
) -> None:
    """A sample of a task's test pictures counts for all of them."""
    file = tmp_path / "short.yaml"
    file.write_text("adapter: {epochs: 1, batch_size: 4}\nmemory: {per_epoch: 10}\n")
    stream, model = increments("b0", str(animals), 3, None), {"model": f"local-dir:{tiny_model_dir}"}
    model["eval_pictures"] = str(measured_on)
    benchmark = Benchmark(stream, ("zero-shot", "rapf", "calfuse"), (0,), tmp_path / "work", model, file)
    found: dict[str, Any] = measure(benchmark, lambda store, config: nullcontext(InProcessCrew(store, config)), silent)
    for row in found["results"]:
        if row["labels"] != "union":
            assert row["incremental_average"] is row["incremental_last"] is None
            continue
        (first, _), (one, two) = row["matrix"]
        last = (3 * one + 4 * two) / 7
        assert row["incremental_last"] == pytest.approx(last)
        assert row["incremental_average"] == pytest.approx((first + last) / 2)
    for method in ("rapf", "calfuse"):
        row = next(each for each in found["results"] if each["method"] == method)
        assert row["seconds"] > 0
        assert row["bytes_per_task"] > 0
        assert row["bytes_shared"] > 0
        store = open_store(tmp_path / "work" / "seed-0" / method)
        assert [len(card.classes) for card in store.manifest().tasks] == [3, 4]
