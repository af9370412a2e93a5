"""The order of sums is a promise: a state made today must go on to the same bits with any later kernel."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from condu_ray.config import Granularity
from condu_ray.fusion import signs
from condu_ray.fusion.groups import spans
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.planes import packed
from condu_ray.fusion.state import FusionState
from condu_ray.fusion.unify import combined, fuse, unify

F64 = NDArray[np.float64]
TASKS = 10
LAYOUT = Layout.of({"long": np.zeros(140_001, np.float32), "matrix": np.zeros((21, 37), np.float32)})


def wild(seed: int) -> NDArray[np.float32]:
    """Magnitudes over twenty decades, so that every other order of adding rounds differently."""
    rng = np.random.default_rng(seed)
    return LAYOUT.flatten(
        {e.name: rng.standard_normal(e.shape) * 10 ** rng.uniform(-14, 6, e.shape) for e in LAYOUT.entries}
    )


def in_turn(values: F64) -> float:
    total = 0.0
    for value in values.tolist():
        total += value
    return total


def eight_lanes(values: F64) -> float:
    a, b, c, d, e, f, g, h = (in_turn(values[lane::8]) for lane in range(8))
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


def masses(values: F64, packed: NDArray[np.uint8]) -> list[float]:
    bits = [packed[task // 8] >> np.uint8(task % 8) & np.uint8(1) for task in range(TASKS)]
    return [eight_lanes(values * own) for own in bits]


def segments(granularity: Granularity) -> list[tuple[int, int, int]]:
    """(group, start, stop) of what is summed at once, in order."""
    starts = [(0, start, min(start + 65_536, 140_001)) for start in range(0, 140_001, 65_536)]
    matrix = LAYOUT.entries[1]
    if granularity == "row":
        rows = [(1 + row, matrix.offset + 37 * row, matrix.offset + 37 * row + 37) for row in range(21)]
        return [*starts, *rows]
    return [*starts, (0 if granularity == "l1" else 1, matrix.offset, matrix.stop)]


@pytest.mark.parametrize("granularity", ["l1", "tensor_mean", "tensor", "row"])
@pytest.mark.usefixtures("vehicle")
def test_sums_are_taken_in_the_written_order(granularity: Granularity) -> None:
    before = FusionState.empty(LAYOUT, granularity)
    for seed in range(TASKS - 1):
        before = unify(before, f"t{seed}", wild(seed))
    delta = wild(99)
    after = unify(before, "new", delta)

    codes = packed(after.planes.masks(slice(0, LAYOUT.total // 8)), 0, LAYOUT.total)
    expected = np.zeros((TASKS + 1, {"l1": 1, "row": 22}.get(granularity, 2)))
    for group, start, stop in segments(granularity):
        values = np.abs(after.u[start:stop]).astype(np.float64)
        part = masses(values, codes[:, start:stop])
        expected[:, group] += [*part, eight_lanes(np.abs(delta[start:stop]).astype(np.float64))]
    if granularity == "tensor_mean":
        expected = expected[:, :1] / 140_001 + expected[:, 1:] / (21 * 37)

    assert np.array_equal(after.tasks[-1].norms, expected[-1])
    part = fuse(before, "new", delta, tuple(spans(LAYOUT, granularity)))
    assert np.array_equal(combined(LAYOUT, granularity, [part]), expected)


@pytest.mark.parametrize("granularity", ["l1", "tensor", "row"])
@pytest.mark.usefixtures("vehicle")
def test_means_of_signs_are_taken_in_the_written_order(granularity: Granularity) -> None:
    delta, groups = wild(7), {"l1": 1, "row": 22}.get(granularity, 2)
    sums, sizes = np.zeros(groups), np.zeros(groups)
    for group, start, stop in segments(granularity):
        sums[group] += eight_lanes(np.abs(delta[start:stop]).astype(np.float64))
        sizes[group] += stop - start
    part = signs.fuse(signs.SignState.empty(LAYOUT, granularity), "t", delta, tuple(spans(LAYOUT, granularity)))
    assert np.array_equal(part.means, sums / sizes)
