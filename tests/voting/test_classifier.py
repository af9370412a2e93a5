from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from condu_ray.config import VoteConfig
from condu_ray.errors import DataError, NotFound
from condu_ray.methods.registry import vote_of
from condu_ray.models.clip import Clip, Features, Overrides, class_embeddings
from condu_ray.voting.answer import Answer, Vote
from condu_ray.voting.classifier import Classifier, TaskExpert
from condu_ray.voting.combine import combine, probabilities, weights
from condu_ray.voting.domains import Calibration, make_domain
from condu_ray.voting.labels import Label, LabelSpace
from condu_ray.voting.router import Calibrated, DomainRouter, calibrated
from condu_ray.voting.routing import Thresholds, similarities
from condu_ray.voting.voters import ExpertCache

CLASSES = {"pets": ("cat", "dog"), "signs": ("stop", "cat", "give way"), "fruit": ("apple", "pear")}
Make = Callable[..., Classifier]
WORDS = ["red", "green", "blue"]
# Half of the pictures have a second expert within this gap of the first; some leave θ⁰ out.
SOME = Calibrated(Thresholds(gap=0.02, known=0.6, unseen=-1.0))


def expert_logits(clip: Clip, pixels: Tensor, space: LabelSpace, overrides: Overrides | None) -> np.ndarray:
    table = class_embeddings(clip, space.prompts, overrides)
    return (clip.logit_scale * clip.images(pixels, overrides) @ table.T).numpy()


def shares(answer: Answer, space: LabelSpace) -> np.ndarray:
    by_label = dict(answer.ranked)
    return np.array([by_label[label] for label in space.labels])


def test_a_named_task_is_answered_by_its_own_expert(
    make: Make, pixels: Tensor, tiny_clip: Clip, overrides: dict[str, Overrides]
) -> None:
    classifier = make()
    for task, classes in CLASSES.items():
        space = classifier.label_space(task)
        logits = expert_logits(tiny_clip, pixels, space, overrides[task])
        answers = classifier.classify(pixels, task=task)
        assert [answer.label.name for answer in answers] == [classes[i] for i in logits.argmax(axis=1)]
        for answer, row in zip(answers, logits, strict=True):
            np.testing.assert_allclose(shares(answer, space), probabilities(row), atol=1e-5)
            assert [(vote.task, vote.similarity, vote.weight) for vote in answer.votes] == [(task, None, 1.0)]
            assert (answer.label_space, answer.version, answer.label.task) == ("task", 7, task)
            assert answer.ranked[0] == (answer.label, answer.probability)


def test_a_task_without_an_expert_is_answered_by_the_base_model(make: Make, pixels: Tensor, tiny_clip: Clip) -> None:
    classifier = make(expert_of=lambda task: None)
    space = classifier.label_space("signs")
    logits = expert_logits(tiny_clip, pixels, space, None)
    for answer, row in zip(classifier.classify(pixels, task="signs"), logits, strict=True):
        np.testing.assert_allclose(shares(answer, space), probabilities(row), atol=1e-5)
    everyone = classifier.classify(pixels, labels=WORDS)
    words = expert_logits(tiny_clip, pixels, LabelSpace.of_candidates(WORDS), None)
    for answer, row in zip(everyone, words, strict=True):
        assert len(answer.votes) == 4
        np.testing.assert_allclose(shares(answer, LabelSpace.of_candidates(WORDS)), probabilities(row), atol=1e-5)


@pytest.mark.parametrize(
    "vote",
    [
        {"combine": "mean_logits", "adaptive": False, "k": 2},
        {"adaptive": False, "k": 2},
        {"average": "probabilities", "adaptive": False, "temperature": 0.001},
        {"base_weight": 0.5, "k": 3},
    ],
)
def test_candidates_are_voted_on_as_the_formulas_say(
    make: Make,
    pixels: Tensor,
    tiny_clip: Clip,
    experts: tuple[TaskExpert, ...],
    overrides: dict[str, Overrides],
    vote: dict[str, object],
) -> None:
    space = LabelSpace.of_candidates(WORDS)
    near = similarities(tiny_clip.images(pixels).numpy(), [expert.prototypes for expert in experts])
    logits = {task: expert_logits(tiny_clip, pixels, space, overrides[task]) for task in CLASSES}
    base = expert_logits(tiny_clip, pixels, space, None)
    config = VoteConfig.model_validate(vote)
    for i, answer in enumerate(make(**vote).classify(pixels, labels=WORDS)):
        order = np.argsort(-near[i], kind="stable")[: config.k]
        expert_weights, base_weight = weights(near[i][order], True, config)
        names = [experts[task].name for task in order]
        rows = np.stack([*(logits[name][i] for name in names), base[i]])
        expected = probabilities(combine(rows, np.append(expert_weights, base_weight), config))
        np.testing.assert_allclose(shares(answer, space), expected, atol=1e-5)
        assert [vote.task for vote in answer.votes] == [*names, None]
        np.testing.assert_allclose([v.weight for v in answer.votes], [*expert_weights, base_weight], atol=1e-4)
        np.testing.assert_allclose([v.similarity for v in answer.votes[:-1]], near[i][order], atol=1e-6)
        assert answer.votes[-1].similarity is None
        assert answer.label.task is None and answer.label_space == "candidates"


