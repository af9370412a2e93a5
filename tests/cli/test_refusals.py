"""Bad input gets one sentence that names the thing and the mend, exit code 2, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Said, condu, process
from in_process_crew import learn_here, opened
from PIL import Image

from condu_ray.paths import check_lasting
from condu_ray.sources import resolve
from condu_ray.store import absolute_url, open_store
from condu_ray.store.header import fixed_settings


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        total.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return total.hexdigest()


def refused(store: Path, *arguments: str | Path) -> str:
    """Runs the command on `store`; returns what it said, once it is sure that it was refused in order."""
    before = digest(store)
    said = condu(*arguments, "--store", store)
    check(said)
    assert digest(store) == before, "the store was changed"
    return said.err


def check(said: Said) -> None:
    assert said.code == 2, said
    assert said.out == ""
    lines = [line for line in said.err.strip().splitlines() if not line.startswith(("reading ", "usage"))]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in said.err
    assert 20 < len(said.err) < 600
    assert lines[0][-1] in ".?"


def picture_folder(root: Path, **classes: int) -> Path:
    """root/CLASS/N.png, as many small pictures a class as said."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((16, 16, 3), 40 * label + number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def rubbish(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("this is no picture")
    return root


# --- pictures


def test_an_empty_folder(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no class folders" in refused(copy, "learn", "x", "--data", tmp_path / "empty")


def test_an_empty_class_folder_is_named(copy: Path, tmp_path: Path) -> None:
    data = picture_folder(tmp_path / "data", cats=6, dogs=6)
    (data / "birds").mkdir()
    assert "birds" in refused(copy, "learn", "x", "--data", data)


def test_no_such_folder_offers_the_nearest(copy: Path, tmp_path: Path) -> None:
    picture_folder(tmp_path / "flowers", roses=2, tulips=2)
    assert "did you mean flowers?" in refused(copy, "learn", "x", "--data", tmp_path / "flower")


def test_files_that_are_no_pictures(copy: Path, tmp_path: Path) -> None:
    assert "not a picture" in refused(
        copy, "learn", "x", "--data", rubbish(tmp_path / "text", "a/note.jpg", "b/note.jpg")
    )


def test_the_home_of_an_unknown_user_is_a_name_like_any_other(copy: Path, picture: Path) -> None:
    assert "there is no picture ~no-such-user/x.png" in refused(copy, "predict", "~no-such-user/x.png")
    said = condu("predict", picture, "--store", "~no-such-user/store")
    check(said)
    assert "~no-such-user/store" in said.err


def test_a_single_class(copy: Path, tmp_path: Path) -> None:
    assert "one class only ('only')" in refused(copy, "learn", "x", "--data", picture_folder(tmp_path / "d", only=5))


def test_too_many_broken_pictures_are_refused(copy: Path, tmp_path: Path) -> None:
    data = rubbish(picture_folder(tmp_path / "data", cats=9, dogs=9), "cats/a.png", "dogs/b.png")
    assert "2 of 20 pictures" in refused(copy, "learn", "x", "--data", data)


def test_a_few_broken_pictures_are_skipped_and_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = rubbish(picture_folder(tmp_path / "data", cats=20, dogs=20), "cats/broken.png")
    given = ["--data", data, "--store", tmp_path / "none", "--model", f"local-dir:{tiny_model_dir}", "--dry-run"]
    (found,) = condu("learn", "pets", *given, "--json").document["data"]
    assert [each["path"] for each in found["skipped"]] == ["cats/broken.png"]
    assert found["train"]["pictures"] + found["test"]["pictures"] == 40
    assert "skipped cats/broken.png: not a picture" in condu("learn", "pets", *given).out


def test_labels_that_are_not_in_the_class_list(copy: Path, tmp_path: Path) -> None:
    data = picture_folder(tmp_path / "data", cats=5, dogs=5)
    (data / "classnames.txt").write_text("cats\ndogs\nbirds\n")
    assert "birds" in refused(copy, "learn", "x", "--data", data)


def test_a_name_that_is_taken_by_other_pictures(copy: Path, picture_tasks: dict[str, Path]) -> None:
    said = refused(copy, "learn", "colours", "--data", picture_tasks["places"])
    assert "task colours was learned in version 1 from other pictures" in said
    assert "condu-ray forget colours" in said


def test_a_name_that_is_learned_with_other_settings(copy: Path, picture_tasks: dict[str, Path]) -> None:
    said = refused(copy, "learn", "colours", "--data", picture_tasks["colours"], "--train.steps", "7")
    assert "train.steps 4, not 7" in said


def test_a_name_that_is_learned_with_another_seed(copy: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """The pictures are the same, though the split is another one."""
    data = picture_folder(tmp_path / "data", cats=6, dogs=6)
    given = ["--data", data, "--train.steps=4", "--train.batch-size=8", "--train.towers=image", "--tracking=off"]
    config, _ = resolve({"store": str(copy), "train.steps": 4, "train.batch_size": 8}, fixed=fixed_settings(str(copy)))
    learn_here(config, opened({"pets": data}, "pets"))
    for option, words in (("--seed=1", "seed 0, not 1"), ("--test-share=0.4", "test_share 0.2, not 0.4")):
        assert words in refused(copy, "learn", "pets", *given, option)


# --- settings


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("rapf", ["--train.steps", "5"], "rapf does not read --train.steps: leave it out"),
        ("condu", ["--adapter.lr", "0.1", "--dmc.rank", "4"], "condu does not read --adapter.lr, --dmc.rank"),
        ("dmc", ["--train.batch-norm", "updated"], "dmc does not read --train.batch-norm"),
        ("zero-shot", ["--vote.k", "2"], "zero-shot does not read --vote.k"),
    ],
)
def test_an_option_that_the_method_does_not_read(
    method: str, options: list[str], words: str, tmp_path: Path, picture_tasks: dict[str, Path]
) -> None:
    given = ["--data", picture_tasks["colours"], "--method", method, *options]
    said = condu("learn", "colours", *given, "--store", tmp_path / "none")
    check(said)
    assert words in said.err
    assert not (tmp_path / "none").exists()


