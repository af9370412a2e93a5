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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError, nearest
from condu_ray.fusion.layout import ALIGN, Entry, Layout, not_finite

if TYPE_CHECKING:
    from condu_ray.config import Granularity

BLOCK = 65_536
"""Most coordinates in a block."""

LARGEST_NORM = 1e25
"""Deltas beyond this are refused: below it no product of rescaler and u can leave float32, in any granularity."""

SPAN = 1 << 20
"""Coordinates that one thread works on at a time, about."""

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


@dataclass(frozen=True)
class Span:
    """Blocks that follow each other, over the coordinates [start, stop): whole bytes of a bit plane, both ends."""

    start: int
    stop: int
    blocks: tuple[Block, ...]

    @property
    def sums(self) -> int:
        """How many sums its blocks have, side by side in the order of the blocks."""
        return sum(block.rows for block in self.blocks)

    def groups(self) -> NDArray[np.int64]:
        """int64[sums]: the rescaler's index of each sum."""
        return np.concatenate([block.rescalers + np.arange(block.rows) for block in self.blocks])

    def gaps(self) -> list[slice]:
        """Padding, counted from the span's start."""
        ends = [block.stop - self.start for block in self.blocks]
        starts = [block.start - self.start for block in self.blocks[1:]] + [self.stop - self.start]
        return [slice(end, start) for end, start in zip(ends, starts, strict=True) if end < start]

    def table(self) -> NDArray[np.int64]:
        """int64[blocks, 5]: start and stop counted from the span's start, rows, first sum, first rescaler."""
        rows = np.array([block.rows for block in self.blocks], np.int64)
        places = [(block.start - self.start, block.stop - self.start) for block in self.blocks]
        found = np.empty((len(rows), 5), np.int64)
        found[:, :2], found[:, 2], found[:, 3] = places, rows, np.cumsum(rows) - rows
        found[:, 4] = [block.rescalers for block in self.blocks]
        return found


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


def spans(layout: Layout, granularity: Granularity, least: int = SPAN) -> list[Span]:
    """All blocks, cut into spans of at least `least` coordinates (the last may be shorter); they cover the vector.

    No row of granularity `row` is in two of them.
    """
    found, held = list[Span](), list[Block]()
    start = 0
    for block in blocks(layout, granularity):
        in_row = block.per_row and held and block.sums == held[-1].sums
        if held and block.start - start >= least and block.start % ALIGN == 0 and not in_row:
            found.append(Span(start, block.start, tuple(held)))
            start, held = block.start, []
        held.append(block)
    return [*found, Span(start, layout.total, tuple(held))]


def shares(layout: Layout, granularity: Granularity, count: int) -> list[tuple[Span, ...]]:
    """The spans dealt out to `count` processes, about equally; fewer shares where there are fewer spans."""
    least = max(1, min(SPAN, layout.total // (4 * count)))
    dealt: list[list[Span]] = [[] for _ in range(count)]
    for span in spans(layout, granularity, least):
        dealt[span.start * count // layout.total].append(span)
    return [tuple(own) for own in dealt if own]


def check_finite(span: Span, norms: NDArray[np.float64]) -> None:
    """norms: f64, sums of |delta| in the order of the span's blocks; one that is not finite or too large is refused."""
    if norms.max() <= LARGEST_NORM:
        return
    first = int(np.argmin(norms <= LARGEST_NORM))
    rows = np.cumsum([block.rows for block in span.blocks])
    raise not_finite(span.blocks[int(np.searchsorted(rows, first, side="right"))].entry)


def whole(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One vector from its parts, without a copy where there is one part."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def blank_gaps(layout: Layout, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """f32[total] with 0 on padding."""
    ends = [*layout.offsets[1:], layout.total]
    for entry, end in zip(layout.entries, ends, strict=True):
        vector[entry.stop : end] = 0
    return vector


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
