"""Who answers: by domains where every task has one, by prototypes else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from condu_ray.config import VoteConfig
from condu_ray.voting.domains import Calibration, Domain, make_domain
from condu_ray.voting.prototypes import FeatureSums, Prototypes, make_prototypes
from condu_ray.voting.router import Calibrated, CosineRouter, DomainRouter, calibrated, prior_of, router_of
from condu_ray.voting.routing import Thresholds


@dataclass(frozen=True)
class Task:
    prototypes: Prototypes
    domain: Domain | None


def features(place: float, count: int = 60, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(count, 4)) + place * np.array([1, -1, 0, 0])).astype(np.float32)


def task(place: float, kept: bool = True, held_out: int = 20) -> Task:
    """The prototype of every task is the same, so that only domains can tell."""
    sums = FeatureSums.zero(1, 2)
    seen = np.tile(np.array([[1, 0]], np.float32), (min(4, held_out), 1))
    prototypes = make_prototypes(sums, np.array([[1, 0]], np.float32), seen)
    labels = np.zeros(60, np.int64)
    made = make_domain(features(place), labels, 1, features(place, held_out, 1), labels[:held_out]) if kept else None
    return Task(prototypes, made)


TASKS = [task(0.0), task(6.0), task(12.0)]
UNIT = np.array([[1, 0]], np.float32)


def route(vote: VoteConfig, place: float):  # type: ignore[no-untyped-def]
    router = router_of(TASKS, vote, calibrated(TASKS, vote))
    (one,) = router.route(UNIT, np.array([[place, -place, 0, 0]], np.float32))
    return one


@pytest.mark.parametrize(("number", "place"), list(enumerate((0.0, 6.0, 12.0))))
def test_the_domain_decides(number: int, place: float) -> None:
    one = route(VoteConfig(), place)
    assert one.experts == (number,)  # the others would not make it likelier that the right one is asked
    assert one.base < 0.5 and one.shares.sum() == pytest.approx(1)


def test_a_strange_picture_is_answered_by_the_base_model_alone() -> None:
    one = route(VoteConfig(), -30.0)
    assert one.base == 1.0
    assert one.experts  # `own` still needs to know whose classes come first


def test_between_two_domains_both_answer() -> None:
    one = route(VoteConfig(), 3.0)
    assert set(one.experts) == {0, 1}


def test_not_adaptive_is_always_k_experts() -> None:
    for place in (0.0, 6.0, -30.0):
        assert len(route(VoteConfig(adaptive=False, k=2), place).experts) == 2


def test_how_strange_a_picture_is_is_said_whoever_votes() -> None:
    for vote in (VoteConfig(), VoteConfig(base_weight=0.3), VoteConfig(combine="mean_logits")):
        near, far = (route(vote, place).strange for place in (6.0, -30.0))
        assert near is not None and far is not None
        assert near < 0.5 < far


def test_a_fixed_share_of_the_base_model_is_taken_as_given() -> None:
    for place in (6.0, -30.0):
        assert route(VoteConfig(base_weight=0.3), place).base == 0.3


def test_experts_are_taken_until_one_of_them_is_right_as_surely_as_is_asked() -> None:
    assert len(route(VoteConfig(coverage=0.3), 3.0).experts) == 1
    assert len(route(VoteConfig(coverage=0.9999999), 3.0).experts) > 1


def prototyped(image: list[float], text: list[float]) -> Task:
    """One class, whose pictures look like `image` and whose name like `text`."""
    pictures = np.array([image] * 10, np.float32)
    sums = FeatureSums.zero(1, 2).add(pictures, np.zeros(10, np.int64))
    return Task(make_prototypes(sums, np.array([text], np.float32), pictures), None)


def test_a_drop_that_is_set_stands_for_the_calibrated_one() -> None:
    tasks = [prototyped([1, 0], [1, 0]), prototyped([0.8, 0.6], [0.8, 0.6])]
    for gap, count in ((0.1, 1), (0.3, 2)):
        vote = VoteConfig(router="cosine", gap=gap)
        (one,) = router_of(tasks, vote, calibrated(tasks, vote)).route(UNIT, UNIT)
        assert len(one.experts) == count


def test_prototypes_may_be_of_pictures_or_of_names_alone() -> None:
    tasks = [prototyped([1, 0], [0, 1]), prototyped([0, 1], [1, 0])]
    for prototypes, nearest in (("image", 0), ("text", 1)):
        vote = VoteConfig.model_validate({"router": "cosine", "prototypes": prototypes})
        near, _ = router_of(tasks, vote, calibrated(tasks, vote)).ranked(UNIT, UNIT)
        assert near.argmax() == nearest and near[0, nearest] == pytest.approx(1)
    both, _ = router_of(tasks, VoteConfig(router="cosine"), calibrated(tasks, VoteConfig())).ranked(UNIT, UNIT)
    assert both[0].tolist() == pytest.approx([0.5**0.5] * 2)


def test_the_published_mean_weighs_all_alike() -> None:
    one = route(VoteConfig(combine="mean_logits", adaptive=False, k=3), 6.0)
    assert one.base == pytest.approx(1 / 4) and one.shares.tolist() == pytest.approx([1 / 3] * 3)


def test_prototypes_decide_where_a_task_has_no_domain_or_the_vote_says_so() -> None:
    limits = calibrated(TASKS, VoteConfig())
    assert isinstance(router_of(TASKS, VoteConfig(), limits), DomainRouter)
    assert isinstance(router_of(TASKS, VoteConfig(router="cosine"), limits), CosineRouter)
    older = [*TASKS, task(3.0, kept=False)]
    assert calibrated(older, VoteConfig()).domains is None
    assert isinstance(router_of(older, VoteConfig(), calibrated(older, VoteConfig())), CosineRouter)
    assert isinstance(router_of([], VoteConfig(), calibrated([], VoteConfig())), CosineRouter)


@pytest.mark.parametrize("k", [1, 2])
def test_where_nothing_was_held_out_k_experts_and_the_base_model_always_vote(k: int) -> None:
    tasks = [task(place, held_out=0) for place in (0.0, 6.0, 12.0)]
    found = calibrated(tasks, VoteConfig(k=k))
    assert found.domains is None
    for place in (0.0, -30.0):
        router = router_of(tasks, VoteConfig(k=k), Calibrated.from_state(found.to_state()))
        (one,) = router.route(UNIT, np.array([[place, -place, 0, 0]], np.float32))
        assert len(one.experts) == k and 0 < one.base < 1


@pytest.mark.parametrize("router", ["lda", "cosine"])
def test_asking_for_fewer_experts_shares_what_was_computed(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vote = VoteConfig.model_validate({"router": router, "adaptive": False})
    limits = calibrated(TASKS, vote)
    whole = router_of(TASKS, vote, limits)
    expected = router_of(TASKS, vote.model_copy(update={"k": 1}), limits)
    monkeypatch.setattr("condu_ray.voting.router.Discriminant", None)
    place = np.array([[3.0, -3.0, 0, 0]], np.float32)
    assert [one.experts for one in whole.asking(1).route(UNIT, place)] == [
        one.experts for one in expected.route(UNIT, place)
    ]
    assert len(whole.route(UNIT, place)[0].experts) == 3


def test_without_tasks_the_base_model_answers() -> None:
    (one,) = router_of([], VoteConfig(), Calibrated()).route(UNIT, np.zeros((1, 4), np.float32))
    assert one.experts == () and one.base == 1.0


def test_what_is_calibrated_comes_back_from_a_manifest() -> None:
    limits = Calibrated(Thresholds(0.1, 0.5, 0.2), Calibration(10.0, -3.0, 0.5))
    assert Calibrated.from_state(limits.to_state()) == limits
    assert Calibrated.from_state({"thresholds": None}) == Calibrated()
    assert Calibrated.from_state(Calibrated().to_state()) == Calibrated()


CLASSES = [("cat", "dog"), ("stop", "Cat", "give way"), ("apple", "pear")]


def test_labels_speak_for_the_tasks_that_learned_them() -> None:
    all_of_one = prior_of(["Apple", "pear"], CLASSES)
    assert all_of_one.none == pytest.approx(0.05)
    assert int(all_of_one.tasks.argmax()) == 2 and all_of_one.tasks[2] > 0.9
    shared = prior_of(["cat", "wolf"], CLASSES)
    assert shared.none == pytest.approx(0.5)
    assert shared.tasks[0] == shared.tasks[1] > shared.tasks[2] > 0
    assert prior_of(["GIVE_WAY"], CLASSES).tasks.argmax() == 1
    foreign = prior_of(["lighthouse", "bridge"], CLASSES)
    assert foreign.none == pytest.approx(0.95) and foreign.tasks.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("labels", [["cat"], ["lighthouse"], ["cat", "apple", "stop", "ship"]])
def test_what_labels_say_are_probabilities_that_leave_nothing_out(labels: list[str]) -> None:
    prior = prior_of(labels, CLASSES)
    assert prior.tasks.sum() == pytest.approx(1) and (prior.tasks > 0).all() and 0 < prior.none < 1


def test_a_picture_between_two_domains_goes_where_its_labels_are_known() -> None:
    router = router_of(TASKS, VoteConfig(), calibrated(TASKS, VoteConfig()))
    between = np.array([[3.0, -3.0, 0, 0]], np.float32)
    for number, names in enumerate(CLASSES[:2]):
        (one,) = router.route(UNIT, between, prior_of(names[1:], CLASSES))
        assert one.experts[0] == number


def test_labels_that_nothing_has_learned_bring_the_base_model_in() -> None:
    router = router_of(TASKS, VoteConfig(), calibrated(TASKS, VoteConfig()))
    edge = np.array([[-2.0, 2.0, 0, 0]], np.float32)
    shares = [router.route(UNIT, edge, prior_of(names, CLASSES))[0].base for names in (CLASSES[0], ["a", "b"])]
    assert shares[0] < router.route(UNIT, edge)[0].base + 1e-9 < shares[1]


def test_without_labels_the_prior_is_the_calibrated_one() -> None:
    router = router_of(TASKS, VoteConfig(), calibrated(TASKS, VoteConfig()))
    place = np.array([[2.0, -2.0, 0, 0]], np.float32)
    given, none = router.route(UNIT, place, prior_of(["cat", "stop", "apple"], [("cat",), ("stop",), ("apple",)])), None
    assert given[0].base == pytest.approx(router.route(UNIT, place, none)[0].base)
