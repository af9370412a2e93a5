from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from condu_ray.data.templates import DEFAULT_TEMPLATES
from condu_ray.errors import DataError
from condu_ray.voting.labels import Block, Label, LabelSpace


@dataclass(frozen=True)
class Card:
    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]


PETS = Card("pets", ("cat", "dog"), ("a pet {c}.",))
SIGNS = Card("signs", ("stop", "cat"), ("the sign {}.", "a sign: {}."))


def test_a_task_speaks_by_its_own_templates() -> None:
    space = LabelSpace.of_task(SIGNS)
    assert space.kind == "task"
    assert space.labels == (Label("signs", "stop"), Label("signs", "cat"))
    assert space.prompts == (("the sign stop.", "a sign: stop."), ("the sign cat.", "a sign: cat."))


def test_two_tasks_with_one_class_name_stay_two_labels() -> None:
    space = LabelSpace.of_union([PETS, SIGNS])
    assert space.kind == "union"
    assert [label for label in space.labels if label.name == "cat"] == [Label("pets", "cat"), Label("signs", "cat")]
    assert space.blocks == (
        Block("pets", 0, 2, (("a pet cat.",), ("a pet dog.",))),
        Block("signs", 2, 4, (("the sign stop.", "a sign: stop."), ("the sign cat.", "a sign: cat."))),
    )


def test_candidates_are_any_words() -> None:
    space = LabelSpace.of_candidates([" red fox", "owl"])
    assert space.kind == "candidates"
    assert space.labels == (Label(None, "red fox"), Label(None, "owl"))
    assert [len(texts) for texts in space.prompts] == [len(DEFAULT_TEMPLATES)] * 2
    assert space.prompts[0][0] == "a photo of a red fox."
    assert [(block.task, block.start, block.stop) for block in space.blocks] == [(None, 0, 2)]
    assert LabelSpace.of_candidates(["owl"], ["an {c}"]).prompts == (("an owl",),)


def test_words_that_are_all_learned_are_classes_each_by_its_own_templates() -> None:
    space = LabelSpace.of_candidates(["DOG", "stop"]).as_learned([PETS, SIGNS])
    assert space.learned == (("pets", 1), ("signs", 0))
    assert space.labels == (Label(None, "DOG"), Label(None, "stop"))
    assert space.prompts == (("a pet dog.",), ("the sign stop.", "a sign: stop."))
    assert space.blocks == (Block(None, 0, 2, space.prompts, space.learned),)


@pytest.mark.parametrize("cards", [[PETS, SIGNS], [SIGNS, PETS]])
def test_of_tasks_that_share_a_word_one_that_has_all_words_comes_first_then_the_newest(cards: list[Card]) -> None:
    def found(*words: str) -> tuple[tuple[str, int], ...]:
        return LabelSpace.of_candidates(words).as_learned(cards).learned

    newest = {"pets": ("pets", 0), "signs": ("signs", 1)}[cards[-1].name]
    assert found("cat", "dog") == (("pets", 0), ("pets", 1))
    assert found("cat", "stop") == (("signs", 1), ("signs", 0))
    assert found("cat") == (newest,)
    assert found("dog", "cat", "stop") == (("pets", 1), newest, ("signs", 0))


def test_the_same_word_may_be_written_in_several_ways() -> None:
    card = Card("roads", ("give_way", "caf\u00e9", "stop"), ("a {c}.",))
    words = ["STOP", "cafe\u0301", "Give  Way"]
    assert LabelSpace.of_candidates(words).as_learned([card]).learned == (("roads", 2), ("roads", 1), ("roads", 0))


def test_one_word_that_was_not_learned_leaves_all_of_them_words() -> None:
    space = LabelSpace.of_candidates(["cat", "owl"])
    assert space.as_learned([PETS, SIGNS]) is space


def test_each_task_has_its_part_of_words_that_are_all_learned() -> None:
    parts = LabelSpace.of_candidates(["Cat", "stop", "dog"]).by_task([PETS, SIGNS])
    found = {task: (part.labels.tolist(), part.classes.tolist()) for task, part in parts.items()}
    assert found == {"pets": ([0, 2], [0, 1]), "signs": ([0, 1], [1, 0])}
    assert list(LabelSpace.of_candidates(["stop"]).by_task([PETS, SIGNS])) == ["signs"]
    assert LabelSpace.of_candidates(["stop", "owl"]).by_task([PETS, SIGNS]) == {}
    assert LabelSpace.of_candidates(["stop"]).by_task([]) == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "0 labels given: give 1 to 10,000"),
        (["a", " "], "label 2 of 2 is empty"),
        (["a", "_ "], "label 2 of 2 is empty"),
        (["a", "b", "a "], "label 'a' is given 2 times: give each label once"),
        (["b", "Give way", "give_way"], "labels 'Give way' and 'give_way' cannot be told apart: give each label once"),
        (["caf\u00e9", "cafe\u0301"], "labels 'caf\u00e9' and 'cafe\u0301' cannot be told apart"),
        ([str(i) for i in range(10_001)], "10001 labels given"),
        ("cat,dog", "labels are one text \\('cat,dog'\\): give a list of labels"),
    ],
)
def test_labels_that_cannot_be_answered_are_refused(names: Sequence[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LabelSpace.of_candidates(names)
