from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.config import VoteConfig
from condu_ray.voting.prototypes import FeatureSums, Prototypes, make_prototypes
from condu_ray.voting.routing import UNCALIBRATED, Chosen, Thresholds, calibrate, choose, similarities


def task(prototypes: list[list[float]] | np.ndarray, held_out: list[list[float]] | np.ndarray = ()) -> Prototypes:  # type: ignore[assignment]
    unit = np.asarray(prototypes, np.float32)
    return make_prototypes(
        FeatureSums.zero(*unit.shape), unit, np.asarray(held_out, np.float32).reshape(-1, unit.shape[1])
    )


def chosen(row: list[float], thresholds: Thresholds, **vote: object) -> Chosen:
    return choose(np.array([row], np.float32), VoteConfig(**vote), thresholds)[0]  # type: ignore[arg-type]


def test_similarity_is_the_highest_cosine_over_the_classes() -> None:
    tasks = [task([[1, 0], [0, 1]]), task([[0, -1]])]
    found = similarities(np.array([[0.6, 0.8], [0.8, -0.6]], np.float32), tasks)
    np.testing.assert_allclose(found, [[0.8, -0.8], [0.8, 0.6]], atol=1e-7)
    assert similarities(np.ones((3, 2), np.float32), []).shape == (3, 0)


LIMITS = Thresholds(gap=0.125, known=0.5, unseen=0.25)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.75, 0.5, 0.0, 0.0], Chosen((0,), False)),  # known and far ahead: decided, θ⁰ left out
        ([0.375, 0.125, 0.0, 0.0], Chosen((0,), True)),  # far ahead, not surely known
        ([0.5, 0.75, 0.6875, 0.0], Chosen((1, 2), True)),  # two close ones, then a drop
        ([0.75, 0.625, 0.0, 0.0], Chosen((0,), False)),  # a drop of exactly the gap ends the list
        ([0.5, 0.5, 0.5, 0.5], Chosen((0, 1, 2), True)),  # never more than k; ties in the order of the tasks
        ([0.1875, 0.0, -0.5, -0.75], Chosen((0, 1, 2), True)),  # surely unseen: k experts, however far apart
        ([0.25, 0.0, 0.0, 0.0], Chosen((0,), True)),  # not below `unseen`
    ],
)
def test_adaptive_k(row: list[float], expected: Chosen) -> None:
    assert chosen(row, LIMITS, k=3) == expected


def test_fixed_k_ignores_the_thresholds() -> None:
    assert chosen([0.1, 0.9, 0.3], LIMITS, k=2, adaptive=False) == Chosen((1, 2), True)
    assert chosen([0.1, 0.9, 0.3], LIMITS, k=8, adaptive=False) == Chosen((1, 2, 0), True)


def test_few_tasks() -> None:
    assert chosen([], LIMITS) == Chosen((), True)
    assert chosen([0.75], LIMITS) == Chosen((0,), False)
    assert chosen([0.375], LIMITS) == Chosen((0,), True)
    assert chosen([0.9, 0.1], UNCALIBRATED, k=1) == Chosen((0,), True)
    assert chosen([0.9, -0.9], UNCALIBRATED) == Chosen((0, 1), True)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4))
def test_permuting_tasks_permutes_the_chosen(seed: int, tasks: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.linspace(-0.9, 0.9, 20))[: 2 * tasks].reshape(2, tasks).astype(np.float32)  # no ties
    order = rng.permutation(tasks)
    limits = Thresholds(*rng.uniform(0, 0.5, 3))
    vote = VoteConfig(k=k)
    for before, after in zip(choose(rows, vote, limits), choose(rows[:, order], vote, limits), strict=True):
        assert Chosen(tuple(int(order[i]) for i in after.experts), after.base) == before


def test_calibration_by_hand() -> None:
    first = task([[1, 0]], [[0.8, 0.6], [1, 0]])
    second = task([[0, 1]], [[0.75, 0.6614378], [0, 1]])  # the first of these is nearer to the other task, by 0.0886
    limits = calibrate([first, second], k=2)
    needed = float(np.float32(0.75)) - float(np.float32(0.6614378))
    assert limits.gap == np.nextafter(needed, 1)
    own = [0.6614378, 0.8, 1, 1]
    assert limits.known == pytest.approx(np.quantile(own, 0.05), abs=1e-7)
    assert limits.unseen == pytest.approx(np.quantile(own, 0.01), abs=1e-7)


def test_calibration_where_little_is_known() -> None:
    assert calibrate([], k=4) == UNCALIBRATED
    assert calibrate([task([[1, 0]]), task([[0, 1]])], k=4) == UNCALIBRATED
    alone = calibrate([task([[1, 0]], [[0.6, 0.8], [1, 0]])], k=4)
    assert alone.gap == 0 and 0.6 < alone.unseen < alone.known < 1
    apart = calibrate([task([[1, 0]], [[1, 0]]), task([[0, 1]])], k=4)
    assert apart.gap == 0, "no picture needs a second expert"


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.integers(0, 60))
def test_the_gap_is_the_smallest_that_loses_at_most_one_in_a_hundred(seed: int, tasks: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(tasks, 1, 3))
    made = []
    for centre in centres:
        values = centre + rng.normal(scale=rng.uniform(0.1, 1), size=(count + 2, 3))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        made.append(task(values[:2], values[2:]))
    limits = calibrate(made, k)

    def lost(gap: float) -> int:
        rows = [choose(similarities(t.held_out, made), VoteConfig(k=k), replace(UNCALIBRATED, gap=gap)) for t in made]
        return sum(own not in picture.experts for own, pictures in enumerate(rows) for picture in pictures)

    allowed = max(tasks * count // 100, lost(UNCALIBRATED.gap))  # what k alone loses cannot be won back
    assert lost(limits.gap) <= allowed
    if count:
        assert limits.gap == 0 or lost(float(np.nextafter(limits.gap, -1))) > allowed
        assert limits.unseen <= limits.known <= 1