def test_what_the_method_does_not_read_may_stand_in_a_file_and_the_environment(
    tmp_path: Path, tiny_model_dir: Path, picture_tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file serves several methods."""
    (tmp_path / "session.yaml").write_text("method: rapf\ntrain: {steps: 5}\n")
    monkeypatch.setenv("CONDU_DMC__RANK", "4")
    given = ["--data", picture_tasks["colours"], "--config", tmp_path / "session.yaml", "--adapter.lr", "0.1"]
    given += ["--model", f"local-dir:{tiny_model_dir}", "--store", tmp_path / "none", "--dry-run"]
    assert condu("learn", "colours", *given).code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magic"], ["method", "magic", "condu-lora"]),
        (["--method", "finetune"], ["method is finetune", "made with condu"]),
        (["--train.steps", "0"], ["train.steps", "greater than or equal to 1"]),
        (["--train.lr", "fast", "--seed", "-1"], ["train.lr", "seed"]),
        (["--fusion.granularity", "l1"], ["fusion.granularity", "made with row"]),
    ],
)
def test_settings(copy: Path, picture_tasks: dict[str, Path], arguments: list[str], words: list[str]) -> None:
    said = refused(copy, "learn", "places", "--data", picture_tasks["places"], *arguments)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learn"], ["no task to learn", "--data"]),
        (["learn", "x"], ["--data PATH is missing"]),
        (["learn", "--data", "somewhere"], ["NAME is missing"]),
        (["learn", "../x", "--data", "somewhere"], ["../x", "letters"]),
        (["learn", "--task", "pets"], ["pets", "NAME=PATH"]),
        (["learn", "--task", "a=x", "--task", "a=y"], ["task a is given twice"]),
    ],
)
def test_tasks(copy: Path, arguments: list[str], words: list[str]) -> None:
    said = refused(copy, *arguments)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  step: 5\n", ["no setting 'train.step'", "did you mean train.steps?"]),
        ("train: [1, 2\n", ["is not YAML"]),
        ("just words\n", ["holds a str"]),
        ("seed: 1\nseed: 2\n", ["'seed' is given twice"]),
        (None, ["cannot be read"]),
    ],
)
def test_a_settings_file(copy: Path, tmp_path: Path, text: str | None, words: list[str]) -> None:
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    said = refused(copy, "learn", "x", "--data", "somewhere", "--config", file)
    assert "settings.yaml" in said
    assert all(word in said for word in words), said


def test_an_unknown_option_offers_the_nearest(copy: Path) -> None:
    said = condu("learn", "x", "--data", "somewhere", "--store", copy, "--train.step", "3")
    assert said.code == 2
    assert "--train.steps" in said.err
    assert "Traceback" not in said.err


# --- what a store holds


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "{picture}", "--task", "colour"], ["colour", "did you mean colours?"]),
        (["predict", "{picture}", "--version", "999"], ["no version 999", "the nearest is 2"]),
        (["predict", "{picture}", "--labels", "cat,,dog"], ["label 2 of 3 is empty"]),
        (["predict", "{picture}", "--labels", "cat,cat"], ["cat"]),
        (["predict", "{picture}", "--task", "colours", "--labels", "a,b"], ["both given"]),
        (["predict", "{picture}x"], ["there is no picture", "did you mean"]),
        (["tasks", "--version", "3"], ["no version 3"]),
        (["show", "3"], ["no version 3", "there are 1, 2"]),
        (["diff", "1", "7"], ["no version 7"]),
        (["rollback", "9"], ["no version 9"]),
        (["forget", "stripe"], ["no task stripe", "did you mean stripes?"]),
        (["evaluate", "--labels", "unions"], ["unions", "did you mean union?"]),
        (["evaluate", "--task", "nonesuch=somewhere"], ["nonesuch"]),
        (["evaluate", "--version", "5"], ["no version 5"]),
    ],
)
def test_names_that_are_not_there(copy: Path, picture: Path, arguments: list[str], words: list[str]) -> None:
    said = refused(copy, *(each.format(picture=picture) for each in arguments))
    assert all(word in said for word in words), said


def test_other_classes_to_evaluate_on(copy: Path, picture_tasks: dict[str, Path]) -> None:
    said = refused(copy, "evaluate", "--task", f"colours={picture_tasks['places']}")
    assert "is not one of task colours" in said


def test_a_file_that_is_no_picture(copy: Path, tmp_path: Path) -> None:
    assert "not a picture" in refused(copy, "predict", rubbish(tmp_path / "in", "note.jpg") / "note.jpg")
    for command in (["predict", tmp_path / "in"], ["drift", "--data", tmp_path / "in"]):
        said = refused(copy, *command)
        assert "none of the 1 files there can be used" in said
        assert "note.jpg: not a picture): give a JPEG" in said


def test_a_folder_for_pictures_that_cannot_be_made(copy: Path, picture: Path, tmp_path: Path) -> None:
    rubbish(tmp_path, "taken")
    assert "--pictures" in refused(copy, "predict", picture, "--pictures", tmp_path / "taken")


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{picture}"],
        ["tasks"],
        ["versions"],
        ["show"],
        ["diff", "1", "2"],
        ["rollback", "1"],
        ["forget", "x"],
        ["evaluate"],
        ["gc"],
    ],
)
def test_no_store_there(arguments: list[str], picture: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nostore"
    said = condu(*(each.format(picture=picture) for each in arguments), "--store", nowhere)
    check(said)
    assert f"no store at {nowhere}" in said.err
    assert not nowhere.exists()


def test_a_damaged_object_is_named_and_the_version_before_still_answers(copy: Path, picture: Path) -> None:
    manifest = json.loads((copy / "versions" / "00000002.json").read_text())
    path = copy / next(ref["path"] for name, ref in manifest["objects"].items() if name.startswith("magnitudes-"))
    damage(path)
    said = refused(copy, "predict", picture)
    assert str(path) in said
    assert "version 1 is whole and still serves (--version 1)" in said
    assert condu("predict", picture, "--version", "1", "--store", copy).code == 0
    found = condu("doctor", "--store", copy, "--json").document["store"]["damaged"]
    assert list(found) == [path.relative_to(copy).as_posix()]


def test_every_object_damaged(copy: Path, picture: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        damage(path)
    assert "is damaged" in refused(copy, "predict", picture)


def damage(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(body)


def test_a_damaged_manifest(copy: Path) -> None:
    (copy / "versions" / "00000002.json").write_text("{")
    assert "00000002.json is not readable JSON" in refused(copy, "tasks")
    listed = condu("versions", "--store", copy, "--json")
    assert (listed.code, [row["version"] for row in listed.document]) == (0, [1]), listed.err
    assert "warning:" in listed.err and "00000002.json is not readable JSON" in listed.err
    found = condu("doctor", "--store", copy, "--json").document["store"]
    assert (list(found["damaged"]), found["versions"], found["tasks"]) == (["version 2"], 2, 1)
    damage(copy / open_store(copy).manifest(1).objects["probe-0"].path)
    assert len(condu("doctor", "--store", copy, "--json").document["store"]["damaged"]) == 2


# --- models


def test_a_checkpoint_of_another_model(
    copy: Path, tmp_path: Path, tiny_model_dir: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that the store names holds other weights now."""
    from safetensors.numpy import load_file, save_file

    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    weights = load_file(other / "open_clip_model.safetensors")
    save_file({name: np.asarray(values + 1) for name, values in weights.items()}, other / "open_clip_model.safetensors")
    header = json.loads((copy / "store.json").read_text())
    name = f"local-dir:{other}"
    header["model"]["name"] = header["settings"]["model"] = name
    (copy / "store.json").write_text(json.dumps(header))
    said = refused(copy, "predict", picture)
    assert "the store was made with" in said


def test_another_model_than_the_stores(copy: Path, picture_tasks: dict[str, Path]) -> None:
    said = refused(copy, "learn", "places", "--data", picture_tasks["places"], "--model", "ViT-B-32")
    assert "model is ViT-B-32 (from option), but this store was made with local-dir:" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "ViT-B-33"], ["ViT-B-33", "did you mean ViT-B-32?"]),
        (["--model", "ViT-B-32", "--pretrained", "opneai"], ["opneai", "did you mean openai?"]),
        (["--model", "ViT-B-32"], ["needs weights"]),
        (["--model", "local-dir:/nowhere/at/all"], ["/nowhere/at/all", "open_clip_config.json"]),
    ],
)
def test_models_that_are_not_there(
    picture_tasks: dict[str, Path], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    said = condu("learn", "x", "--data", picture_tasks["places"], "--store", tmp_path / "new", *arguments)
    check(said)
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "new").exists()


