"""Systems that learn an adapter on features, through the session's own spine: order, resuming, answers, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from command_line import condu
from in_process_crew import InProcessCrew, contents, learn_here, make_store, opened, settings, silent
from PIL import Image
from safetensors.torch import load_file

from condu_ray.config import SessionConfig
from condu_ray.data.templates import prompts
from condu_ray.engine import placement
from condu_ray.engine.cluster import Cluster
from condu_ray.engine.export import export
from condu_ray.engine.forget import forget
from condu_ray.engine.session import learn
from condu_ray.errors import TrainingError
from condu_ray.methods import adapter
from condu_ray.methods.stored import layout_of, state_of
from condu_ray.models.clip import class_embeddings
from condu_ray.models.head import mixed
from condu_ray.store import open_store
from condu_ray.voting.open import load_classifier
from condu_ray.voting.pictures import classify_paths

Folders = dict[str, Path]
BOTH = pytest.mark.parametrize("method", ["rapf", "calfuse"])
TASKS = ["colours", "stripes", "places"]


def asked(store: Path, model: Path, method: str, **others: Any) -> SessionConfig:
    given = {"adapter__epochs": 4, "adapter__batch_size": 12, "memory__per_epoch": 60, **others}
    return settings(store, model, method=method, **given)


@pytest.fixture(scope="module")
def stores(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SessionConfig]:
    """Settings of a store of each system with three tasks."""
    made = {}
    for method in ("rapf", "calfuse"):
        made[method] = asked(tmp_path_factory.mktemp(method) / "store", tiny_model_dir, method)
        learn_here(made[method], opened(picture_tasks, *TASKS))
    return made


class CountsFeatures(InProcessCrew):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.passes = 0

    def features(self, *given: Any) -> Any:
        self.passes += 1
        return super().features(*given)


@BOTH
def test_each_task_moves_the_one_adapter_and_leaves_its_statistics(
    stores: dict[str, SessionConfig], method: str
) -> None:
    store = open_store(stores[method].store)
    assert store.versions() == [1, 2, 3]
    states = [state_of(store, store.manifest(version)) for version in store.versions()]
    for number, state in enumerate(states, start=1):
        assert list(state.memory) == TASKS[:number]
        deltas = [state.delta(task) for task in state.tasks]
        assert all(np.array_equal(delta, deltas[0]) for delta in deltas)
    for task in TASKS[:2]:
        first, last = (state.memory[task] for state in states[1:])
        assert all(np.array_equal(values, last[name]) for name, values in first.items())
    assert not np.array_equal(states[0].delta("colours"), states[1].delta("colours"))
    for version in store.versions():
        figures = store.manifest(version).task("colours").figures
        assert all(0 <= figures[name] <= 100 for name in ("zero_shot", "own", "before", "expert"))
    assert not [name for name in contents(store.url) if name.endswith(("/features.safetensors", "/delta.safetensors"))]


@BOTH
def test_the_adapter_of_a_version_is_the_trained_one_fused_with_the_one_before(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked(tmp_path / "store", tiny_model_dir, method)
    trained = []
    real = adapter.fit

    def kept(*given: Any) -> Any:
        trained.append(real(*given))
        return trained[-1]

    monkeypatch.setattr(adapter, "fit", kept)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    store = open_store(config.store)
    layout = layout_of(store.header)
    first, second = (state_of(store, store.manifest(version)).delta("colours") for version in (1, 2))
    new = adapter.delta_of(layout, trained[1].adapter)
    assert np.array_equal(first, adapter.delta_of(layout, trained[0].adapter))
    assert np.array_equal(second, adapter.moved(first, new, layout, config))
    assert 0.6 <= np.linalg.norm((second - first)[:-1]) / np.linalg.norm((new - first)[:-1]) <= 1


@BOTH
def test_a_version_answers_by_its_adapter_and_exports_it(
    stores: dict[str, SessionConfig], picture_tasks: Folders, tmp_path: Path, method: str
) -> None:
    pictures = sorted((picture_tasks["stripes"] / "test").rglob("*.png"))[::3]
    store = open_store(stores[method].store)
    said = classify_paths(load_classifier(store.url), pictures, task="stripes")
    export(store, store.manifest(), "stripes", tmp_path / "expert.safetensors")
    weights = load_file(tmp_path / "expert.safetensors")
    head = {name: weights.pop(name) for name in list(weights) if name.startswith("head.")}
    told = [f"head.discriminant.{part}.{name}" for part in ("bias", "weight") for name in sorted(TASKS)]
    assert sorted(head) == [*(told if method == "calfuse" else []), "head.share.normalized", "head.weight"]
    clip = load_classifier(store.url).clip
    assert set(weights) == set(clip.model.state_dict())
    card = store.manifest().task("stripes")
    pixels = torch.stack([clip.eval_transform(Image.open(path).convert("RGB")) for path in pictures])
    with torch.no_grad():
        images = clip.model.encode_image(pixels)
        texts = class_embeddings(clip, [prompts(name, card.templates) for name in card.classes])
        features = mixed(images, head["head.weight"], float(head["head.share.normalized"]), "normalized")
        logits = clip.logit_scale * features @ texts.T
        if method == "calfuse":
            logits += features @ head["head.discriminant.weight.stripes"].T + head["head.discriminant.bias.stripes"]
        shares = logits.softmax(dim=1)
    by_words = classify_paths(load_classifier(store.url), pictures, labels=card.classes)
    for answer, same, row in zip(said, by_words, shares, strict=True):
        assert answer["label"] == same["label"] == card.classes[int(row.argmax())]
        assert answer["probability"] == pytest.approx(float(row.max()), abs=1e-4)
        assert same["probability"] == pytest.approx(answer["probability"], abs=1e-5)


@BOTH
def test_all_learned_classes_and_words_of_the_caller_are_answered(
    stores: dict[str, SessionConfig], picture_tasks: Folders, method: str
) -> None:
    classifier = load_classifier(stores[method].store)
    pictures = sorted((picture_tasks["places"] / "test").rglob("*.png"))[:2]
    (one, _) = classify_paths(classifier, pictures, top=20)
    assert len(one["labels"]) == 9
    assert one["votes"][0]["weight"] == 1
    assert len(classify_paths(classifier, pictures, labels=["a lighthouse", "a bridge"])[0]["labels"]) == 2


@BOTH
def test_one_command_or_several_give_the_same_store(
    stores: dict[str, SessionConfig], tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, method: str
) -> None:
    config = asked(tmp_path / "store", tiny_model_dir, method)
    for task in TASKS:
        learn_here(config, opened(picture_tasks, task))

    def adapters(store: str) -> list[Any]:
        opened = open_store(store)
        return [state_of(opened, opened.manifest(number)).delta("colours") for number in opened.versions()]

    for one, other in zip(adapters(config.store), adapters(stores[method].store), strict=True):
        assert np.array_equal(one, other)


def test_a_killed_session_goes_on_and_computes_features_once(
    stores: dict[str, SessionConfig], tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, monkeypatch: Any
) -> None:
    config = asked(tmp_path / "store", tiny_model_dir, "calfuse")
    tasks = opened(picture_tasks, *TASKS)
    store = make_store(config)
    real, fitted = adapter.fit, []

    def dies(task: str, *given: Any) -> Any:
        if task == "stripes" and "stripes" not in fitted:
            fitted.append(task)
            raise KeyboardInterrupt
        fitted.append(task)
        return real(task, *given)

    monkeypatch.setattr(adapter, "fit", dies)
    first, again = CountsFeatures(store, config), CountsFeatures(store, config)
    with pytest.raises(KeyboardInterrupt):
        learn(store, config, tasks, first, silent)
    assert store.versions() == []
    learn(store, config, tasks, again, silent)
    assert (first.passes, again.passes) == (3, 0)
    assert fitted == ["colours", "stripes", "stripes", "places"]
    assert contents(config.store).keys() == contents(stores["calfuse"].store).keys()


@BOTH
def test_forgetting_drops_a_tasks_statistics_and_leaves_the_adapter(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path, method: str
) -> None:
    config = asked(tmp_path / "store", tiny_model_dir, method)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    store = open_store(config.store)
    before = state_of(store, store.manifest())
    after = state_of(store, forget(store, "colours"))
    assert list(after.memory) == ["stripes"]
    assert np.array_equal(after.delta("stripes"), before.delta("stripes"))
    (third,) = learn_here(config, opened(picture_tasks, "places"))
    assert [card.name for card in third.tasks] == ["stripes", "places"]


def test_they_say_that_they_are_ordered_when_asked_to_train_at_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = asked(tmp_path / "store", tiny_model_dir, "rapf", parallel="tasks")
    with pytest.raises(TrainingError, match="rapf learns one task after another, so 2 tasks cannot be trained at once"):
        placement.check_workers(config, 2, Cluster([(4, 0)], joined=True))
    placement.check_workers(config, 1, Cluster([(4, 0)], joined=True))


def test_open_clip_reads_the_towers_of_an_export(
    stores: dict[str, SessionConfig], tiny_model_dir: Path, tmp_path: Path
) -> None:
    store = open_store(stores["rapf"].store)
    export(store, store.manifest(), "places", tmp_path / "expert.safetensors")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_model_dir}")
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "expert.safetensors"), strict=False)
    assert missing == []
    assert all(name.startswith("head.") for name in unexpected)


def test_the_command_learns_on_ray_what_the_spine_learns_here(
    ray_cluster: None,
    stores: dict[str, SessionConfig],
    tiny_model_dir: Path,
    picture_tasks: Folders,
    tmp_path: Path,
) -> None:
    given = [f"--task={name}={picture_tasks[name]}" for name in TASKS]
    short = ["--adapter.epochs=4", "--adapter.batch-size=12", "--memory.per-epoch=60", "--tracking=off"]
    store = tmp_path / "store"
    said = condu(
        "learn",
        *given,
        *short,
        "--method",
        "calfuse",
        "--model",
        f"local-dir:{tiny_model_dir}",
        "--store",
        store,
        "--json",
    )
    assert said.code == 0, said.err
    assert said.document["made"] == [1, 2, 3]
    deltas = []
    for url in (str(store), stores["calfuse"].store):
        opened = open_store(url)
        deltas.append(state_of(opened, opened.manifest()).delta("places"))
    np.testing.assert_allclose(deltas[0], deltas[1], atol=1e-4)
    pictures = sorted((picture_tasks["stripes"] / "test").rglob("*.png"))[:2]
    asked = condu("predict", *pictures, "--store", store, "--json")
    assert [each["label_space"] for each in asked.document] == ["union", "union"]
