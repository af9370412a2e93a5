"""`condu-ray predict`: the published JSON, the three label spaces, versions that never change their answers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import condu, process

from condu_ray import reports
from condu_ray.config import ModelSpec
from condu_ray.models.clip import Clip
from condu_ray.models.load import load


def test_the_published_object(store: Path, picture: Path) -> None:
    said = condu("predict", picture, "--store", store, "--json")
    assert said.code == 0
    (answer,) = said.document
    keys = ["image", "label", "task", "probability", "labels", "votes", "label_space", "strangeness", "version"]
    assert list(answer) == keys
    assert answer["image"] == str(picture)
    assert [list(each) for each in answer["labels"]] == [["label", "task", "probability"]] * len(answer["labels"])
    assert [list(each) for each in answer["votes"]] == [["task", "similarity", "weight"]] * len(answer["votes"])
    first = answer["labels"][0]
    assert (first["label"], first["task"], first["probability"]) == (
        answer["label"],
        answer["task"],
        answer["probability"],
    )
    shares = [each["probability"] for each in answer["labels"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(vote["weight"] for vote in answer["votes"]) == pytest.approx(1, abs=1e-5)
    assert (answer["label_space"], answer["version"]) == ("union", 2)


def test_a_named_task_is_answered_by_its_expert_alone(store: Path, picture: Path) -> None:
    (answer,) = condu("predict", picture, "--task", "colours", "--store", store, "--json").document
    assert (answer["label"], answer["task"], answer["label_space"]) == ("red", "colours", "task")
    assert {each["label"] for each in answer["labels"]} == {"red", "green", "blue"}
    assert sum(each["probability"] for each in answer["labels"]) == pytest.approx(1, abs=1e-5)
    assert answer["votes"] == [{"task": "colours", "similarity": None, "weight": 1.0}]


def test_labels_of_ones_own_belong_to_no_task(store: Path, picture: Path) -> None:
    (answer,) = condu("predict", picture, "--labels", "cat, dog,a car", "--store", store, "--json").document
    assert {each["label"] for each in answer["labels"]} == {"cat", "dog", "a car"}
    assert {each["task"] for each in answer["labels"]} == {None}
    assert answer["label_space"] == "candidates"


def test_one_object_a_picture_in_the_order_given(store: Path, picture_tasks: dict[str, Path], picture: Path) -> None:
    folder = picture_tasks["stripes"] / "test" / "across"
    answers = condu("predict", picture, folder, "--store", store, "--json").document
    assert [each["image"] for each in answers] == [str(picture), *map(str, sorted(folder.iterdir()))]
    alone = condu("predict", picture, "--store", store, "--json").document
    assert answers[:1] == alone


@pytest.mark.parametrize(("gpus", "asked", "used"), [(1, [], "cuda"), (1, ["--gpu", "no"], "cpu"), (0, [], "cpu")])
@pytest.mark.parametrize("command", ["predict", "drift"])
def test_pictures_are_looked_at_on_a_gpu_where_one_is_seen_and_may_be_used(
    store: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, command: str, gpus: int, asked: list[str], used: str
) -> None:
    devices = []

    def loaded(spec: ModelSpec, device: str = "cpu", *given: Any, **named: Any) -> Clip:
        devices.append(device)
        return load(spec, "cpu", *given, **named)

    for place in ("open", "drift"):
        monkeypatch.setattr(f"condu_ray.voting.{place}.load", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    pictures = [picture] if command == "predict" else ["--data", picture]
    said = condu(command, *pictures, *asked, "--store", store, "--json")
    assert said.code == 0, said.err
    assert devices == [used]


def test_top_limits_the_labels_and_not_the_probabilities(store: Path, picture: Path) -> None:
    (short,) = condu("predict", picture, "--top", "1", "--store", store, "--json").document
    (long,) = condu("predict", picture, "--store", store, "--json").document
    assert len(short["labels"]) == 1
    assert short["probability"] == long["probability"]


def test_an_older_version_still_answers_as_it_did(store: Path, copy: Path, picture: Path) -> None:
    before = condu("predict", picture, "--version", "1", "--store", store, "--json").document
    condu("forget", "colours", "--store", copy)
    after = condu("predict", picture, "--version", "1", "--store", copy, "--json").document
    assert before == after
    assert before[0]["version"] == 1


def test_for_people_it_names_version_label_and_votes(store: Path, picture: Path) -> None:
    text = condu("predict", picture, "--task", "colours", "--store", store).out
    assert "version 2" in text
    assert "red" in text
    assert "colours 1.00" in text


def test_a_name_that_is_no_text_is_printed_all_the_same(store: Path, picture: Path, tmp_path: Path) -> None:
    """From an archive of another system, say."""
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(picture, odd)
    said = process("predict", os.fsdecode(odd), "--store", store, "--json", PYTHONIOENCODING="utf-8:strict")
    assert said.code == 0, said.err
    assert said.document[0]["image"] == os.fsdecode(odd)


def test_a_file_in_a_folder_that_is_no_picture_is_skipped_and_told(store: Path, picture: Path, tmp_path: Path) -> None:
    shutil.copy(picture, tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:60])
    for command in (["predict", tmp_path], ["drift", "--data", tmp_path]):
        said = condu(*command, "--store", store, "--json")
        assert said.code == 0, said.err
        assert f"skipped {tmp_path / 'half.png'}: " in said.err
    assert [answer["image"] for answer in condu("predict", tmp_path, "--store", store, "--json").document] == [
        str(tmp_path / "good.png")
    ]


def test_votes_are_drawn(store: Path, picture: Path, tmp_path: Path) -> None:
    assert condu("predict", picture, "--store", store, "--pictures", tmp_path / "votes", "--json").code == 0
    assert [path.name for path in (tmp_path / "votes").iterdir()] == ["votes_0000.png"]


def test_it_starts_no_ray(store: Path, picture: Path) -> None:
    code = (
        "import sys; from condu_ray.cli import main\ntry: main()\nfinally: print('ray' in sys.modules, file=sys.stderr)"
    )
    said = process("predict", picture, "--store", store, "--json", code=code)
    assert (said.code, said.err.split()[-1]) == (0, "False")
    assert json.loads(said.out) == condu("predict", picture, "--store", store, "--json").document


WITHOUT_RAY = """
import json, sys
from condu_ray.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as left:
        print(json.dumps([arguments[0], left.code, "ray" in sys.modules]), file=sys.stderr)
