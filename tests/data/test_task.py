"""What is promised of an opened task: fingerprint, order, shipping, report, prompts, reading for training."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from condu_ray.data import DEFAULT_TEMPLATES, Picture, PictureSet, Split, describe, open_task, prompts
from condu_ray.data.listing import check_names
from condu_ray.errors import DataError
from condu_ray.reports import show_data


@pytest.fixture
def folder(make, tmp_path):
    return make.image_folder(tmp_path / "d", ["a", "b"], count=6)


def test_fingerprint_knows_content_only(folder, tmp_path):
    task = open_task("t", folder)
    files = sorted(folder.rglob("*.png"))
    shuffled = random.Random(1).sample(range(len(files)), len(files))
    for place, file in zip(shuffled, files, strict=True):
        target = tmp_path / "elsewhere" / file.parent.name / "sub" / f"new-{place:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        os.utime(target, (place, place))
    moved = open_task("other name", tmp_path / "elsewhere")
    assert moved.fingerprint == task.fingerprint
    for one, other in ((task.train, moved.train), (task.test, moved.test)):
        assert one.labels.tolist() == other.labels.tolist()
        bodies = [[Path(picture.path).read_bytes() for picture in split.pictures] for split in (one, other)]
        assert bodies[0] == bodies[1]


def test_the_same_pictures_in_a_folder_and_a_tar(make, tmp_path):
    members = make.tar_folder(tmp_path / "tars", ["a", "b"])
    for part, labels, first in (("train", [0] * 4 + [1] * 4, 0), ("test", [0] * 2 + [1] * 2, 1000)):
        for number, label in enumerate(labels, start=first):
            make.write(tmp_path / "folder" / part / "ab"[label] / f"{number}.png", make.picture_bytes(number))
    assert open_task("t", members).fingerprint == open_task("t", tmp_path / "folder").fingerprint


def test_fingerprint_changes_with_what_is_learned(make, folder, tmp_path):
    prints = [open_task("t", folder).fingerprint]
    for name, lines in (("zeroshot_classification_templates.txt", b"a {c}"), ("classnames.txt", b"b\na")):
        make.write(folder / name, lines)
        prints.append(open_task("t", folder).fingerprint)
        os.remove(folder / name)
    prints.append(open_task("t", folder, seed=1).fingerprint)
    prints.append(open_task("t", folder, test_share=0.4).fingerprint)
    os.rename(folder / "a" / "0.png", folder / "b" / "0.png")
    prints.append(open_task("t", folder).fingerprint)
    make.write(folder / "b" / "0.png", make.picture_bytes(12345))
    prints.append(open_task("t", folder).fingerprint)
    assert len(set(prints)) == len(prints)
    assert all(len(one) == 64 for one in prints)


def test_a_task_travels_small_and_whole(folder):
    task = open_task("t", folder)
    assert pickle.loads(pickle.dumps(task)) == task
    many = Split(tuple(Picture("/data/train/0.tar", number * 1024, 900) for number in range(10_000)), np.zeros(10_000))
    body = pickle.dumps(many)
    assert pickle.loads(body) == many
    assert len(body) < 32 * 10_000


def test_a_split_needs_a_label_for_each_picture():
    with pytest.raises(ValueError, match="2 pictures but labels of shape"):
        Split((Picture("a"), Picture("b")), np.zeros(3))


def test_describe_is_json_and_counts(make, tmp_path):
    folder = make.image_folder(tmp_path, ["a", "b"], count=10)
    make.write(folder / "a" / "x.png", b"no picture")
    said = json.loads(json.dumps(describe(open_task("t", folder))))
    assert said["classes"] == ["a", "b"] and said["split_made"] is True
    assert said["train"] == {"pictures": 16, "least_per_class": 8, "most_per_class": 8}
    assert said["test"] == {"pictures": 4, "least_per_class": 2, "most_per_class": 2}
    assert said["width"] == {"min": 8, "median": 8, "max": 8}
    assert said["skipped"] == [{"path": "a/x.png", "reason": "not a picture"}]
    assert said["leaked"] == 0


def test_the_first_class_names_are_shown(make, tmp_path, capsys):
    names = [f"class {number}" for number in range(9)]
    show_data([describe(open_task("t", make.image_folder(tmp_path, names, count=2)))])
    assert "\n  classes: " + ", ".join(names[:8]) + ", ...\n" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_refused_before_anything_is_trained(tmp_path):
    """A manifest could not hold them; such names are what the system makes of bytes in another encoding."""
    with pytest.raises(DataError, match=r"here: the class name 'caf\\udce9' is not UTF-8 text: rename it"):
        check_names(["cat", "caf\udce9"], "here")
    with pytest.raises(DataError, match=r"t: the source '.*caf\\udce9' is not UTF-8 text: rename it"):
        open_task("t", tmp_path / "caf\udce9")


@pytest.mark.parametrize("twin", ["caf\u00e9 au lait", "CAFE\u0301_au  lait"])
def test_names_that_are_the_same_word_are_refused(twin):
    with pytest.raises(DataError, match="have the same name"):
        check_names(["cafe\u0301 au lait", twin], "here")


def test_prompts():
    assert prompts("great_white  shark", ["a {c}.", "my {}!"]) == ["a great white shark.", "my great white shark!"]
    assert prompts("a {} b", ["the {c}."]) == ["the a {} b."]
    assert DEFAULT_TEMPLATES[0] == "a photo of a {c}." and len(set(DEFAULT_TEMPLATES)) == len(DEFAULT_TEMPLATES)


def test_opening_a_task_imports_no_torch(folder):
    code = f"import sys, condu_ray.data as d; d.open_task('t', {str(folder)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_augmentation_depends_on_the_seed_alone(folder):
    torch = pytest.importorskip("torch")
    split = open_task("t", folder).train

    def transform(picture):
        return torch.from_numpy(np.array(picture)).float() + torch.rand(1)

    pictures = PictureSet(split, transform)
    assert len(pictures) == len(split)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = [pictures[3, 11], pictures[4, 12]]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    second = [pictures[4, 12], pictures[3, 11]]
    assert torch.equal(first[0][0], second[1][0]) and torch.equal(first[1][0], second[0][0])
    assert not torch.equal(pictures[3, 12][0], first[0][0])
    assert first[0][1] == int(split.labels[3])


def test_a_loader_with_worker_processes_gives_the_same(make, tmp_path):
    torch = pytest.importorskip("torch")
    split = open_task("t", make.tar_folder(tmp_path / "d", ["a", "b"])).train

    def transform(picture):
        return torch.from_numpy(np.array(picture)).float() + torch.rand(1)

    keys = [(number % len(split), number) for number in range(12)]
    loaded = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            PictureSet(split, transform), batch_size=4, sampler=keys, num_workers=workers
        )
        loaded.append([(batch.clone(), labels.clone()) for batch, labels in loader])
    assert len(loaded[0]) == 3
    for (one, labels), (other, others) in zip(*loaded, strict=True):
        assert torch.equal(one, other) and torch.equal(labels, others)