def test_routed_counts_only_the_labels_of_the_chosen_tasks(make: Make, pixels: Tensor) -> None:
    answers = make(calibrated=SOME, union="routed").classify(pixels)
    assert {len([vote for vote in answer.votes if vote.task]) for answer in answers} > {1}
    assert {answer.votes[-1].task is None for answer in answers} == {True, False}
    for answer in answers:
        chosen = {vote.task for vote in answer.votes} - {None}
        assert answer.label.task in chosen
        assert all(probability == 0 for label, probability in answer.ranked if label.task not in chosen)
        assert all(probability > 0 for label, probability in answer.ranked if label.task in chosen)
        assert sum(probability for _, probability in answer.ranked) == pytest.approx(1)
        assert len(answer.ranked) == 7 and answer.label_space == "union"


def test_joint_lets_every_chosen_expert_score_all_labels(
    make: Make, pixels: Tensor, tiny_clip: Clip, overrides: dict[str, Overrides]
) -> None:
    classifier = make(union="joint", k=1, adaptive=False, base_weight=0.0)
    space = classifier.label_space()
    logits = {task: expert_logits(tiny_clip, pixels, space, overrides[task]) for task in CLASSES}
    for i, answer in enumerate(classifier.classify(pixels)):
        nearest_task = answer.votes[0].task
        assert nearest_task is not None
        expected = probabilities(logits[nearest_task][i])  # one expert at full weight answers as if alone
        np.testing.assert_allclose(shares(answer, space), expected, atol=1e-5)
        assert [vote.weight for vote in answer.votes] == [1.0]


