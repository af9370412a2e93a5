"""DMC and DMC-OT through sessions: two stages, a memory that follows the image tower, prompts that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_drift
import numpy as np
import pytest
import torch
from in_process_crew import InProcessCrew, contents, learn_here, opened, settings, silent
from numpy.typing import NDArray
from safetensors.torch import load_file

from condu_ray.config import SessionConfig
from condu_ray.data.loading import PictureSet
from condu_ray.data.templates import DEFAULT_TEMPLATES, prompts
from condu_ray.engine.export import export
from condu_ray.engine.forget import forget
from condu_ray.engine.session import learn
from condu_ray.errors import ConfigError, StoreError, TrainingError
from condu_ray.memory.calibration import fit
from condu_ray.memory.discriminant import discriminant
from condu_ray.memory.gaussians import Gaussians, Sampler
from condu_ray.methods import dmc
from condu_ray.methods.checkpoint import Checkpoint, Resume
from condu_ray.methods.prompt_tuning import PromptedTask, _Replay
from condu_ray.methods.remembered import Remembered
from condu_ray.methods.stored import layout_of, state_of
from condu_ray.methods.training import Place, Trained
from condu_ray.models.clip import Clip, class_embeddings
from condu_ray.sources import from_dotted, resolve
from condu_ray.store import open_store
from condu_ray.voting.open import expert_maker, load_classifier

Folders = dict[str, Path]
Made = Callable[..., SessionConfig]
BOTH = pytest.mark.parametrize("method", ["dmc", "dmc-ot"])
NAMES = ("colours", "stripes", "places")


@pytest.fixture(scope="module")
def learned(tiny_model_dir: Path, picture_tasks: Folders, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(method, other settings) -> those of a store with three tasks, made once."""
    made: dict[str, SessionConfig] = {}

    def make(method: str, **others: Any) -> SessionConfig:
        key = repr((method, others))
        if key not in made:
            store = tmp_path_factory.mktemp("dmc") / "store"
            made[key] = settings(store, tiny_model_dir, method=method, train__lr=1e-2, **others)
            learn_here(made[key], opened(picture_tasks, *NAMES))
        return made[key]

    return make


def memory(config: SessionConfig, version: int) -> dict[str, Remembered]:
    store = open_store(config.store)
    kept = state_of(store, store.manifest(version)).memory
    return {name: Remembered.from_arrays(arrays) for name, arrays in kept.items()}


@BOTH
def test_every_task_is_remembered_under_the_newest_encoder(learned: Made, method: str) -> None:
    config = learned(method)
    for version in (1, 2, 3):
        kept = memory(config, version)
        assert set(kept) == set(NAMES[:version])
        assert len({each.encoder for each in kept.values()}) == 1
        assert all(each.gaussians.counts.tolist() == [12, 12, 12] for each in kept.values())
    encoders = [memory(config, version)["colours"].encoder for version in (1, 2, 3)]
    assert len(set(encoders)) == 3
    assert memory(config, 1)["colours"].session_drift is None
    found = memory(config, 3)["places"].session_drift
    assert found is not None and found.mode == ("none" if method == "dmc" else "ot")
    assert found.drift.relative > 0 and found.drift.residuals["none"] == 1
    before, after = found.distances
    assert (after < before) == (method == "dmc-ot")


def test_a_prompt_of_its_own_stays_and_a_shared_one_moves(learned: Made) -> None:
    own = [memory(learned("dmc-ot"), version) for version in (1, 3)]
    assert torch.equal(own[0]["colours"].prompt, own[1]["colours"].prompt)
    assert torch.equal(own[0]["colours"].texts, own[1]["colours"].texts)
    assert not torch.equal(own[1]["colours"].prompt, own[1]["places"].prompt)
    # A new one begins where the newest is: stripes, which comes last by name.
    prompts = {name: own[1][name].prompt for name in NAMES}
    apart = {name: float((prompts["places"] - prompts[name]).norm()) for name in ("colours", "stripes")}
    assert apart["stripes"] < apart["colours"]
    shared = [memory(learned("dmc"), version) for version in (1, 3)]
    assert shared[0]["colours"].prompt.shape == (0, 32)
    assert not torch.allclose(shared[0]["colours"].texts, shared[1]["colours"].texts)


def test_without_calibration_statistics_stay_and_with_it_they_move(learned: Made) -> None:
    stays = [memory(learned("dmc"), version)["colours"].gaussians.means for version in (1, 3)]
    np.testing.assert_array_equal(*stays)
    moves = [memory(learned("dmc-ot"), version)["colours"].gaussians.means for version in (1, 3)]
    assert not np.allclose(*moves)


