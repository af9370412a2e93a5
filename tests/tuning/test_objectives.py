"""Figures of a stream become numbers: as the accuracy matrix defines them, with penalty, bound and Pareto front."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.tracking.matrix import AccuracyMatrix
from condu_ray.tuning.objectives import Goals, dominates, figures_of, front

PERCENT = st.floats(0, 100)
MATRICES = st.integers(2, 4).flatmap(
    lambda tasks: st.lists(st.lists(PERCENT, min_size=tasks, max_size=tasks), min_size=tasks + 1, max_size=tasks + 1)
)
NAMES = ("last", "latency")


@given(MATRICES)
def test_a_whole_stream_has_the_figures_of_its_matrix(drawn: list[list[float]]) -> None:
    *rows, zero_shot = drawn
    matrix = AccuracyMatrix([str(place) for place in range(len(rows))], rows)
    found = figures_of(rows, zero_shot)
    assert found["last"] == pytest.approx(matrix.last())
    assert found["average"] == pytest.approx(matrix.average())
    transfer, base = matrix.transfer(), sum(zero_shot[1:]) / (len(rows) - 1)
    assert transfer is not None
    assert found["zero_shot_loss"] == pytest.approx(base - transfer)


def test_a_stream_under_way_counts_what_is_there() -> None:
    found = figures_of([[90.0, 30.0, 20.0], [80.0, 70.0, 10.0]], [50.0, 40.0, 25.0])
    assert found == {"last": 75.0, "average": 50.0, "zero_shot_loss": 10.0}


def test_what_was_not_measured_is_left_out() -> None:
    assert figures_of([[90.0, None]], [None, None]) == {"last": 90.0}


def test_zero_shot_that_is_lost_costs_and_none_that_is_won_pays() -> None:
    goals = Goals(("last",), penalty=0.5)
    assert goals.values({"last": 80.0, "zero_shot_loss": 6.0}) == (77.0,)
    assert goals.values({"last": 80.0, "zero_shot_loss": -6.0}) == (80.0,)


def test_above_the_bound_nothing_counts_but_how_near_it_is() -> None:
    goals = Goals(("last",), latency=10.0)
    within, above, far = (
        goals.values({"last": last, "latency": ms}) for last, ms in ((1.0, 10.0), (99.0, 11.0), (99.0, 40.0))
    )
    assert within == (1.0,)
    assert within > above > far


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    kept = front(points, NAMES)
    on_it = {points[place] for place in kept}
    assert len(on_it) == len(kept)
    assert on_it == {one for one in points if not any(dominates(other, one, NAMES) for other in points)}
    assert [points[place][0] for place in kept] == sorted((points[place][0] for place in kept), reverse=True)
