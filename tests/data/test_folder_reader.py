"""Image folders: what is read, and what is refused with one sentence."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from condu_ray.data import DEFAULT_TEMPLATES, load_picture, open_task
from condu_ray.errors import DataError


def counts(split, classes):
    return np.bincount(split.labels, minlength=classes).tolist()


def test_folder_without_a_split_gets_one(make, tmp_path):
    task = open_task("t", str(make.image_folder(tmp_path / "d", ["cat", "a_dog"], count=10)), test_share=0.2)
    assert task.classes == ("a_dog", "cat")
    assert task.split_made
    assert (counts(task.train, 2), counts(task.test, 2)) == ([8, 8], [2, 2])
    assert task.templates == DEFAULT_TEMPLATES
    assert task.skipped == () and task.leaked == 0
    assert (task.sizes.width, task.sizes.height) == ((8, 8, 8), (6, 6, 6))


def test_labels_belong_to_their_pictures(make, tmp_path):
    for number, name in enumerate(["blue", "green", "red"]):
        for shade in range(100, 106):
            colour = [0, 0, 0]
            colour[2 - number] = shade
            make.write(tmp_path / name / f"{shade}.png", make.encoded(Image.new("RGB", (3, 3), tuple(colour))))
    task = open_task("t", tmp_path)
    for split in (task.train, task.test):
        for picture, label in zip(split.pictures, split.labels, strict=True):
            assert int(np.argmax(load_picture(picture).getpixel((0, 0)))) == 2 - label


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val"), ("Train", "Testing")])
def test_folder_with_a_split(make, tmp_path, names):
    make.image_folder(tmp_path / names[0], ["a", "b"], count=3)
    make.image_folder(tmp_path / names[1], ["a", "b"], count=2, first=100)
    task = open_task("t", tmp_path)
    assert not task.split_made
    assert (counts(task.train, 2), counts(task.test, 2)) == ([3, 3], [2, 2])


def test_val_joins_train_where_there_is_a_test_split(make, tmp_path):
    for first, part in enumerate(["train", "val", "test"]):
        make.image_folder(tmp_path / part, ["a", "b"], count=2, first=100 * first)
    task = open_task("t", tmp_path)
    assert (counts(task.train, 2), counts(task.test, 2)) == ([4, 4], [2, 2])


def test_train_alone_is_split(make, tmp_path):
    make.image_folder(tmp_path / "train", ["a", "b"], count=5)
    task = open_task("t", tmp_path)
    assert task.split_made and (len(task.train), len(task.test)) == (8, 2)


@pytest.mark.parametrize("beside", ["test/1.png", "test_images/1.png", "annotations/a.xml"])
def test_what_has_no_classes_may_lie_beside_train(make, tmp_path, beside):
    make.image_folder(tmp_path / "train", ["a", "b"], count=5)
    make.write(tmp_path / beside, make.picture_bytes(99))
    assert open_task("t", tmp_path).classes == ("a", "b")


def test_a_class_may_be_called_train(make, tmp_path):
    make.image_folder(tmp_path, ["train", "bus"])
    assert open_task("t", tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("Train Images", "Valid Images"),
        ("train2017", "val2017"),
        ("TrainingSet", "TestSet"),
    ],
)
def test_splits_under_longer_names(make, tmp_path, train, test):
    make.image_folder(tmp_path / "d" / train, ["cats", "dogs"], count=3)
    make.image_folder(tmp_path / "d" / test, ["cats", "dogs"], count=2, first=100)
    make.image_folder(tmp_path / "d", ["pred"], count=2, first=200)
    make.image_folder(tmp_path / "plain" / "train", ["cats", "dogs"], count=3)
    make.image_folder(tmp_path / "plain" / "test", ["cats", "dogs"], count=2, first=100)
    task = open_task("t", tmp_path / "d")
    assert task.classes == ("cats", "dogs") and (len(task.train), len(task.test)) == (6, 4)
    assert task.fingerprint == open_task("t", tmp_path / "plain").fingerprint


def test_classes_may_be_called_like_splits_of_several_things(make, tmp_path):
    make.image_folder(tmp_path, ["freight_train", "test_tube", "valid"])
    assert open_task("t", tmp_path).classes == ("freight_train", "test_tube", "valid")


def test_classes_may_hold_the_same_folders(make, tmp_path):
    for first, name in enumerate(["heron", "owl"]):
        make.image_folder(tmp_path / name, ["female", "male"], first=50 * first)
    assert open_task("t", tmp_path).classes == ("heron", "owl")


def test_nested_pictures_hidden_files_and_companions(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b"], count=4)
    make.write(tmp_path / "a" / "deep" / "er" / "x.png", make.picture_bytes(50))
    for name in ("a/.x.png", ".cache/x.png", "a/notes.txt", "b/Thumbs.db", "b/boxes.json", "loose.png"):
        make.write(tmp_path / name, b"not read")
    task = open_task("t", tmp_path)
    assert task.classes == ("a", "b") and len(task.train) + len(task.test) == 9


def test_folders_that_systems_add_are_no_classes_and_hold_no_pictures(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b"], count=4)
    for name in ("a/@eaDir/0.png/thumb.jpg", "$RECYCLE.BIN/x.png", "__MACOSX/a/._0.png"):
        make.write(tmp_path / name, make.picture_bytes(60))
    (tmp_path / "lost+found").mkdir()
    task = open_task("t", tmp_path)
    assert task.classes == ("a", "b") and len(task.train) + len(task.test) == 8


def test_classnames_and_templates_are_honoured(make, tmp_path):
    make.image_folder(tmp_path, ["n01", "n02"])
    make.write(tmp_path / "classnames.txt", "\ufeffgreat white\r\ntench\r\n".encode())
    make.write(tmp_path / "zeroshot_classification_templates.txt", b"a {c} here.\n\nmy {}\n")
    task = open_task("t", tmp_path)
    assert task.classes == ("great white", "tench")
    assert task.templates == ("a {c} here.", "my {}")


def test_classnames_that_are_the_folders_give_the_order(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b", "c"], count=3)
    make.write(tmp_path / "classnames.txt", b"c\na\nb\n")
    task = open_task("t", tmp_path)
    assert task.classes == ("c", "a", "b")
    assert all(
        task.classes[i] in p.path.split("/") for p, i in zip(task.train.pictures, task.train.labels, strict=True)
    )


def test_an_accent_may_be_written_otherwise_in_the_other_split(make, tmp_path):
    """macOS writes it as two characters, most others as one."""
    make.image_folder(tmp_path / "train", ["cafe\u0301", "tea"], count=3)
    make.image_folder(tmp_path / "test", ["caf\u00e9", "tea"], count=2, first=100)
    task = open_task("t", tmp_path)
    assert task.classes == ("caf\u00e9", "tea")
    assert (counts(task.train, 2), counts(task.test, 2)) == ([3, 3], [2, 2])
    make.write(tmp_path / "classnames.txt", "tea\ncafe\u0301\n".encode())
    assert open_task("t", tmp_path).classes == ("tea", "cafe\u0301")


def build_empty(make, root):
    root.mkdir()


def build_folder_of_sets(make, root):
    for name in ("x", "y"):
        make.image_folder(root / name / "train", ["a", "b"])
        make.image_folder(root / name / "test", ["a", "b"], first=50)


def build_loose(make, root):
    make.write(root / "x.png", make.picture_bytes(1))


def build_single(make, root):
    make.image_folder(root, ["only"])


def build_empty_class(make, root):
    make.image_folder(root, ["a", "b"])
    (root / "void").mkdir()


def build_empty_test_class(make, root):
    make.image_folder(root / "train", ["a", "b"])
    make.image_folder(root / "test", ["a"], first=50)
    (root / "test" / "b").mkdir()


def build_text_only(make, root):
    make.write(root / "a" / "x.txt", b"text")
    make.write(root / "b" / "x.txt", b"text")


def build_no_pictures(make, root):
    make.write(root / "a" / "note.jpg", b"this is no picture")
    make.write(root / "b" / "note.jpg", b"this is no picture")


def build_twins(make, root):
    make.image_folder(root, ["Great_White", "great white"])


def build_test_only_class(make, root):
    make.image_folder(root / "train", ["a", "b"])
    make.image_folder(root / "test", ["a", "c"], first=50)


def build_test_without_train(make, root):
    make.image_folder(root / "test", ["a", "b"])


def build_two_trainings(make, root):
    make.image_folder(root / "train", ["a", "b"])
    make.image_folder(root / "Training", ["a", "b"], first=50)


def build_flat_splits(make, root):
    make.image_folder(root, ["train", "test"])


def build_unlabelled_test(make, root):
    make.image_folder(root / "letters_train", ["a", "b"])
    make.image_folder(root, ["letters_test"], first=50)


def build_two_sets(make, root):
    for first, name in enumerate(["a_train", "a_test", "b_train", "b_test"]):
        make.image_folder(root / name, ["a", "b"], first=50 * first)


def build_strange_test(make, root):
    make.image_folder(root / "train_set", ["a", "b"])
    make.image_folder(root / "holdout", ["a", "b"], first=50)


def build_train_is_a_class(make, root):
    make.image_folder(root, ["bus", "car"])
    make.image_folder(root / "train", ["diesel", "steam"], first=50)


def build_test_by_another_name(make, root):
    make.image_folder(root / "train", ["a", "b"])
    make.image_folder(root / "test_set", ["a", "b"], first=50)


def build_too_few(make, root):
    make.image_folder(root, ["a", "b"])
    make.write(root / "c" / "x.png", make.picture_bytes(77))


def build_equal_only(make, root):
    make.image_folder(root, ["a", "b"])
    for number in range(3):
        make.write(root / "c" / f"{number}.png", make.picture_bytes(77))


def build_short_list(make, root):
    make.image_folder(root, ["cat", "dog", "emu"])
    make.write(root / "classnames.txt", b"cat\ndgo\n")


def build_shifted_list(make, root):
    make.image_folder(root, ["cat", "dog", "emu"])
    make.write(root / "classnames.txt", b"Dog\nEmu\nbird\n")


def build_blank_line(make, root):
    make.image_folder(root, ["n1", "n2", "n3"])
    make.write(root / "classnames.txt", b"cat\n\nemu\n")


def build_bad_template(make, root):
    make.image_folder(root, ["a", "b"])
    make.write(root / "zeroshot_classification_templates.txt", b"a photo of a thing.\n")


def build_no_template(make, root):
    make.image_folder(root, ["a", "b"])
    make.write(root / "zeroshot_classification_templates.txt", b"\n")


def build_latin_list(make, root):
    make.image_folder(root, ["a", "b"])
    make.write(root / "classnames.txt", b"caf\xe9\nbar\n")


REFUSED = {
    build_empty: "holds no class folders: give a folder",
    build_folder_of_sets: r"each folder in .* \(x, y\) is a data set with its own train/: give one of them",
    build_loose: r"holds pictures \(x.png\) but no class folders",
    build_single: r"one class only \('only'\): a task needs at least two",
    build_empty_class: "the class folder .*void holds no pictures",
    build_empty_test_class: "the class folder .*test/b holds no pictures",
    build_text_only: "the class folder .*/a holds no pictures",
    build_no_pictures: r"2 of 2 pictures in .* cannot be used, more than 5%: a/note.jpg \(not a picture\); b/note.jpg",
    build_twins: "'Great_White' .number 1. and 'great white' .number 2. have the same name",
    build_test_only_class: "class 'c' has 5 test pictures, but none to train on",
    build_test_without_train: "has test/ but no train/",
    build_two_trainings: "has both Training/ and train/: put them together",
    build_flat_splits: "has test/ and train/, by name splits and no class: sort the pictures as train/CLASS/PICTURE",
    build_unlabelled_test: "has letters_test/ and letters_train/, by name splits",
    build_two_sets: "has a_test/ and a_train/, by name splits",
    build_strange_test: "has train_set/, by name a split and no class",
    build_train_is_a_class: "has train/ with folders in it, no test split, and pictures in bus/: .*give .*train itself",
    build_test_by_another_name: "no test split, and pictures in test_set/: call the other split test/ or val/",
    build_too_few: "class 'c' has only one picture, too few",
    build_equal_only: "class 'c' has only 3 equal pictures, too few",
    build_short_list: r"has 2 lines for 3 class folders: .*no folder: dgo.*no line: dog, emu",
    build_shifted_list: "line 1 is 'Dog', but that folder is 'cat'",
    build_blank_line: "class 2 has an empty name",
    build_bad_template: "'a photo of a thing.' has no place for the class: write {c}",
    build_no_template: "holds no prompt template",
    build_latin_list: "classnames.txt is not UTF-8 text",
}


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_refused_with_one_sentence(make, tmp_path, build):
    build(make, tmp_path / "d")
    with pytest.raises(DataError, match=REFUSED[build]) as raised:
        open_task("t", tmp_path / "d")
    assert "\n" not in str(raised.value)


def test_unknown_sources(make, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    make.write(tmp_path / "data.zip", b"PK")
    with pytest.raises(DataError, match=r"no data at .*did you mean pictures\?"):
        open_task("t", tmp_path / "picture")
    with pytest.raises(DataError, match="data.zip is neither a folder nor a .csv file"):
        open_task("t", tmp_path / "data.zip")
    with pytest.raises(DataError, match="no data at 's3://bucket/x'"):
        open_task("t", "s3://bucket/x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no data at 'CIFAR11'.*did you mean CIFAR10"):
        open_task("t", "CIFAR11")


def test_corrupt_pictures_are_skipped_up_to_the_limit(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b"], count=10)
    whole = make.picture_bytes(500, (64, 64))
    make.write(tmp_path / "a" / "cut.png", whole[: len(whole) // 2])
    task = open_task("t", tmp_path)
    assert [one.path for one in task.skipped] == ["a/cut.png"]
    assert "truncated" in task.skipped[0].reason
    assert len(task.train) + len(task.test) == 20
    make.write(tmp_path / "b" / "empty.jpg", b"")
    with pytest.raises(
        DataError, match=r"2 of 22 pictures .* more than 5%: a/cut.png \(.*\); b/empty.jpg \(empty file\)"
    ):
        open_task("t", tmp_path)


def test_a_class_whose_pictures_are_all_corrupt(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b"], count=30)
    make.write(tmp_path / "c" / "x.png", b"no")
    with pytest.raises(DataError, match="none of the 1 pictures of class 'c' can be read"):
        open_task("t", tmp_path)


def test_a_dead_link_is_skipped_and_a_circle_is_no_trap(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b"], count=20)
    (tmp_path / "a" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    task = open_task("t", tmp_path)
    assert [(one.path, one.reason) for one in task.skipped] == [("a/dead.png", "no such file")]


def test_pictures_in_both_splits_are_counted_and_kept(make, tmp_path):
    make.image_folder(tmp_path / "train", ["a", "b"], count=3)
    make.image_folder(tmp_path / "test", ["a", "b"], count=3, first=5)
    task = open_task("t", tmp_path)
    assert task.leaked == 1 and len(task.test) == 6


def test_progress_counts_up_to_all(make, tmp_path):
    make.image_folder(tmp_path, ["a", "b"], count=50)
    seen = []
    open_task("t", tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 100), (100, 100)]