def test_the_image_tower_before_keeps_features_from_drifting(learned: Made) -> None:
    """The first task has no tower before it, so that its training is the same whatever the weight."""
    free, held = learned("dmc-ot", dmc__distillation=0.0), learned("dmc-ot", dmc__distillation=100.0)
    assert memory(free, 1)["colours"].encoder == memory(held, 1)["colours"].encoder
    for version, task in ((2, "stripes"), (3, "places")):
        drifts = []
        for config in (held, free):
            found = memory(config, version)[task].session_drift
            assert found is not None
            drifts.append(found.drift.relative)
        assert drifts[0] < 0.9 * drifts[1]


def unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


@BOTH
@pytest.mark.parametrize("gaussians", [True, False])
def test_the_answers_are_those_of_the_learned_vectors_and_of_the_gaussians(
    learned: Made, method: str, gaussians: bool, picture_tasks: Folders, tiny_clip: Any
) -> None:
    config = learned(method) if gaussians else learned(method, memory__discriminant=False)
    (task,) = opened(picture_tasks, "stripes")
    store = open_store(config.store)
    classifier = load_classifier(config.store)
    pixels = torch.stack([PictureSet(task.test, tiny_clip.eval_transform)[each][0] for each in range(len(task.test))])
    expert: Any = expert_maker(store, 3, tiny_clip)("stripes")
    features = tiny_clip.images(pixels, expert)
    kept = memory(config, 3)
    logits = {name: tiny_clip.logit_scale * features @ kept[name].texts.T for name in NAMES}
    every = Gaussians.joined([kept[name].gaussians for name in NAMES])
    if gaussians:
        told = discriminant(every, Sampler(every, "convex", 0.1), unit)
        own = np.split(features.numpy() @ told[0].T + told[1], 3, axis=1)
        logits = {name: logits[name] + torch.from_numpy(more) for name, more in zip(NAMES, own, strict=True)}
    by_task = [answer.label.name for answer in classifier.classify(pixels, task="stripes")]
    assert by_task == [task.classes[i] for i in logits["stripes"].argmax(1).tolist()]
    names = [(name, label) for name in NAMES for label in opened(picture_tasks, name)[0].classes]
    union = [(answer.label.task, answer.label.name) for answer in classifier.classify(pixels)]
    assert union == [names[i] for i in torch.cat([logits[name] for name in NAMES], dim=1).argmax(1).tolist()]
    assert not torch.allclose(features, tiny_clip.images(pixels), atol=1e-3)
    # A caller's words that are all learned, in any order and of several tasks, are those classes.
    words = [task.classes[1], *opened(picture_tasks, "colours")[0].classes[::-1], task.classes[0].upper()]
    given = [answer.label.name for answer in classifier.classify(pixels, labels=words)]
    columns = torch.cat([logits["stripes"][:, [1]], logits["colours"].flip(1), logits["stripes"][:, [0]]], dim=1)
    assert given == [words[i] for i in columns.argmax(1).tolist()]
    # With one word among them that was not, texts are all there is.
    words.append("a lighthouse")
    given = [answer.label.name for answer in classifier.classify(pixels, labels=words)]
    texts = class_embeddings(tiny_clip, [prompts(word, DEFAULT_TEMPLATES) for word in words])
    assert given == [words[i] for i in (features @ texts.T).argmax(1).tolist()]


@BOTH
def test_an_export_holds_the_image_tower_and_the_class_vectors(
    learned: Made, method: str, tiny_clip: Clip, tmp_path: Path
) -> None:
    config = learned(method)
    store = open_store(config.store)
    export(store, store.manifest(), "stripes", tmp_path / "stripes.safetensors")
    found = load_file(tmp_path / "stripes.safetensors")
    for name, kept in memory(config, 3).items():
        assert torch.equal(found[f"head.texts.{name}"], kept.texts)
        assert all(f"head.discriminant.{part}.{name}" in found for part in ("weight", "bias"))
    own = dict(tiny_clip.model.state_dict())
    moved = [name for name, tensor in own.items() if not torch.equal(found[name], tensor)]
    assert moved == [f"visual.transformer.resblocks.{block}.attn.in_proj_weight" for block in (0, 1)]


