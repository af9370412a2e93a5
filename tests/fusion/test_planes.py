"""Bit planes: small ones are stored small, and folded births say the same as births and flips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fusion_properties import Case, given_cases, learn, masks

from condu_ray.errors import FusionError
from condu_ray.fusion.forget import forget
from condu_ray.fusion.planes import grow, packed, read_bits, shrink, write_bits
from condu_ray.fusion.reconstruct import reconstruct
from condu_ray.fusion.state import fold, load, objects
from condu_ray.fusion.unify import unify

pytestmark = pytest.mark.filterwarnings("ignore::condu_ray.fusion.unify.EmptyTrigger")
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from([0.0, 0.001, 0.02, 0.2, 1.0]))
@quick
def test_a_plane_comes_back_from_what_is_stored(seed: int, size: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    plane = np.packbits(rng.random(8 * size) < share, bitorder="little")
    stored = shrink(plane)
    back = stored["flips"] if "flips" in stored else grow("flips-1", stored, size)
    assert back.tobytes() == plane.tobytes()
    assert sum(array.nbytes for array in stored.values()) <= size
    assert list(stored) == list(shrink(plane.copy()))


def test_few_bits_take_little_room() -> None:
    plane = np.packbits(np.random.default_rng(0).random(8 * 100_000) < 0.002, bitorder="little")
    assert sum(array.nbytes for array in shrink(plane).values()) < 0.15 * plane.nbytes


def test_packed_bits_that_do_not_fit_are_named() -> None:
    stored = shrink(np.array([0, 0, 0, 1, 0, 0, 0, 0], np.uint8))
    with pytest.raises(FusionError, match="'flips-3': 0 packed bytes for 1 places"):
        grow("flips-3", {**stored, "values": stored["values"][:0]}, 8)
    with pytest.raises(FusionError, match="'flips-3': its packed bits do not fit a plane of 80 bytes"):
        grow("flips-3", stored, 80)


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(1, 90), st.integers(0, 18))
@quick
def test_bits_are_written_read_and_packed_from_any_start(seed: int, start: int, size: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.random((tasks, size)) < 0.5
    planes = np.zeros((tasks, 20), np.uint8)
    for plane, own in zip(planes, bits, strict=True):
        write_bits(plane, start, own)
        assert np.array_equal(read_bits(plane, start, start + size), own)
        assert not read_bits(plane, 0, start).any()
    codes = packed(planes, start, start + size)
    for task, own in enumerate(bits):
        assert np.array_equal(codes[task // 8] >> np.uint8(task % 8) & np.uint8(1), own)


@given_cases(fewest=2)
def test_folding_flips_into_births_changes_nothing_that_a_state_says(case: Case) -> None:
    state = learn(case)[-1]
    folded = fold(state)
    assert not folded.flips
    assert np.array_equal(masks(folded), masks(state))
    back = load(case.layout, case.granularity, objects(folded))
    assert not set(objects(folded)) & {name for name in objects(state) if not name.startswith("u-")} - {
        f"birth-{state.next_uid - 1}"
    }
    more = case.deltas[0] * np.float32(0.5)
    for one, other in ((back, state), (unify(back, "more", more), unify(state, "more", more))):
        assert np.array_equal(masks(one), masks(other))
        for name in one.names:
            assert reconstruct(one, name).tobytes() == reconstruct(other, name).tobytes()
    later = unify(back, "more", more)
    again = load(case.layout, case.granularity, objects(forget(later, later.names[0])))
    assert again.names == later.names[1:]
    assert reconstruct(again, "more").tobytes() == reconstruct(later, "more").tobytes()
