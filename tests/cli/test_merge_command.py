"""merge, export and gc --fold: the algebra alone, on weights of any PyTorch model; and experts of learned tasks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from command_line import condu
from in_process_crew import learn_here, opened, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

from condu_ray.config import SessionConfig
from condu_ray.methods.stored import config_of, state_of
from condu_ray.store import open_store
from condu_ray.voting.open import load_classifier

Files = dict[str, Path]


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = {
        "block.weight": torch.randn(12, 30, generator=generator),
        "block.bias": torch.randn(12, generator=generator),
    }
    half = torch.randn(6, 8, generator=generator).to(torch.bfloat16)
    return {**base, "head.weight": half, "steps": torch.tensor(7), "empty": torch.zeros(0)}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    base = weights(0)
    found = {"base": tmp_path / "base.safetensors"}
    save_file(base, found["base"])
    for seed, name in enumerate(("birds", "cars", "signs"), 1):
        drawn = weights(seed)
        tuned = {n: (t + 0.05 * drawn[n]).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()}
        found[name] = tmp_path / f"{name}.safetensors"
        save_file(tuned, found[name])
    return found


def export(store: Path, task: str, out: Path, *more: str) -> dict[str, Tensor]:
    said = condu("export", store, "--task", task, "-o", out, "--json", *more)
    assert said.code == 0, said.err
    assert said.document["bytes"] == out.stat().st_size
    return load_file(out)


def test_one_task_comes_back_as_it_was_tuned(files: Files, tmp_path: Path) -> None:
    store = tmp_path / "merged"
    assert condu("merge", files["base"], files["birds"], "-o", store).code == 0
    found, tuned = export(store, "birds", tmp_path / "out.safetensors"), load_file(files["birds"])
    assert found.keys() == tuned.keys()
    for name, tensor in tuned.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("triggers", ["mask", "sign"])
def test_three_tasks_share_one_vector(files: Files, tmp_path: Path, triggers: str) -> None:
    store = tmp_path / "merged"
    given = [files["birds"], f"autos={files['cars']}", files["signs"]]
    said = condu("merge", files["base"], *given, "-o", store, "--triggers", triggers, "--json").document
    assert said["made"] == [1, 2, 3]
    assert [row["name"] for row in said["tasks"]] == ["birds", "autos", "signs"]
    assert all(0 < row["figures"]["relative_l2"] < 1 for row in said["tasks"])
    base, tuned = load_file(files["base"]), load_file(files["cars"])
    found = export(store, "autos", tmp_path / "out.safetensors")
    own, left = (torch.cat([(w[n].float() - base[n].float()).flatten() for n in base]) for w in (tuned, found))
    assert torch.norm(own - left) < 0.8 * torch.norm(own)
    again = condu("merge", files["base"], *given, "-o", store, "--triggers", triggers, "--json").document
    assert (again["made"], again["version"]) == ([], 3)


@pytest.mark.parametrize("triggers", ["mask", "sign"])
def test_running_statistics_are_each_tasks_own(tmp_path: Path, triggers: str) -> None:
    """They are not fused: a variance that shares its magnitude with one that grew would turn negative."""

    def drawn(seed: int) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            normed = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64))
            normed[1].running_var.copy_(torch.rand(64) ** 4 + 1e-3)
            return normed.state_dict()

    for seed, name in enumerate(("base", "birds", "cars", "signs")):
        save_file(drawn(seed), tmp_path / f"{name}.safetensors")
    store, files = tmp_path / "merged", {name: tmp_path / f"{name}.safetensors" for name in ("birds", "cars", "signs")}
    merged = condu("merge", tmp_path / "base.safetensors", *files.values(), "-o", store, "--triggers", triggers)
    assert merged.code == 0, merged.err
    assert condu("forget", "birds", "--store", store).code == 0
    for name in ("cars", "signs"):
        found, tuned = export(store, name, tmp_path / "out.safetensors"), load_file(files[name])
        assert found.keys() == tuned.keys()
        for statistic in ("1.running_mean", "1.running_var"):
            torch.testing.assert_close(found[statistic], tuned[statistic], rtol=0, atol=0)
        assert not torch.equal(found["0.weight"], drawn(0)["0.weight"])


def test_shards_in_a_folder_are_one_model(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for index, (name, tensor) in enumerate(load_file(files["base"]).items()):
        save_file({name: tensor}, folder / f"model-{index}.safetensors")
    assert condu("merge", folder, files["birds"], "-o", tmp_path / "merged").code == 0
    found, tuned = export(tmp_path / "merged", "birds", tmp_path / "out.safetensors"), load_file(files["birds"])
    torch.testing.assert_close(found["block.weight"], tuned["block.weight"], rtol=1e-6, atol=1e-7)


def test_no_expert_becomes_a_shard_of_the_base(files: Files, tmp_path: Path) -> None:
    folder, store = tmp_path / "shards", tmp_path / "merged"
    folder.mkdir()
    files["base"].rename(folder / "model.safetensors")
    assert condu("merge", folder, files["birds"], "-o", store).code == 0
    said = condu("export", store, "--task", "birds", "-o", folder / "birds.safetensors")
    assert said.code == 2
    assert "one more shard of the base that this store needs: give a file in another folder" in said.err
    export(store, "birds", tmp_path / "out.safetensors")


def test_the_same_base_elsewhere_goes_on(files: Files, tmp_path: Path) -> None:
    """As on the machine of another team."""
    store, other = tmp_path / "merged", tmp_path / "other"
    other.mkdir()
    assert condu("merge", files["base"], files["birds"], "-o", store).code == 0
    shutil.copy(files["base"], other / "theirs.safetensors")
    said = condu("merge", other / "theirs.safetensors", files["cars"], "-o", store, "--json")
    assert said.code == 0, said.err
    assert (said.document["made"], open_store(store).header.model["name"]) == ([2], f"weights:{files['base']}")
    refused = condu("merge", files["signs"], files["cars"], "-o", store)
    assert (refused.code, "holds a store with another model" in refused.err) == (2, True), refused.err


def test_a_merged_store_is_a_store(files: Files, tmp_path: Path) -> None:
    store = tmp_path / "merged"
    condu("merge", files["base"], files["birds"], files["cars"], files["signs"], "-o", store)
    before = export(store, "cars", tmp_path / "before.safetensors")
    for command in (["tasks"], ["versions"], ["show"], ["diff", "1", "3"], ["doctor"]):
        assert condu(*command, "--store", store).code == 0, command
    assert condu("forget", "birds", "--store", store).code == 0
    would = condu("gc", "--fold", "--keep", "1", "--dry-run", "--store", store)
    assert "--fold makes a version first" in would.err
    assert condu("gc", "--fold", "--keep", "1", "--store", store, "--json").document["versions"] == [1, 2, 3, 4]
    objects = condu("show", "--store", store, "--json").document["objects"]
    assert not [name for name in objects if name.startswith("flips-")]
    after = export(store, "cars", tmp_path / "after.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert condu("merge", files["base"], files["birds"], "-o", store).code == 0
    assert condu("gc", "--fold", "--store", store).code == 0
    for words in (["predict", files["base"]], ["evaluate"]):
        said = condu(*words, "--store", store)
        assert (said.code, "Traceback" in said.err) == (2, False), said.err


def test_tensors_that_the_base_lacks_are_said(files: Files, tmp_path: Path) -> None:
    save_file({**load_file(files["birds"]), "head.bias": torch.zeros(3), "tail": torch.zeros(2)}, files["birds"])
    said = condu("merge", files["base"], files["birds"], files["cars"], "-o", tmp_path / "merged", "--json")
    assert said.document["made"] == [1, 2]
    warned = [line for line in said.err.splitlines() if line.startswith("warning")]
    assert warned == ["warning: birds has tensors that the base lacks, and they are not kept: head.bias and 1 more"]


def test_a_folder_with_two_copies_of_a_model_is_refused(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "birds"
    folder.mkdir()
    for name in ("model", "model.fp16"):
        save_file({n: t.half() for n, t in load_file(files["birds"]).items()}, folder / f"{name}.safetensors")
    said = condu("merge", files["base"], folder, "-o", tmp_path / "merged")
    assert said.code == 2
    assert f"is in both {folder}/model.fp16.safetensors and {folder}/model.safetensors" in said.err


def test_the_home_folder_behind_a_name_is_found(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert condu("merge", files["base"], "owls=~/birds.safetensors", "-o", tmp_path / "merged").code == 0


def test_a_name_stands_before_the_first_equals_sign_of_a_path(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    for name in ("birds", "cars"):
        files[name].rename(folder / f"{name}.safetensors")
    given = [f"owls={folder / 'birds.safetensors'}", folder / "cars.safetensors"]
    assert condu("merge", files["base"], *given, "-o", tmp_path / "merged").code == 0
    assert [card.name for card in open_store(tmp_path / "merged").manifest().tasks] == ["owls", "cars"]


def test_a_method_in_the_environment_is_not_what_merges(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDU_METHOD", "finetune")
    said = condu("merge", files["base"], files["birds"], "-o", tmp_path / "merged")
    assert said.code == 0, said.err


def test_what_does_not_fit_is_one_sentence(files: Files, tmp_path: Path) -> None:
    store = tmp_path / "merged"

    def says(text: str, *arguments: Any) -> None:
        said = condu(*arguments)
        assert said.code == 2, said.err
        assert text in said.err
        assert "Traceback" not in said.err

    wrong = tmp_path / "wrong.safetensors"
    save_file({**weights(1), "block.bias": torch.zeros(3)}, wrong)
    says("tensor 'block.bias' has shape (3,)", "merge", files["base"], wrong, "-o", store)
    save_file({"block.bias": torch.zeros(12)}, wrong)
    says("of the base is missing", "merge", files["base"], wrong, "-o", store)
    save_file({**weights(1), "block.bias": torch.zeros(12, dtype=torch.int8)}, wrong)
    says("tensor 'block.bias' holds int8", "merge", files["base"], wrong, "-o", store)
    wrong.write_bytes(b"no")
    says("is not a safetensors file", "merge", files["base"], wrong, "-o", store)
    says("no safetensors file there", "merge", files["base"], tmp_path / "none.safetensors", "-o", store)
    says("two files are called birds", "merge", files["base"], files["birds"], files["birds"], "-o", store)
    says("granularity", "merge", files["base"], files["birds"], "-o", store, "--granularity", "rows")
    assert not store.exists(), "nothing is written"
    assert condu("merge", files["base"], files["birds"], "-o", store).code == 0
    says("another", "merge", files["cars"], files["birds"], "-o", store)
    says("other weights", "merge", files["base"], f"birds={files['cars']}", "-o", store)
    says("no task cars", "export", store, "--task", "cars", "-o", tmp_path / "x")
    says("--output", "export", store, "--task", "birds", "-o", tmp_path / "no" / "x")
    says("is a folder", "export", store, "--task", "birds", "-o", ".")
    before = files["base"].read_bytes()
    says("the base that this store needs", "export", store, "--task", "birds", "-o", files["base"])
    assert files["base"].read_bytes() == before
    save_file(weights(9), files["base"])
    says("has changed", "export", store, "--task", "birds", "-o", tmp_path / "x")


def test_open_clip_loads_the_expert_of_a_learned_task(store: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    found = export(store, "colours", tmp_path / "expert.safetensors")
    classifier = load_classifier(store)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = open_clip.create_model(f"local-dir:{tiny_model_dir}")
    model.load_state_dict(found)
    model.eval()
    with torch.no_grad():
        alone = model.encode_image(pixels, normalize=True)
        ours = classifier.clip.images(pixels, classifier.cached("colours"))
    torch.testing.assert_close(alone, ours)


def test_folding_changes_no_answer(
    tiny_model_dir: Path, picture_tasks: dict[str, Path], tmp_path: Path, picture: Path
) -> None:
    copy = tmp_path / "masks"
    learn_here(settings(copy, tiny_model_dir, method="condu"), opened(picture_tasks, "colours", "stripes"))
    before = condu("predict", picture, "--task", "colours", "--store", copy, "--json").document
    (copy / "mlflow.db").touch()  # runs are kept, and this version is not among them
    told = f"version 3 holds the flips of all sessions in its masks; condu-ray track --replay --store {copy} records it"
    assert condu("gc", "--fold", "--store", copy).out.endswith(f"{told}\n")
    newest = open_store(copy).manifest()
    assert (newest.version, newest.kind, newest.parent) == (3, "fold", 2)
    after = condu("predict", picture, "--task", "colours", "--store", copy, "--json").document
    for said in (*before, *after):
        said.pop("version")
    assert after == before
    assert "records it" not in condu("gc", "--fold", "--store", copy).out
    assert open_store(copy).versions() == [1, 2, 3], "there is nothing left to fold"
    state = state_of(open_store(copy), newest)
    assert isinstance(config_of(open_store(copy).header), SessionConfig)
    assert np.isfinite(state.delta("stripes")).all()