@BOTH
def test_the_same_command_gives_the_same_bits(
    learned: Made, method: str, picture_tasks: Folders, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Also where the sessions are three commands instead of one."""
    once = learned(method)
    again = once.model_copy(update={"store": str(tmp_path / "store")})
    for name in NAMES:
        learn_here(again, opened(picture_tasks, name))
    first, second = contents(once.store), contents(again.store)
    state = [name for name in first if name.startswith("objects/state-")]
    assert state and {name: first[name] for name in state} == {name: second.get(name) for name in state}


def test_a_forgotten_task_leaves_no_statistics_and_learning_goes_on(
    learned: Made, picture_tasks: Folders, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method="dmc-ot")
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    forget(open_store(config.store), "stripes")
    assert tuple(memory(config, 3)) == ("colours",)
    learn_here(config, opened(picture_tasks, "places"))
    assert set(memory(config, 4)) == {"colours", "places"}


@pytest.mark.parametrize("method", ["dmc", "rapf"])
def test_a_task_forgotten_while_another_is_learned_does_not_come_back_with_it(
    method: str, tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    """What was trained before it was forgotten remembers it; so it is trained again, from what is there now."""
    config = settings(tmp_path / "store", tiny_model_dir, method=method, adapter__epochs=1)
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    store = open_store(config.store)

    class Interrupted(InProcessCrew):
        def train(self, jobs: Any, update: Any) -> None:
            super().train(jobs, update)
            forget(store, "colours")

    with pytest.raises(StoreError, match=r"another session changed the store while places was learned: run the same"):
        learn(store, config, opened(picture_tasks, "places"), Interrupted(store, config), silent)
    (made,) = learn_here(config, opened(picture_tasks, "places"))
    assert [card.name for card in made.tasks] == ["stripes", "places"]


@BOTH
def test_killed_in_any_stage_the_same_command_ends_with_the_same_bits(
    learned: Made, method: str, picture_tasks: Folders, tiny_clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = learned(method, train__checkpoint_seconds=1e-9)
    store = open_store(config.store)
    before = state_of(store, store.manifest(2))
    (task,) = opened(picture_tasks, "places")
    saved: list[Checkpoint] = []

    def trained(resume: Resume) -> Trained:
        layout = layout_of(store.header)
        return dmc.learn(tiny_clip, layout, task, config, before, None, Place(), resume, lambda step: None)

    def keep(checkpoint: Checkpoint) -> None:
        saved.append({name: np.array(values) for name, values in checkpoint.items()})

    whole = trained(Resume(save=keep)).arrays()
    kinds = ["vision/delta" in each for each in saved]
    assert kinds == [False] * 3 + [True] * 4  # three of four steps, the end of the first stage, three of four prompts
    monkeypatch.setattr(dmc._Model, "train_vision", _only_where_it_must(dmc._Model.train_vision, saved))
    for checkpoint in saved:
        again = trained(Resume(lambda kept=checkpoint: kept)).arrays()  # type: ignore[misc]
        assert set(again) == set(whole)
        for name, values in whole.items():
            np.testing.assert_array_equal(again[name], values, err_msg=name)


def _only_where_it_must(real: Any, saved: list[Checkpoint]) -> Any:
    """The first stage, which must not be run where a checkpoint holds its end."""

    def train_vision(model: Any, task: Any, teacher: Any, place: Place, resume: Resume, on_step: Any) -> Trained:
        assert "vision/delta" not in (resume.load() or {})
        return real(model, task, teacher, place, resume, on_step)  # type: ignore[no-any-return]

    return train_vision


def test_the_job_prints_what_sessions_measured(learned: Made, capsys: pytest.CaptureFixture[str]) -> None:
    store = learned("dmc-ot").store
    encoder_drift.main([store, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["calibration"]) for row in rows] == [("stripes", "ot"), ("places", "ot")]
    for row in rows:
        assert list(row["residuals"]) == ["none", "mean", "sdc", "ot", "linear"]
        assert row["shift"] + row["symmetric"] + row["rotation"] + row["rest"] == pytest.approx(1)
    encoder_drift.main([store])
    assert f"{rows[1]['residuals']['linear']:.3f}" in capsys.readouterr().out


def test_auto_takes_what_fits_pictures_that_were_held_out(
    tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path
) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method="dmc", dmc__memory_calibration="auto")
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    found = memory(config, 2)["stripes"].session_drift
    assert found is not None and found.drift.residuals[found.mode] == min(found.drift.residuals.values())


@pytest.mark.parametrize("shrinkage", [0.01, 0.0])
def test_only_a_calibration_that_is_asked_for_can_stop_a_session(
    tiny_model_dir: Path, tmp_path: Path, shrinkage: float
) -> None:
    """One training picture a class: there is no covariance within classes."""
    random = np.random.default_rng(0)
    before, labels = random.standard_normal((4, 32)).astype(np.float32), np.arange(4)
    after = before + np.float32(0.5) + 0.01 * random.standard_normal((4, 32)).astype(np.float32)

    def follow(**others: Any) -> Any:
        config = settings(tmp_path, tiny_model_dir, dmc__shrinkage=shrinkage, **others)
        return dmc._follow({}, b"before", b"after", before, after, labels, config)[1]

    assert follow(method="dmc").mode == "none"
    assert follow(method="dmc", dmc__memory_calibration="auto").mode in ("mean", "sdc", "ot", "linear")
    if shrinkage:  # what lies around the common mean is compared instead
        for covariance in ("full", "diagonal"):
            assert follow(method="dmc-ot", memory__covariance=covariance).mode == "ot"
        return
    assert follow(method="dmc-ot", dmc__memory_calibration="mean").drift.residuals["ot"] == 1
    with pytest.raises(TrainingError, match="learn more pictures a task"):
        follow(method="dmc-ot")


def test_diagonal_statistics_are_moved_too(tiny_model_dir: Path, picture_tasks: Folders, tmp_path: Path) -> None:
    config = settings(tmp_path / "store", tiny_model_dir, method="dmc-ot", memory__covariance="diagonal")
    learn_here(config, opened(picture_tasks, "colours", "stripes"))
    first, second = (memory(config, version)["colours"].gaussians for version in (1, 2))
    assert first.scatter.shape == (3, 32) and not np.allclose(first.scatter, second.scatter)


def test_statistics_of_another_encoder_are_refused(learned: Made) -> None:
    kept = memory(learned("dmc-ot"), 2)["colours"]
    rows = np.random.default_rng(0).standard_normal((20, 32))
    map_of = fit("mean", rows, rows + 1, np.zeros(20, np.int64))
    moved = kept.calibrated(map_of, kept.encoder, b"next", "colours")
    np.testing.assert_allclose(moved.gaussians.means, kept.gaussians.means + 1)
    with pytest.raises(TrainingError, match="colours belong to another encoder"):
        moved.calibrated(map_of, kept.encoder, b"next", "colours")


def test_without_any_prompt_there_is_nothing_to_learn(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt to learn"):
        settings(tmp_path, tiny_model_dir, method="dmc", dmc__shared_prompt=0)


def test_a_store_keeps_the_calibration_it_was_made_with(learned: Made, tiny_model_dir: Path) -> None:
    config = learned("dmc-ot")
    fixed = open_store(config.store).header.settings
    with pytest.raises(ConfigError, match="dmc.memory_calibration is linear"):
        resolve({"store": config.store, "dmc.memory_calibration": "linear"}, fixed=fixed)


@pytest.mark.parametrize(
    ("replay", "new", "limited", "expected"),
    [
        (1.0, 3, False, 3.0),  # to a whole number
        (1.0, 32, False, 0.25),
        (0.2, 4, False, 0.4),
        (1.0, 32, True, 0.25),
        (0.0, 4, False, 0.0),
    ],
)
def test_an_old_class_is_drawn_as_often_as_a_new_one_has_pictures(
    replay: float, new: int, limited: bool, expected: float
) -> None:
    """Also where a batch holds fewer pictures than the task has classes; else old classes would outweigh new ones."""
    old, steps = 40, 400
    asked = {"method": "dmc", "train.batch_size": 8, "dmc.replay": replay, "dmc.classes_per_step": new + 20}
    tasks = [PromptedTask(torch.zeros(classes, 1), torch.zeros(0, 1)) for classes in (old, new)]
    sampler = Sampler(Gaussians.fit(np.zeros((old, 1)), np.arange(old), old), "convex", 0.1)
    replayed = _Replay(sampler, tasks, 1, from_dotted(asked), limited)
    drawn = np.zeros(old)
    for step in range(steps):
        classes, features, places = replayed.draws(step)
        assert len(classes) == (20 if limited else old)
        assert len(features) == len(places)
        np.add.at(drawn, classes[places], 1)
    assert drawn.mean() / steps == pytest.approx(expected, rel=0.02)
    assert drawn.std() < 0.1 * max(1.0, drawn.mean())
    again = replayed.draws(7)
    assert all(np.array_equal(one, other) for one, other in zip(replayed.draws(7), again, strict=True))
