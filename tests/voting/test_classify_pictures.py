from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condu_ray.errors import DataError, NotFound
from condu_ray.models.clip import Clip
from condu_ray.voting.classifier import Classifier
from condu_ray.voting.pictures import classify_paths

Make = Callable[..., Classifier]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    made = []
    for index in range(5):
        pixels = np.tile(random.integers(0, 256, 3, dtype=np.uint8), (40, 48, 1))
        made.append(folder / f"{index}.png")
        Image.fromarray(pixels).save(made[-1])
    return made


def test_files_are_answered_as_their_pixels_are(
    make: Make, tiny_clip: Clip, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make()
    done: list[tuple[int, int, str]] = []
    monkeypatch.setattr("condu_ray.voting.pictures.BATCH", 2)
    answers = classify_paths(classifier, paths, progress=lambda *at: done.append(at))
    assert done == [(2, 5, ""), (4, 5, ""), (5, 5, "")]
    pixels = torch.stack([tiny_clip.eval_transform(Image.open(path)) for path in paths])
    for answer, expected in zip(answers, classifier.classify(pixels), strict=True):
        assert answer["label"] == expected.label.name
        assert answer["probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_the_answers_keep_the_order_of_the_paths(make: Make, paths: list[Path]) -> None:
    forward = classify_paths(make(), paths, labels=["red", "blue"], top=1)
    backward = classify_paths(make(), paths[::-1], labels=["red", "blue"], top=1)
    assert [answer["image"] for answer in forward] == [str(path) for path in paths]
    assert [answer["label"] for answer in forward] == [answer["label"] for answer in backward[::-1]]
    assert {len(answer["labels"]) for answer in forward} == {1}
    assert classify_paths(make(), []) == []


def test_files_that_are_no_pictures_are_named(make: Make, paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.png"):
        classify_paths(make(), [*paths, tmp_path / "no.png"])
    note = tmp_path / "note.jpg"
    note.write_text("not a picture")
    with pytest.raises(DataError, match=r"note\.jpg.*not a picture"):
        classify_paths(make(), [note])


def test_a_wrong_task_is_refused_before_any_picture_is_read(make: Make, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"did you mean pets\?"):
        classify_paths(make(), [tmp_path / "no.png"], task="pet")
