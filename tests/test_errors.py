"""Every error is a sentence that names the mend, and crosses process borders whole."""

from __future__ import annotations

import pickle

import pytest

from condu_ray import errors
from condu_ray.errors import ConduError, DataError, TrainingError, nearest

EVERY = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ConduError)]


def test_every_kind_of_mistake_is_a_condu_error() -> None:
    assert len(EVERY) == 12


@pytest.mark.parametrize(
    ("message", "mend", "sentence"),
    [
        ("no such file", "give another path", "no such file: give another path."),
        ("no such file.", "give another path.", "no such file: give another path."),
        ("no such file", "", "no such file."),
        ("no task 'cat'", "did you mean cats?", "no task 'cat': did you mean cats?"),
    ],
)
def test_an_error_reads_as_one_sentence(message: str, mend: str, sentence: str) -> None:
    assert str(DataError(message, mend)) == sentence


@pytest.mark.parametrize("kind", EVERY)
def test_an_error_from_another_process_says_the_same(kind: type[ConduError]) -> None:
    """Workers send theirs to the driver."""
    error = kind("task a: the loss is nan", "train with a smaller --train.lr")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert (back.message, back.mend) == (error.message, error.mend)


def test_a_mistake_can_be_caught_by_its_kind() -> None:
    with pytest.raises(ConduError):
        raise TrainingError("no")
    assert issubclass(errors.DamagedObject, errors.StoreError)


@pytest.mark.parametrize(
    ("name", "known", "told"),
    [
        ("flower", ["flowers", "cars"], "did you mean flowers?"),
        ("vit-b-16", ["ViT-S-16", "ViT-B-16"], "did you mean ViT-B-16?"),
        ("zebra", ["b", "a"], "known: a, b"),
        ("zebra", [], "there are none yet"),
        (
            "zebra",
            [f"task{n:02}" for n in range(11)],
            "known: " + ", ".join(f"task{n:02}" for n in range(10)) + ", ...",
        ),
    ],
)
def test_the_nearest_right_name_is_offered(name: str, known: list[str], told: str) -> None:
    assert nearest(name, iter(known)) == told
