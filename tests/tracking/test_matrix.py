"""Transfer, Average and Last as the released tables print them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condu_ray.tracking.matrix import AccuracyMatrix

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("mtil_cases.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_published_matrices_give_the_published_figures(case: dict[str, Any]) -> None:
    matrix = AccuracyMatrix(case["tasks"], case["matrix"])
    rows = {
        "transfer_task": matrix.transfer_row()[1:],
        "average_task": matrix.average_row(),
        "last_task": matrix.last_row(),
    }
    means = {"transfer": matrix.transfer(), "average": matrix.average(), "last": matrix.last()}
    for name, row in rows.items():
        assert row == pytest.approx(case["rounded_1"][name], abs=0.051)
    for name, value in means.items():
        assert value == pytest.approx(case["exact"][name], abs=1e-4)
        assert value == pytest.approx(case["rounded_1"][name], abs=0.051)


def test_two_tasks_by_hand() -> None:
    matrix = AccuracyMatrix(["a", "b"], [[90, 30], [80, 70]])
    assert matrix.transfer_row() == [None, 30]
    assert matrix.average_row() == [85, 50]
    assert matrix.last_row() == [80, 70]
    assert (matrix.transfer(), matrix.average(), matrix.last()) == (30, 67.5, 75)


def test_one_task_has_no_transfer() -> None:
    matrix = AccuracyMatrix(["a"], [[90]])
    assert (matrix.transfer(), matrix.average(), matrix.last()) == (None, 90, 90)


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_what_was_not_measured_makes_only_its_own_means_unknown(unknown: float | None) -> None:
    matrix = AccuracyMatrix(["a", "b"], [[90, unknown], [80, 70]])
    assert matrix.transfer_row() == [None, None]
    assert matrix.average_row() == [85, None]
    assert (matrix.transfer(), matrix.average(), matrix.last()) == (None, None, 75)


@pytest.mark.parametrize("values", [[], [[1]], [[1, 2], [3]], [[1, 2], [3, 4], [5, 6]]])
def test_another_shape_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="2 tasks need 2 rows of 2"):
        AccuracyMatrix(["a", "b"], values)


squares = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=n, max_size=n), min_size=n, max_size=n
    )
)


@given(squares)
def test_json_holds_every_value(values: list[list[float | None]]) -> None:
    matrix = AccuracyMatrix([f"task {index}" for index in range(len(values))], values)
    fields = json.loads(json.dumps(matrix.to_json(), allow_nan=False))
    assert fields["values"] == values


@given(squares)
def test_a_mean_lies_between_the_values_it_is_of(values: list[list[float | None]]) -> None:
    matrix = AccuracyMatrix([f"task {index}" for index in range(len(values))], values)
    for mean in (matrix.transfer(), matrix.average(), matrix.last()):
        assert mean is None or -1e-9 <= mean <= 100 + 1e-9
    if all(value is not None for row in values for value in row):
        assert matrix.average() is not None
        assert matrix.last() is not None
        assert (matrix.transfer() is None) == (len(values) == 1)