@pytest.mark.parametrize("union", ["joint", "routed"])
@given(seed=st.integers(0, 1000), count=st.integers(1, 9), k=st.integers(1, 4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_batch_answers_like_one_picture_at_a_time(
    make: Make, coloured: Callable[[int, int], Tensor], union: str, seed: int, count: int, k: int
) -> None:
    classifier = make(calibrated=SOME, union=union, k=k)
    space = classifier.label_space()
    pixels = coloured(count, seed)
    for picture, together in zip(pixels, classifier.classify(pixels), strict=True):
        (alone,) = classifier.classify(picture[None])
        assert [vote.task for vote in together.votes] == [vote.task for vote in alone.votes]
        np.testing.assert_allclose(shares(together, space), shares(alone, space), atol=1e-5)


def test_permuting_the_tasks_permutes_the_votes(make: Make, pixels: Tensor, experts: tuple[TaskExpert, ...]) -> None:
    before = make(calibrated=SOME).classify(pixels)
    after = make(calibrated=SOME, experts=experts[::-1]).classify(pixels)
    assert [answer.votes for answer in after] == [answer.votes for answer in before]
    assert [answer.label for answer in after] == [answer.label for answer in before]


def test_only_the_chosen_experts_run_and_each_once_a_batch(
    make: Make, pixels: Tensor, overrides: dict[str, Overrides], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    runs: list[tuple[int, bool]] = []
    images, features = Clip.images, Clip.features

    def expert_of(task: str) -> Overrides:
        loaded.append(task)
        return overrides[task]

    def counted(self: Clip, pixels: Tensor, expert: Overrides | None = None) -> Tensor:
        runs.append((len(pixels), expert is None))
        return images(self, pixels, expert)

    def seen(self: Clip, pixels: Tensor) -> Features:
        runs.append((len(pixels), True))
        return features(self, pixels)

    monkeypatch.setattr(Clip, "images", counted)
    monkeypatch.setattr(Clip, "features", seen)
    classifier = make(expert_of=expert_of, k=1, adaptive=False)
    answers = classifier.classify(pixels[:4])
    chosen = Counter(str(answer.votes[0].task) for answer in answers)
    assert 1 <= len(chosen) < 3, "the pictures should leave one expert out"
    assert Counter(loaded) == Counter(list(chosen))
    assert runs == [(4, True), *((count, False) for count in chosen.values())]
    classifier.classify(pixels[:4])
    assert len(loaded) == len(chosen), "an expert in the cache was loaded again"

    runs.clear()
    loaded.clear()
    make(expert_of=expert_of).classify(pixels, task="fruit")
    assert (loaded, runs) == (["fruit"], [(12, False)])


def test_the_cache_keeps_the_experts_used_last(make: Make, pixels: Tensor, overrides: dict[str, Overrides]) -> None:
    loaded: list[str] = []

    def expert_of(task: str) -> Overrides:
        loaded.append(task)
        return overrides[task]

    classifier = make(expert_of=expert_of, cache=2)
    for task in ("pets", "signs", "pets", "fruit", "pets", "signs"):
        classifier.classify(pixels[:1], task=task)
    assert loaded == ["pets", "signs", "fruit", "signs"]


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 20])
def test_a_cache_keeps_as_many_experts_as_it_may(limit: int, overrides: dict[str, Overrides]) -> None:
    built: list[str] = []

    def expert_of(task: str) -> Overrides:
        built.append(task)
        return overrides["pets"]

    cache = ExpertCache(expert_of, limit)
    tasks = [f"task-{number}" for number in range(8)]
    for task in [*tasks, *reversed(tasks)]:
        cache(task)
    assert len(built) == 8 + max(0, 8 - limit)
    assert (cache.misses, cache.hits) == (len(built), 16 - len(built))


def test_a_cache_that_is_emptied_makes_experts_anew_and_disturbs_nobody(overrides: dict[str, Overrides]) -> None:
    def expert_of(task: str) -> Overrides:
        if task == "slow":
            cache.empty()  # as another thread may, while this one is made
        built.append(task)
        return overrides["pets"]

    built: list[str] = []
    cache = ExpertCache(expert_of, 2)
    assert cache("slow") is overrides["pets"]
    for _ in range(2):
        cache("pets")
    cache.empty()
    cache("pets")
    assert built == ["slow", "pets", "pets"]


def test_class_names_are_embedded_once_an_expert(make: Make, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[int] = []
    texts = Clip.texts

    def counted(self: Clip, sentences: list[str], expert: Overrides | None = None) -> Tensor:
        embedded.append(len(sentences))
        return texts(self, sentences, expert)

    monkeypatch.setattr(Clip, "texts", counted)
    classifier = make(adaptive=False, union="joint")
    classifier.classify(pixels)
    assert len(embedded) == 4 * 3, "four voters, three tasks' labels"
    classifier.classify(pixels, task="pets")
    classifier.classify(pixels)
    assert len(embedded) == 4 * 3
    classifier.classify(pixels, labels=WORDS)
    classifier.classify(pixels, labels=WORDS)
    assert len(embedded) == 4 * 3 + 4


def test_the_fast_path_gives_the_same_labels(make: Make, pixels: Tensor, experts: tuple[TaskExpert, ...]) -> None:
    classifier = make(calibrated=SOME)
    for arguments in ({}, {"task": "signs"}, {"labels": WORDS}):
        space = classifier.label_space(**arguments)  # type: ignore[arg-type]
        indices = classifier.label_indices(pixels, space)
        assert indices.dtype == np.int64
        answers = classifier.classify(pixels, **arguments)  # type: ignore[arg-type]
        assert [space.labels[i] for i in indices] == [answer.label for answer in answers]
    own = LabelSpace.of_candidates(CLASSES["fruit"], experts[2].templates)
    assert set(classifier.label_indices(pixels, own)) <= {0, 1}


def test_the_same_input_gives_the_same_answer(make: Make, pixels: Tensor) -> None:
    assert make(calibrated=SOME).classify(pixels) == make(calibrated=SOME).classify(pixels)


def test_no_picture_no_answer(make: Make, pixels: Tensor) -> None:
    assert make().classify(pixels[:0]) == []
    assert make().label_indices(pixels[:0], LabelSpace.of_candidates(WORDS)).tolist() == []


def test_learned_classes_compete_by_task_weight_times_class_probability(
    make: Make, pixels: Tensor, experts: tuple[TaskExpert, ...]
) -> None:
    """The default: each chosen expert scores its own task's classes, the base model none."""
    classifier = make(adaptive=False, k=2)
    for index, answer in enumerate(classifier.classify(pixels)):
        assert len(answer.votes) == 2
        assert sum(vote.weight for vote in answer.votes) == pytest.approx(1)
        expected = {}
        for vote in answer.votes:
            (alone,) = classifier.classify(pixels[index : index + 1], task=vote.task)
            expected |= {label: vote.weight * share for label, share in alone.ranked}
        for label, share in answer.ranked:
            assert share == pytest.approx(expected.get(label, 0.0), abs=1e-5)


def test_one_task_alone(make: Make, pixels: Tensor, experts: tuple[TaskExpert, ...]) -> None:
    (answer,) = make(experts=experts[:1]).classify(pixels[:1])
    assert [vote.task for vote in answer.votes] == ["pets"], "all labels are learned: the base model has no part"
    assert {label.task for label, _ in answer.ranked} == {"pets"}


def test_before_the_first_task_the_base_model_answers_alone(make: Make, pixels: Tensor, tiny_clip: Clip) -> None:
    classifier = make(experts=())
    space = LabelSpace.of_candidates(WORDS)
    logits = expert_logits(tiny_clip, pixels, space, None)
    for answer, row in zip(classifier.classify(pixels, labels=WORDS), logits, strict=True):
        np.testing.assert_allclose(shares(answer, space), probabilities(row), atol=1e-5)
        assert [(vote.task, vote.weight) for vote in answer.votes] == [(None, 1.0)]
    with pytest.raises(NotFound, match="version 7 has learned no task: give labels"):
        classifier.classify(pixels)


def test_mistakes_are_named(make: Make, pixels: Tensor, experts: tuple[TaskExpert, ...]) -> None:
    classifier = make(experts=experts[:2])
    with pytest.raises(NotFound, match=r"task pet is not in version 7: did you mean pets\?"):
        classifier.classify(pixels, task="pet")
    with pytest.raises(NotFound, match="task fruit is not in version 7: known: pets, signs"):
        classifier.label_indices(pixels, LabelSpace.of_task(experts[2]))
    with pytest.raises(DataError, match="task pets and labels are both given"):
        classifier.classify(pixels, task="pets", labels=["a"])


def test_the_published_json(make: Make, pixels: Tensor) -> None:
    (answer,) = make(adaptive=False, k=2, union="joint").classify(pixels[:1])
    published = json.loads(json.dumps(answer.to_json("a.png", top=2)))
    keys = ["image", "label", "task", "probability", "labels", "votes", "label_space", "strangeness", "version"]
    assert list(published) == keys
    assert published["strangeness"] is None, "the router here is that of prototypes"
    assert published["image"] == "a.png"
    assert (published["label"], published["task"]) == (answer.label.name, answer.label.task)
    assert published["probability"] == round(answer.probability, 6)
    assert len(published["labels"]) == 2
    assert published["labels"][0] == {
        "label": answer.label.name,
        "task": answer.label.task,
        "probability": round(answer.probability, 6),
    }
    assert [list(vote) for vote in published["votes"]] == [["task", "similarity", "weight"]] * 3
    assert published["votes"][-1] == {"task": None, "similarity": None, "weight": round(1 / 3, 6)}
    assert (published["label_space"], published["version"]) == ("union", 7)


def test_answering_leaves_the_base_model_as_it_was(make: Make, pixels: Tensor, tiny_clip: Clip) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_clip.model.state_dict().items()}
    make().classify(pixels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_clip.model.state_dict().items())


def test_a_name_in_two_tasks_gives_both_labels(make: Make, pixels: Tensor) -> None:
    (answer,) = make(adaptive=False).classify(pixels[:1])
    assert {label for label, _ in answer.ranked if label.name == "cat"} == {Label("pets", "cat"), Label("signs", "cat")}


@dataclass(frozen=True)
class Speaking:
    """Experts with domains, their calibration, and what the router says of each one's classes for `pixels`."""

    experts: tuple[TaskExpert, ...]
    calibrated: Calibrated
    told: list[np.ndarray]


@pytest.fixture
def speaking(
    pixels: Tensor, coloured: Callable[[int, int], Tensor], tiny_clip: Clip, experts: tuple[TaskExpert, ...]
) -> Speaking:
    known = []
    for seed, expert in enumerate(experts):
        seen = tiny_clip.features(coloured(8 * len(expert.classes), seed)).domains.numpy()
        labels = np.arange(len(seen)) // 8
        known.append(replace(expert, domain=make_domain(seen, labels, len(expert.classes), seen[::3], labels[::3])))
    found = calibrated(known, VoteConfig())
    assert found.domains and found.domains.within
    domains = tiny_clip.features(pixels).domains.numpy()
    router = DomainRouter([each.domain for each in known if each.domain], VoteConfig(), found.domains)
    return Speaking(tuple(known), found, router.evidence(domains))


@pytest.mark.parametrize("within", ["both", "expert"])
def test_in_the_union_the_router_speaks_of_classes_beside_the_expert(
    make: Make,
    pixels: Tensor,
    tiny_clip: Clip,
    speaking: Speaking,
    overrides: dict[str, Overrides],
    within: str,
) -> None:
    made = {"experts": speaking.experts, "calibrated": speaking.calibrated}
    classifier = make(**made, adaptive=False, k=2, within=within)
    changed = 0
    for row, answer in enumerate(classifier.classify(pixels)):
        for vote in answer.votes:
            place = list(CLASSES).index(str(vote.task))
            own = classifier.label_space(vote.task)
            logits = expert_logits(tiny_clip, pixels[row : row + 1], own, overrides[str(vote.task)])[0]
            evidence = speaking.told[place][row] if within == "both" else 0.0
            np.testing.assert_allclose(shares(answer, own), vote.weight * probabilities(logits + evidence), atol=1e-5)
            changed += probabilities(logits + speaking.told[place][row]).argmax() != logits.argmax()
    assert changed, "the test says nothing where the expert is right anyway"


@pytest.mark.parametrize("within", ["both", "expert"])
def test_where_the_task_is_named_the_router_speaks_of_its_classes_too(
    make: Make, pixels: Tensor, tiny_clip: Clip, speaking: Speaking, overrides: dict[str, Overrides], within: str
) -> None:
    classifier = make(experts=speaking.experts, calibrated=speaking.calibrated, within=within)
    for place, task in enumerate(CLASSES):
        space = classifier.label_space(task)
        logits = expert_logits(tiny_clip, pixels, space, overrides[task])
        told = speaking.told[place] if within == "both" else np.zeros_like(logits)
        for row, answer in enumerate(classifier.classify(pixels, task=task)):
            assert answer.votes == (Vote(task, None, 1.0),)
            np.testing.assert_allclose(shares(answer, space), probabilities(logits[row] + told[row]), atol=1e-5)
        alone = [answer.ranked for answer in classifier.by_experts().classify(pixels, task=task)]
        as_ever = make(experts=speaking.experts, calibrated=speaking.calibrated, within="expert")
        assert alone == [answer.ranked for answer in as_ever.classify(pixels, task=task)]


def test_labels_that_all_are_classes_of_a_task_let_the_router_speak_for_its_expert(
    make: Make, pixels: Tensor, tiny_clip: Clip, speaking: Speaking, overrides: dict[str, Overrides]
) -> None:
    made = {"experts": speaking.experts, "calibrated": speaking.calibrated}
    classifier = make(**made, adaptive=False, k=2, average="probabilities", base_weight=0.25)
    task = max(CLASSES, key=lambda name: len(CLASSES[name]))
    backwards = [name.upper() for name in reversed(CLASSES[task])]
    space = classifier.label_space(labels=backwards)
    for row, answer in enumerate(classifier.classify(pixels, labels=backwards)):
        mixed = np.zeros(len(backwards))
        for vote in answer.votes:
            logits = expert_logits(tiny_clip, pixels[row : row + 1], space, overrides.get(str(vote.task)))[0]
            if vote.task == task:
                logits = logits + speaking.told[list(CLASSES).index(task)][row][::-1]
            mixed += vote.weight * probabilities(logits)
        np.testing.assert_allclose(shares(answer, space), mixed, atol=1e-5)
    with_another = [*CLASSES[task], "something else"]
    expected = [answer.ranked for answer in make(**made, within="expert").classify(pixels, labels=with_another)]
    assert [answer.ranked for answer in make(**made).classify(pixels, labels=with_another)] == expected


@pytest.mark.parametrize("within", ["both", "expert"])
def test_of_learned_words_of_several_tasks_each_expert_scores_its_own(
    make: Make, pixels: Tensor, tiny_clip: Clip, speaking: Speaking, overrides: dict[str, Overrides], within: str
) -> None:
    """The union of those words: no expert says anything of another task's classes; θ⁰ speaks of all, by its share."""
    made = {"experts": speaking.experts, "calibrated": speaking.calibrated, "within": within}
    classifier = make(**made, adaptive=False, k=3, base_weight=0.25)
    words = ["pear", "give way", "CAT", "stop"]
    own = {"pets": ([2], [0]), "signs": ([1, 2, 3], [2, 1, 0]), "fruit": ([0], [1])}
    space = LabelSpace.of_candidates(words)
    base = expert_logits(tiny_clip, pixels, space, None)
    for row, answer in enumerate(classifier.classify(pixels, labels=words)):
        assert {vote.task for vote in answer.votes} == {*CLASSES, None}
        expected = answer.votes[-1].weight * probabilities(base[row])
        for vote in answer.votes[:-1]:
            columns, classes = own[str(vote.task)]
            one = classifier.label_space(vote.task)
            logits = expert_logits(tiny_clip, pixels[row : row + 1], one, overrides[str(vote.task)])[0]
            if within == "both":
                logits = logits + speaking.told[list(CLASSES).index(str(vote.task))][row]
            expected[columns] += vote.weight * probabilities(logits[classes])
        np.testing.assert_allclose(shares(answer, space), expected, atol=1e-5)
        assert (answer.label_space, answer.label.task) == ("candidates", None)


def test_experts_of_tasks_that_have_none_of_the_words_are_not_asked(
    make: Make, pixels: Tensor, tiny_clip: Clip
) -> None:
    words = ["apple", "dog"]
    space = LabelSpace.of_candidates(words)
    base = expert_logits(tiny_clip, pixels, space, None)
    only_base = 0
    for row, answer in enumerate(make(adaptive=False, k=1, base_weight=0.0).classify(pixels, labels=words)):
        asked = {vote.task for vote in answer.votes}
        assert asked <= {"pets", "fruit", None} and sum(vote.weight for vote in answer.votes) == pytest.approx(1)
        if asked == {None}:  # the nearest task has none of them
            only_base += 1
            np.testing.assert_allclose(shares(answer, space), probabilities(base[row]), atol=1e-5)
    assert 0 < only_base < len(pixels)


def test_where_no_expert_that_has_a_say_has_any_of_the_words_the_base_model_answers(
    make: Make, pixels: Tensor, tiny_clip: Clip, speaking: Speaking
) -> None:
    """Experts that are asked although the router is sure of another: their weights are exactly 0."""
    sure = Calibrated(domains=Calibration(1e-6, 0.0, 1.0))
    words = ["apple", "dog"]
    space = LabelSpace.of_candidates(words)
    base = expert_logits(tiny_clip, pixels, space, None)
    classifier = make(experts=speaking.experts, calibrated=sure, adaptive=False, base_weight=0.0)
    only_base = 0
    for row, answer in enumerate(classifier.classify(pixels, labels=words)):
        assert sum(vote.weight for vote in answer.votes) == pytest.approx(1)
        if answer.votes == (Vote(None, None, 1.0),):
            only_base += 1
            np.testing.assert_allclose(shares(answer, space), probabilities(base[row]), atol=1e-5)
    assert 0 < only_base < len(pixels)


def test_asking_for_fewer_experts_makes_no_router_anew(
    make: Make, pixels: Tensor, speaking: Speaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"experts": speaking.experts, "calibrated": speaking.calibrated, "adaptive": False}
    classifier = make(**made)
    expected = make(**made, k=1).classify(pixels)
    assert classifier.asking(k=1).classify(pixels) == expected
    monkeypatch.setattr("condu_ray.voting.classifier.router_of", None)
    assert classifier.asking(k=1).classify(pixels) == expected
    assert {len(answer.votes) for answer in classifier.asking(k=2).classify(pixels)} == {2}


def test_one_model_that_answers_alone_is_not_asked_several_times(
    tiny_clip: Clip, experts: tuple[TaskExpert, ...], overrides: dict[str, Overrides], pixels: Tensor
) -> None:
    vote = vote_of("sequential", VoteConfig())
    one = Classifier(tiny_clip, experts, lambda task: overrides["pets"], vote, Calibrated(), 7, single=True)
    assert [answer.votes for answer in one.asking(k=3).classify(pixels)] == [
        answer.votes for answer in one.classify(pixels)
    ]


def test_the_published_union_scores_words_of_several_tasks_by_every_voter(make: Make, pixels: Tensor) -> None:
    words = ["apple", "dog", "stop"]
    (answer,) = make(union="joint", adaptive=False, k=1, base_weight=0.0).classify(pixels[:1], labels=words)
    assert all(share > 0 for _, share in answer.ranked)
