"""Old stores open: one that the first release wrote answers as it did, goes on learning, and names what is damaged."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from in_process_crew import learn_here, opened

from condu_ray.engine.forget import forget
from condu_ray.errors import DamagedObject, StoreError
from condu_ray.sources import resolve
from condu_ray.store import open_store
from condu_ray.store.header import fixed_settings
from condu_ray.store.manifest import FORMAT
from condu_ray.voting.open import load_classifier
from condu_ray.voting.pictures import classify_paths

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
KEPT = FIXTURES / "store_v1"
ANSWERS = json.loads((KEPT / "answers.json").read_text())


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_store_v1", FIXTURES / "make_store_v1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store's base model, its weights made again."""
    folder: Path = maker.write_model(tmp_path_factory.mktemp("v1") / "model")
    return folder


@pytest.fixture
def store(model: Path, tmp_path: Path) -> Path:
    """A copy of the kept store that knows where its model is."""
    copy = Path(shutil.copytree(KEPT / "store", tmp_path / "store"))
    for file in [copy / "store.json", *(copy / "versions").iterdir()]:
        file.write_text(file.read_text().replace("{model}", str(model)))
    return copy


def ask(store: Path, picture: str, version: int, task: str | None) -> dict[str, Any]:
    (said,) = classify_paths(load_classifier(store, version), [KEPT / "pictures" / picture], task)
    return said


def test_it_opens_and_every_object_is_whole(store: Path) -> None:
    opened_store = open_store(store)
    manifests = [opened_store.manifest(version) for version in opened_store.versions()]
    assert [each.kind for each in manifests] == ["learn", "learn", "forget", "rollback"]
    assert [[card.name for card in each.tasks] for each in manifests] == [
        ["colours"],
        ["colours", "stripes"],
        ["stripes"],
        ["colours", "stripes"],
    ]
    refs = {ref.path: ref for each in manifests for ref in each.objects.values()}
    assert set(refs) == {path.relative_to(store).as_posix() for path in store.glob("objects/*/*")}
    assert [opened_store.fault(ref) for ref in refs.values()] == [None] * 14


def test_it_answers_as_it_did(store: Path) -> None:
    assert len(ANSWERS) == 15
    for each in ANSWERS:
        said, then = ask(store, each["picture"], each["version"], each["task"]), each["answer"]
        assert [name for name in said if name != "strangeness"] == list(then)
        assert said["strangeness"] is None or 0 <= said["strangeness"] <= 1
        assert (said["label"], said["task"], said["label_space"], said["version"]) == (
            then["label"],
            then["task"],
            then["label_space"],
            then["version"],
        )
        assert said["probability"] == pytest.approx(then["probability"], abs=1e-4)
        shares = {(one["task"], one["label"]): one["probability"] for one in said["labels"]}
        assert shares == pytest.approx(
            {(one["task"], one["label"]): one["probability"] for one in then["labels"]}, abs=1e-4
        )
        votes = {one["task"]: one["weight"] for one in said["votes"]}
        assert votes == pytest.approx({one["task"]: one["weight"] for one in then["votes"]}, abs=1e-4)


def test_it_goes_on_learning_and_forgetting(store: Path, picture_tasks: dict[str, Path]) -> None:
    given = {"store": str(store), "train.steps": 4, "train.batch_size": 8}
    config, _ = resolve(given, fixed=fixed_settings(str(store)))
    (made,) = learn_here(config, opened(picture_tasks, "places"))
    assert (made.version, [card.name for card in made.tasks]) == (5, ["colours", "stripes", "places"])
    assert 0 < made.task("colours").figures["cosine"] <= 1
    assert made.task("places").figures["expert"] is not None
    assert [card.name for card in forget(open_store(store), "colours").tasks] == ["stripes", "places"]
    before = next(each for each in ANSWERS if (each["version"], each["task"]) == (3, "stripes"))
    assert ask(store, before["picture"], 3, "stripes")["label"] == before["answer"]["label"]


def test_a_version_made_of_an_old_one_has_todays_format(store: Path) -> None:
    old = open_store(store).manifest()
    made = forget(open_store(store), "colours")
    assert (old.format, made.format, made.version) == (1, FORMAT, old.version + 1)


def test_the_very_same_task_is_known_again(store: Path, maker: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    for label, name in enumerate(maker.CLASSES["colours"]):
        for number in range(16):
            file = tmp_path / "colours" / ("train" if number < 12 else "test") / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(maker.draw("colours", label, number)).save(file)
    learned_with = {"train.steps": 40, "train.batch_size": 8, "train.lr": 2e-3}
    config, _ = resolve({"store": str(store), **learned_with}, fixed=fixed_settings(str(store)))
    assert learn_here(config, opened({"colours": tmp_path / "colours"}, "colours")) == []


def test_a_damaged_object_is_named_and_an_older_version_still_answers(store: Path) -> None:
    newest = open_store(store).manifest()
    path = store / next(ref.path for name, ref in newest.objects.items() if name.startswith("u-"))
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    with pytest.raises(DamagedObject, match=rf"{path.name} is damaged.*version 1 is whole and still serves"):
        load_classifier(store)
    then = next(each for each in ANSWERS if each["version"] == 1)
    assert ask(store, then["picture"], 1, None)["label"] == then["answer"]["label"]


@pytest.mark.parametrize("how", ["cut", "flipped", "removed"])
def test_each_damaged_file_of_an_old_store_is_named(store: Path, how: str) -> None:
    """Whichever file it is: header, manifest or object. The others are still read."""
    versions = open_store(store).versions()
    names = ["store.json", *(f"versions/{number:08d}.json" for number in versions)]
    names += sorted({ref.path for n in versions for ref in open_store(store).manifest(n).objects.values()})
    assert len(names) > 10
    for name in names:
        path, body = store / name, (store / name).read_bytes()
        path.unlink()
        if how != "removed":
            middle = len(body) // 2
            path.write_bytes(
                body[:middle] if how == "cut" else body[:middle] + bytes([body[middle] ^ 255]) + body[middle + 1 :]
            )
        if how == "removed" and name.startswith("versions/"):
            assert len(open_store(store).versions()) == len(versions) - 1
        else:
            faults = []
            with pytest.raises(StoreError, match=path.name if name != "store.json" or how != "removed" else "no store"):
                opened_store = open_store(store)
                for number in versions:
                    for ref in opened_store.manifest(number).objects.values():
                        if opened_store.fault(ref):
                            faults.append(ref.path)
                            opened_store.get(ref)
            assert faults in ([], [name])
        path.write_bytes(body)
