"""Data sets of torchvision by name: written once into the cache; nothing is downloaded here."""

from __future__ import annotations

import pytest
from PIL import Image

from condu_ray.data import load_picture, open_task
from condu_ray.data.torchvision_sets import KNOWN
from condu_ray.errors import DataError

torchvision = pytest.importorskip("torchvision.datasets")


class FakeFlags:
    """Stands for a data set of the CIFAR kind."""

    classes = ("plane / jet", "automobile")
    made = 0

    def __init__(self, root, train=True, transform=None, download=False):
        assert download and root
        type(self).made += 1
        self.first, self.count = (0, 6) if train else (100, 4)

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return Image.new("L", (8, 8), self.first + number), number % 2


def test_every_known_name_is_there():
    assert len(KNOWN) == 28
    assert [name for name in KNOWN if not hasattr(torchvision, name)] == []


@pytest.mark.parametrize("source", ["torchvision:CIFAR10", "CIFAR10"])
def test_split_and_class_names_are_the_data_sets_own(monkeypatch, source):
    monkeypatch.setattr(torchvision, "CIFAR10", FakeFlags)
    monkeypatch.setattr(FakeFlags, "made", 0)
    task = open_task("t", source)
    assert task.classes == ("plane / jet", "automobile") and not task.split_made
    assert (len(task.train), len(task.test)) == (6, 4)
    assert sorted(load_picture(picture).getpixel((0, 0))[0] for picture in task.test.pictures) == [100, 101, 102, 103]
    again = open_task("t", source)
    assert again == task and FakeFlags.made == 2


def test_a_data_set_without_class_names_or_split(monkeypatch):
    monkeypatch.setattr(torchvision.FakeData.__init__, "__defaults__", (40, (3, 16, 16), 2, None, None, 0))
    task = open_task("t", "FakeData")
    assert task.classes == ("0", "1") and task.split_made
    assert len(task.train) + len(task.test) == 40 and task.sizes.width == (16, 16, 16)


def test_labels_that_start_above_zero_or_leave_one_out(monkeypatch):
    class FromThree(FakeFlags):
        classes = None

        def __init__(self, root, split, download=False):
            super().__init__(root, split == "train", download=download)

        def __getitem__(self, number):
            return super().__getitem__(number)[0], 3 + 2 * (number % 2)

    monkeypatch.setattr(torchvision, "CLEVRClassification", FromThree)
    assert open_task("t", "CLEVRClassification").classes == ("3", "5")


def test_emnist_has_a_split_whose_names_differ(monkeypatch):
    """Letters: their labels count from 1."""
    real = torchvision.EMNIST

    class FakeLetters(FakeFlags):
        def __init__(self, root, split, train=True, download=False):
            super().__init__(root, train, download=download)
            self.classes = real.classes_split_dict[split]
            self.first, self.count = (0, 52) if train else (100, 26)

        def __getitem__(self, number):
            return Image.new("L", (8, 8), self.first + number), 1 + number % 26

    monkeypatch.setattr(torchvision, "EMNIST", FakeLetters)
    assert "".join(open_task("t", "EMNIST").classes) == "abcdefghijklmnopqrstuvwxyz"


def test_of_several_names_a_class_the_first_is_taken(monkeypatch):
    class FakeNames(FakeFlags):
        classes = (("tench", "Tinca tinca"), ("cassette player",))

        def __init__(self, root, split, download=False):
            super().__init__(root, split == "train", download=download)

    monkeypatch.setattr(torchvision, "Imagenette", FakeNames)
    assert open_task("t", "Imagenette").classes == ("tench", "cassette player")


def test_larger_pictures_are_kept_as_jpeg(monkeypatch):
    monkeypatch.setattr(torchvision.FakeData.__init__, "__defaults__", (12, (3, 200, 130), 2, None, None, 0))
    task = open_task("t", "torchvision:FakeData")
    assert {picture.path.rpartition(".")[2] for picture in task.train.pictures} == {"jpg"}


def test_a_failed_download_is_one_sentence_and_leaves_nothing(monkeypatch, cache):
    def fail(root, train=True, download=False):
        raise RuntimeError("Error downloading cifar-10.tar.gz:\nConnection refused")

    monkeypatch.setattr(torchvision, "CIFAR10", fail)
    with pytest.raises(
        DataError, match=r"could not get CIFAR10 \(Error downloading cifar-10.tar.gz:\): check"
    ) as raised:
        open_task("t", "CIFAR10")
    assert "\n" not in str(raised.value)
    assert list((cache / "torchvision").iterdir()) == []


def test_an_interrupted_writing_is_begun_anew(monkeypatch, cache):
    def stop(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return Image.new("L", (8, 8), number), number % 2

    monkeypatch.setattr(torchvision, "CIFAR10", FakeFlags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeFlags, "__getitem__", stop)
        open_task("t", "CIFAR10")
    assert len(open_task("t", "CIFAR10").train) == 6


def test_names_that_are_no_classification_set():
    with pytest.raises(DataError, match=r"'CIFAR11' is not a data set of torchvision.*did you mean CIFAR10\?"):
        open_task("t", "torchvision:CIFAR11")
    with pytest.raises(DataError, match="'CocoDetection' is not a data set"):
        open_task("t", "torchvision:CocoDetection")