"""


def test_commands_that_work_on_one_store_start_no_ray(copy: Path, picture: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for name, value in (("base", 0.0), ("birds", 1.0)):
        save_file({"weight": np.full((4, 4), value, np.float32)}, tmp_path / f"{name}.safetensors")
    here = ["--store", str(copy)]
    merging = [str(tmp_path / "base.safetensors"), str(tmp_path / "birds.safetensors"), "-o", str(tmp_path / "merged")]
    commands = [["drift", "--data", str(picture.parent), *here], ["track", *here], ["merge", *merging]]
    commands += [["export", str(copy), "--task", "colours", "-o", str(tmp_path / "out.safetensors")]]
    commands += [["forget", "stripes", *here], ["gc", "--fold", *here]]
    said = process(json.dumps(commands), code=WITHOUT_RAY)
    ran = [json.loads(line) for line in said.err.splitlines() if line.startswith('["')]
    assert ran == [[command[0], 0, False] for command in commands], said.err


def test_the_table_names_every_version_that_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """A server may take up a newer one between two pictures."""
    answer = {"image": "a", "label": "x", "task": None, "probability": 0.5, "votes": [], "label_space": "union"}
    reports.show_answers([{**answer, "version": version} for version in (4, 3, 4)])
    assert "answers by version 3 and 4, label space union" in capsys.readouterr().out
