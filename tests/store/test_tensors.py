"""The files are safetensors, always the same bytes, and mapped without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from condu_ray.errors import StoreError
from condu_ray.store import tensors

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", ">f4", ">i8"]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda code: hnp.arrays(np.dtype(code), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
named = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), arrays, max_size=5)


def written(content: dict[str, Any]) -> bytes:
    return b"".join(bytes(piece) for piece in tensors.pieces(content))


@given(named)
def test_round_trip(content: dict[str, Any]) -> None:
    body = written(content)
    back = tensors.read(body, "file")
    official = safetensors.numpy.load(body)
    assert back.keys() == content.keys() == official.keys()
    for name, array in content.items():
        little = array.astype(array.dtype.newbyteorder("<"))
        for found in (back[name], official[name]):
            assert found.dtype == little.dtype
            assert found.shape == little.shape
            assert found.tobytes() == little.tobytes()
        assert back[name].flags.aligned
        assert not back[name].flags.writeable


@given(named, st.randoms())
def test_the_order_of_names_does_not_matter(content: dict[str, Any], random: Any) -> None:
    names = list(content)
    random.shuffle(names)
    assert written({name: content[name] for name in names}) == written(content)


def test_strided_arrays_are_written_by_value() -> None:
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"turned": grid.T, "every_second": grid[::2, ::-1]}
    back = tensors.read(written(views), "file")
    for name, view in views.items():
        np.testing.assert_array_equal(back[name], view)


def test_the_data_starts_at_a_multiple_of_64_bytes() -> None:
    for length in range(1, 70):
        body = written({"n" * length: np.zeros(1, np.float32)})
        assert len(body) % 64 == 4


def test_files_of_other_writers_are_read() -> None:
    body = safetensors.numpy.save({"a": np.arange(3), "b": np.ones((2, 2), np.float32)}, {"format": "np"})
    assert tensors.read(body, "file")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"not json",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}',
        b'{"a": {"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}}',
    ],
)
def test_a_header_that_lies_is_refused(header: bytes) -> None:
    with pytest.raises(StoreError, match="file"):
        tensors.read(len(header).to_bytes(8, "little") + header + bytes(16), "file")


@given(st.binary(max_size=64))
def test_rubbish_is_refused(body: bytes) -> None:
    try:
        found = tensors.read(body, "file")
    except StoreError:
        return
    assert not found  # only an empty header is short enough to be valid
