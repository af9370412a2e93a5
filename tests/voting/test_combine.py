from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.config import VoteConfig
from condu_ray.voting.combine import by_columns, combine, probabilities, side_by_side, weights

VOTES = [
    VoteConfig(combine="mean_logits"),
    VoteConfig(average="logits"),
    VoteConfig(average="probabilities"),
    VoteConfig(base_weight=0.0),
    VoteConfig(base_weight=0.7, temperature=0.01),
]
COSINES = st.lists(st.floats(-1, 1, width=32), max_size=6)


def test_weights_by_hand() -> None:
    near = np.array([0.5, 0.4])
    published, base = weights(near, True, VoteConfig(combine="mean_logits"))
    np.testing.assert_allclose([*published, base], [1 / 3, 1 / 3, 1 / 3])
    ours, base = weights(near, True, VoteConfig())  # e^(0.1 / 0.05) to 1, two thirds together
    share = np.e**2 / (np.e**2 + 1)
    np.testing.assert_allclose([*ours, base], [share * 2 / 3, (1 - share) * 2 / 3, 1 / 3])
    ours, base = weights(near, True, VoteConfig(base_weight=0.25, temperature=0.1))
    share = np.e / (np.e + 1)
    np.testing.assert_allclose([*ours, base], [share * 0.75, (1 - share) * 0.75, 0.25])
    ours, base = weights(near, False, VoteConfig(base_weight=0.25, temperature=0.1))
    np.testing.assert_allclose([*ours, base], [share, 1 - share, 0])


@given(COSINES, st.booleans(), st.sampled_from(VOTES))
def test_weights_sum_to_one(near: list[float], base: bool, vote: VoteConfig) -> None:
    experts, base_weight = weights(np.array(near), base, vote)
    assert experts.sum() + base_weight == pytest.approx(1, abs=1e-12)
    assert (experts >= 0).all() and base_weight >= 0
    assert base or not near or base_weight == 0


@given(COSINES, st.sampled_from(VOTES), st.randoms(use_true_random=False))
def test_permuting_experts_permutes_weights(near: list[float], vote: VoteConfig, random: Any) -> None:
    order = random.sample(range(len(near)), len(near))
    before, base = weights(np.array(near), True, vote)
    after, same = weights(np.array(near)[order], True, vote)
    np.testing.assert_allclose(after, before[order], atol=1e-15)
    assert base == same


def test_combining_by_hand() -> None:
    logits, share = np.log([[0.5, 0.5], [0.9, 0.1]]), np.array([0.25, 0.75])
    by_logits = probabilities(combine(logits, share, VoteConfig()))
    ratio = (0.9 / 0.1) ** 0.75
    np.testing.assert_allclose(by_logits, [ratio / (1 + ratio), 1 / (1 + ratio)])
    by_probabilities = combine(logits, share, VoteConfig(average="probabilities"))
    np.testing.assert_allclose(by_probabilities, np.log([0.8, 0.2]))
    published = combine(logits, share, VoteConfig(combine="mean_logits", average="probabilities"))
    np.testing.assert_array_equal(published, share @ logits)


def test_averaged_probabilities_bound_an_over_confident_expert() -> None:
    logits, share = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 500.0]]), np.full(3, 1 / 3)
    assert probabilities(combine(logits, share, VoteConfig()))[1] > 0.99
    assert probabilities(combine(logits, share, VoteConfig(average="probabilities")))[1] < 0.5


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=9), st.sampled_from(VOTES))
def test_one_voter_answers_as_it_would_alone(logits: list[float], vote: VoteConfig) -> None:
    alone = combine(np.array([logits]), np.ones(1), vote)
    np.testing.assert_allclose(probabilities(alone), probabilities(np.array(logits)), atol=1e-12)


def test_probabilities_survive_extreme_logits() -> None:
    np.testing.assert_array_equal(probabilities(np.array([1e4, -1e4])), [1, 0])
    sure = combine(np.array([[1e4, -1e4]]), np.ones(1), VoteConfig(average="probabilities"))
    np.testing.assert_array_equal(probabilities(sure), [1, 0])


def test_side_by_side_by_hand() -> None:
    logits, share = [np.log([0.5, 0.5]), np.log([0.9, 0.1])], np.array([0.25, 0.75])
    np.testing.assert_allclose(np.exp(side_by_side(logits, share)), [0.125, 0.125, 0.675, 0.075])


def test_voters_of_some_of_the_labels_by_hand() -> None:
    logits = [np.log([0.5, 0.5]), np.log([0.2, 0.3, 0.5]), np.array([3.0])]
    columns = [np.array([3, 0]), np.array([0, 1, 3]), np.array([1])]
    found = by_columns(logits, columns, np.array([0.5, 0.4, 0.1]), 5)
    np.testing.assert_allclose(np.exp(found), [0.25 + 0.08, 0.12 + 0.1, 0.0, 0.25 + 0.2, 0.0])
