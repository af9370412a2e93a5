"""MTIL by name: the published orders and rates; sets found under the names they go by, missing ones told at once."""

from __future__ import annotations

import tarfile
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from in_process_crew import InProcessCrew, silent
from PIL import Image

from condu_ray.benchmark.protocols import ORDERS, SETS, protocol
from condu_ray.benchmark.run import measure
from condu_ray.benchmark.settings import Benchmark, sessions
from condu_ray.benchmark.stream import Stream, parse_stream
from condu_ray.benchmark.systems import SYSTEMS
from condu_ray.errors import ConfigError, DataError
from condu_ray.store import open_store

CALLED = {
    "Aircraft": "fgvc_aircraft",
    "CIFAR100": "cifar100",
    "Flowers": "oxford-flowers102",
    "Food": "food101",
    "OxfordPet": "pets",
    "StanfordCars": "stanford_cars",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for each set, called as people call it."""
    for name in SETS:
        (tmp_path / "data" / CALLED.get(name, name.lower())).mkdir(parents=True)
    return tmp_path / "data"


def rates(stream: Stream, system: str, work: Path, **more: Any) -> dict[str, float | None]:
    benchmark = Benchmark(stream, (system,), (42,), work, {"model": "default"}, **more)
    parts = sessions(benchmark, SYSTEMS[system], 42)
    return {task: config.train.lr for config, tasks in parts for task in tasks}


def test_both_orders_hold_the_eleven_sets() -> None:
    assert len(SETS) == 11
    assert ORDERS["mtil-1"] == tuple(sorted(SETS, key=str.casefold))
    assert sorted(ORDERS["mtil-2"]) == sorted(SETS)
    assert ORDERS["mtil-2"][:2] + ORDERS["mtil-2"][-1:] == ("StanfordCars", "Food", "CIFAR100")


@pytest.mark.parametrize("name", ORDERS)
def test_sets_are_found_by_the_names_they_go_by(name: str, root: Path) -> None:
    stream = protocol(name, str(root))
    assert tuple(stream.tasks) == ORDERS[name]
    assert stream.tasks["Aircraft"] == str(root / "fgvc_aircraft")
    assert stream.tasks["OxfordPet"] == str(root / "pets")


def test_every_missing_set_is_told_at_once(root: Path) -> None:
    (root / "pets").rmdir()
    (root / "dtd").rmdir()
    (root / "dtd10").mkdir()  # another set
    with pytest.raises(DataError, match=r"lacks 2 of the 11 sets of MTIL: DTD, OxfordPet or oxford_pets"):
        protocol("mtil-1", str(root))


def test_a_set_may_be_a_table(root: Path) -> None:
    (root / "dtd").rmdir()
    (root / "DTD.csv").write_text("path,label\n")
    assert protocol("mtil-1", str(root)).tasks["DTD"] == str(root / "DTD.csv")


def test_torchvision_has_all_of_them() -> None:
    assert protocol("mtil-2", "torchvision").tasks["Food"] == "torchvision:Food101"


def test_no_folder_and_no_protocol_are_one_sentence(root: Path) -> None:
    with pytest.raises(DataError, match="--data .*nowhere is not a folder"):
        protocol("mtil-1", str(root / "nowhere"))
    with pytest.raises(ConfigError, match="--protocol mtil3 is not known: did you mean mtil-"):
        protocol("mtil3", str(root))


def test_rates_are_those_of_the_released_scripts(root: Path, tmp_path: Path) -> None:
    stream = protocol("mtil-1", str(root))
    full = rates(stream, "sequential", tmp_path / "work")
    assert full == dict.fromkeys(SETS, 1e-5) | {"Aircraft": 5e-5, "MNIST": 5e-5}
    lora = rates(stream, "condu-lora", tmp_path / "work")
    assert (lora["Aircraft"], lora["Flowers"], lora["SUN397"]) == (1e-3, 1e-5, 1.5e-3)
    assert set(rates(stream, "dmc-ot", tmp_path / "work").values()) == {None}, "it trains adapters, at its own rate"


def test_tasks_that_share_settings_are_learned_in_one_session(root: Path, tmp_path: Path) -> None:
    benchmark = Benchmark(protocol("mtil-1", str(root)), ("condu",), (42,), tmp_path / "work", {"model": "default"})
    parts = sessions(benchmark, SYSTEMS["condu"], 42)
    assert [tasks[0] for _, tasks in parts] == ["Aircraft", "Caltech101", "MNIST", "OxfordPet"]
    assert [task for _, tasks in parts for task in tasks] == list(ORDERS["mtil-1"])
    config = parts[0][0]
    assert (config.train.steps, config.train.batch_size, config.seed) == (1000, 64, 42)


def test_a_file_stands_above_the_protocol(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump({"train": {"steps": 7, "lr": 0.25}}))
    stream = protocol("mtil-1", str(root))
    assert set(rates(stream, "condu", tmp_path / "work", file=file).values()) == {0.25}


def test_the_published_weights_go_with_the_published_model_alone(root: Path, tmp_path: Path) -> None:
    stream = protocol("mtil-1", str(root))
    own = Benchmark(stream, ("condu",), (42,), tmp_path / "work")
    (config, _), *_ = sessions(own, SYSTEMS["condu"], 42)
    assert (config.model, config.pretrained) == ("ViT-B-16-quickgelu", "openai")
    other = Benchmark(stream, ("condu",), (42,), tmp_path / "work", {"model": "default"})
    (config, _), *_ = sessions(other, SYSTEMS["condu"], 42)
    assert (config.model, config.pretrained) == ("default", None)


def write_stand_in(folder: Path, seed: int) -> None:
    """A webdataset folder of two classes, as the sets of MTIL are kept."""
    random = np.random.default_rng(seed)
    (folder / "classnames.txt").write_text(f"dark {seed}\nlight {seed}\n")
    (folder / "zeroshot_classification_templates.txt").write_text(f"stand-in {seed}: {{c}}.\n")
    for part, each in (("train", 3), ("test", 2)):
        (folder / part).mkdir()
        (folder / part / "nshards.txt").write_text("1")
        with tarfile.open(folder / part / "0.tar", "w:gz") as tar:
            for number in range(2 * each):
                label, picture = number % 2, BytesIO()
                pixels = random.integers(0, 100, (16, 16, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(picture, "png")
                for ending, body in (("png", picture.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{ending}")
                    member.size = len(body)
                    tar.addfile(member, BytesIO(body))


def test_the_whole_protocol_runs_on_stand_ins(
    root: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into four sessions by rate, and Transfer is there all the same; names and prompts are the folders' own."""
    monkeypatch.setenv("CONDU_CACHE", str(tmp_path / "cache"))
    for seed, folder in enumerate(sorted(root.iterdir())):
        write_stand_in(folder, seed)
    file = tmp_path / "short.yaml"
    file.write_text("train: {steps: 1, batch_size: 2, towers: image}")
    stream, model = protocol("mtil-1", str(root)), {"model": f"local-dir:{tiny_model_dir}"}
    benchmark = Benchmark(stream, ("finetune",), (42,), tmp_path / "work", model, file)
    found = measure(benchmark, lambda store, config: nullcontext(InProcessCrew(store, config)), silent)
    cards = open_store(tmp_path / "work" / "seed-42" / "finetune").manifest().tasks
    assert [card.name for card in cards] == found["stream"] == list(ORDERS["mtil-1"])
    assert [card.settings["train"]["lr"] for card in cards] == [SETS[card.name].lr for card in cards]
    places = [each.name for each in sorted(root.iterdir())]
    dtd = cards[3]
    assert dtd.classes == [f"{shade} {places.index('dtd')}" for shade in ("dark", "light")]
    assert dtd.templates == [f"stand-in {places.index('dtd')}: {{c}}."]
    assert all(row["transfer"] is not None for row in found["results"])


def test_a_stream_is_a_list_of_names_and_paths() -> None:
    stream = parse_stream("b=one,a=two")
    assert dict(stream.tasks) == {"b": "one", "a": "two"}
    assert list(stream.tasks) == ["b", "a"]
    assert list(stream.reversed().tasks) == ["a", "b"]
    for wrong, said in (("b", "'b' is not NAME=PATH"), ("b=1,b=2", "task b is given twice")):
        with pytest.raises(ConfigError, match=said):
            parse_stream(wrong)