# --- permission and room


def refuse_writing(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def refuse(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        if mode.startswith("r"):
            return open(file, mode, *given, **named)
        raise error

    monkeypatch.setattr("condu_ray.store.files.open", refuse, raising=False)


def test_a_store_that_may_not_be_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(monkeypatch, PermissionError(13, "Permission denied"))
    for arguments in (["rollback", "1"], ["forget", "colours"]):
        assert "give this user the permission or choose another --store" in refused(copy, *arguments)


def test_a_disk_that_is_full(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(monkeypatch, OSError(28, "No space left on device"))
    assert "no space left" in refused(copy, "rollback", "1")


def test_a_file_where_the_store_should_be(tmp_path: Path, picture_tasks: dict[str, Path]) -> None:
    rubbish(tmp_path, "file")
    said = condu("learn", "x", "--data", picture_tasks["places"], "--store", tmp_path / "file")
    check(said)
    assert "is a file, not the folder of a store" in said.err


# --- clusters


def test_a_cluster_that_is_not_there(copy: Path, picture_tasks: dict[str, Path]) -> None:
    """As a process, since this one may be connected to a cluster. Ray itself would try for five minutes."""
    given = ["learn", "places", "--data", picture_tasks["places"], "--store", copy, "--tracking", "off"]
    before = digest(copy)
    said = process(*given, RAY_ADDRESS="127.0.0.1:9")
    check(said)
    assert "Ray cluster 127.0.0.1:9" in said.err
    assert "unset RAY_ADDRESS" in said.err
    assert digest(copy) == before


def test_nothing_is_kept_in_the_copy_of_a_folder_that_ray_makes_for_a_job(
    picture_tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job submit --working-dir . -- python jobs/session.py birds --data birds`: the store would go with it."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    shutil.copytree(picture_tasks["places"], copy / "places")
    (copy / "sweep.yaml").write_text("session: {tasks: {places: places}}\nspace: {train.lr: {log: [1e-5, 1e-3]}}\n")
    monkeypatch.chdir(copy)
    before = digest(copy)
    for words, given in {
        ("learn", "places", "--data", "places"): "--store ./condu-store",
        ("sweep", "sweep.yaml"): "--work sweep",
    }.items():
        said = condu(*words)
        check(said)
        assert f"{given} lies in the copy of your folder that Ray made for this job" in said.err
    assert digest(copy) == before
    check_lasting(absolute_url("s3://bucket/store"), "--store s3://bucket/store")
