"""What shares a rescaler, and the blocks in which sums are taken.

    granularity   a rescaler for          the norm of a delta
    l1            the whole vector        sum of |d|                         (paper: the poster's formula)
    tensor_mean   the whole vector        sum over tensors of the mean |d|   (the released code)
    tensor        each tensor             sum of |d|                         (ours)
    row           each row of dim 0       sum of |d|                         (ours)

Sums in floating point depend on their order, so the order is fixed here: a block is at most 65,536 coordinates,
counted from the start of its tensor (with `row`: whole rows, and from the start of a row that is longer). The kernel
adds inside a block, `combine` adds blocks in their order. No cut at block borders, no number of workers changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError, nearest
from condu_ray.fusion.layout import Entry, Layout

if TYPE_CHECKING:
    from condu_ray.config import Granularity

BLOCK = 65_536
"""Most coordinates in a block."""

_ROWS = 256  # most rows in a block: each row has its own look-up tables of 256 entries

_SUMS_PER = {"l1": "vector", "tensor_mean": "tensor", "tensor": "tensor", "row": "row"}


@dataclass(frozen=True)
class Block:
    """Coordinates [start, stop) of one tensor: `rows` rows of equal length, each with its own sums.

    sums: index of the first row's sum. rescalers: index of the first row's rescaler. per_row: granularity is `row`.
    """

    start: int
    stop: int
    entry: Entry
    rows: int
    sums: int
    rescalers: int
    per_row: bool

    @property
    def row_length(self) -> int:
        return (self.stop - self.start) // self.rows


def check_granularity(granularity: str) -> None:
    if granularity not in _SUMS_PER:
        raise FusionError(f"granularity {granularity!r} is unknown", nearest(granularity, _SUMS_PER))


def group_count(layout: Layout, granularity: Granularity) -> int:
    """How many rescalers a task has."""
    if granularity in ("l1", "tensor_mean"):
        return 1
    return len(layout.entries) if granularity == "tensor" else int(layout.rows[-1])


def groups_of_tensors(layout: Layout, granularity: Granularity) -> list[slice]:
    """The rescalers of each tensor, in the layout's order: one, or, with `row`, as many as it has rows."""
    if granularity == "row":
        return [slice(int(first), int(last)) for first, last in pairwise(layout.rows)]
    if granularity == "tensor":
        return [slice(index, index + 1) for index in range(len(layout.entries))]
    return [slice(0, 1)] * len(layout.entries)


def group_of(layout: Layout, granularity: Granularity, coordinates: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rescaler that each coordinate uses. coordinates: int64[n], without padding. Returns int64[n]."""
    if granularity in ("l1", "tensor_mean"):
        return np.zeros(coordinates.shape, np.int64)
    tensor = np.searchsorted(layout.offsets, coordinates, side="right") - 1
    if granularity == "tensor":
        return tensor
    length = np.array([entry.row_length for entry in layout.entries], np.int64)
    return layout.rows[tensor] + (coordinates - layout.offsets[tensor]) // length[tensor]


def blocks(layout: Layout, granularity: Granularity) -> Iterator[Block]:
    """The blocks of a layout, in the order in which their sums are added. Padding is in none of them."""
    per = _SUMS_PER[granularity]
    for index, entry in enumerate(layout.entries):
        if per != "row":
            sums = index if per == "tensor" else 0
            rescalers = index if granularity == "tensor" else 0
            for start in range(entry.offset, entry.stop, BLOCK):
                yield Block(start, min(start + BLOCK, entry.stop), entry, 1, sums, rescalers, False)
            continue
        length, first = entry.row_length, int(layout.rows[index])
        at_once = max(1, min(BLOCK // length, _ROWS))
        for row in range(0, entry.rows, at_once):
            rows = min(at_once, entry.rows - row)
            begin, end = entry.offset + row * length, entry.offset + (row + rows) * length
            for start in range(begin, end, BLOCK):
                yield Block(start, min(start + BLOCK, end), entry, rows, first + row, first + row, True)


def combine(
    layout: Layout, granularity: Granularity, parts: Iterable[tuple[Block, NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """Adds the sums of blocks. parts: (block, f64[K, rows]), in the order of `blocks`. Returns f64[K, G]."""
    total: NDArray[np.float64] | None = None
    count = {"vector": 1, "tensor": len(layout.entries), "row": int(layout.rows[-1])}[_SUMS_PER[granularity]]
    for block, part in parts:
        if total is None:
            total = np.zeros((len(part), count))
        total[:, block.sums : block.sums + block.rows] += part
    assert total is not None, "a layout has at least one block"
    if granularity == "tensor_mean":
        total /= np.array([entry.size for entry in layout.entries], np.float64)
        total = np.add.accumulate(total, axis=1)[:, -1:]  # one after the other, in tensor order
    return total
