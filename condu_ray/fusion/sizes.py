"""A second bit where rows of zeros leave room for it: is a value large or small for its row? (Ours.)

A group (a row) that a task's fine-tuning did not touch needs no sign. What such groups leave of one bit a parameter
goes to others, those of the largest mean |d| first; a value of theirs is reconstructed without any shared magnitude:

    d_j  ~  r * (small or large level of its tensor) with the task's sign

The levels of a tensor are the two of least squared error over its |d| / r (Lloyd's algorithm, Max 1960 and Lloyd 1982),
found on a histogram, so that the deltas are read twice and nothing depends on threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.fusion.groups import Block, Span, group_count, groups_of_tensors, spans
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.planes import Plane, write_bits
from condu_ray.fusion.threads import each

if TYPE_CHECKING:
    from condu_ray.config import Granularity

_BINS = 1024
_STEPS_A_UNIT = 128  # bins for |d| / r from 0 to 1; the last bin takes all from 8 on
_ROUNDS = 100  # of Lloyd's algorithm at most; on a histogram it ends by itself


@dataclass(frozen=True, eq=False)
class Sizes:
    """groups: bool[G], which have the second bit. large: one bit a coordinate, 0 outside of these groups, or no byte
    at all where there are none. levels: f32[tensors, 2], small and large in units of the rescaler."""

    groups: NDArray[np.bool_]
    large: Plane
    levels: NDArray[np.float32]

    @classmethod
    def none(cls, layout: Layout, granularity: Granularity) -> Sizes:
        """No group has a second bit."""
        groups = np.zeros(group_count(layout, granularity), np.bool_)
        return cls(groups, np.zeros(0, np.uint8), np.ones((len(layout.entries), 2), np.float32))


def lengths(layout: Layout, granularity: Granularity) -> NDArray[np.int64]:
    """int64[G]: coordinates of each group."""
    found = np.zeros(group_count(layout, granularity), np.int64)
    for entry, own in zip(layout.entries, groups_of_tensors(layout, granularity), strict=True):
        found[own] += entry.size // (own.stop - own.start)
    return found


def tensor_of(layout: Layout, granularity: Granularity) -> NDArray[np.int64]:
    """int64[G]: the tensor of each group (the first, where one group has several)."""
    found = np.zeros(group_count(layout, granularity), np.int64)
    for index, own in reversed(list(enumerate(groups_of_tensors(layout, granularity)))):
        found[own] = index
    return found


def sizes_of(
    layout: Layout,
    granularity: Granularity,
    rescalers: NDArray[np.float32],
    delta: NDArray[np.float32],
    threads: int | None = None,
) -> Sizes:
    """Which groups of a task get the second bit, and what it says.

    rescalers: f32[G], mean |delta| of each group. delta: f32[total], finite. threads: [all cores]; they change no bit.
    """
    size = lengths(layout, granularity)
    touched = rescalers > 0
    room = int(size[~touched].sum())
    order = np.argsort(-rescalers, kind="stable")
    order = order[: int(touched.sum())]
    chosen = np.zeros(len(size), np.bool_)
    chosen[order[np.cumsum(size[order]) <= room]] = True
    if not chosen.any():
        return Sizes.none(layout, granularity)

    some = spans(layout, granularity)
    index = {entry.name: number for number, entry in enumerate(layout.entries)}

    def count(span: Span) -> list[tuple[int, NDArray[Any]]]:
        found = []
        for block, rows in _chosen(span, chosen):
            bins, weight, scaled = _binned(block, rows, rescalers, delta)
            sums = np.stack([np.bincount(bins, weight, _BINS), np.bincount(bins, weight * scaled, _BINS)])
            found.append((index[block.entry.name], sums))
        return found

    histograms = np.zeros((len(layout.entries), 2, _BINS))
    for part in each(count, some, threads):
        for tensor, sums in part:
            histograms[tensor] += sums
    borders, levels = np.full(len(histograms), _BINS), np.ones((len(histograms), 2), np.float32)
    for tensor, (weight, sums) in enumerate(histograms):
        if weight.any():
            borders[tensor], levels[tensor] = _two_levels(weight, sums)

    large = np.zeros(layout.total // 8, np.uint8)

    def mark(span: Span) -> None:
        for block, rows in _chosen(span, chosen):
            bins, _, _ = _binned(block, rows, rescalers, delta)
            bits = np.zeros((block.rows, block.row_length), np.bool_)
            bits[rows] = (bins >= borders[index[block.entry.name]]).reshape(-1, block.row_length)
            write_bits(large, block.start, bits.reshape(-1))

    each(mark, some, threads)
    return Sizes(chosen, large, levels)


def _chosen(span: Span, chosen: NDArray[np.bool_]) -> list[tuple[Block, NDArray[np.bool_]]]:
    """The blocks that have chosen rows, and which."""
    found = [(block, chosen[block.rescalers : block.rescalers + block.rows]) for block in span.blocks]
    return [(block, rows) for block, rows in found if rows.any()]


def _binned(
    block: Block, rows: NDArray[np.bool_], rescalers: NDArray[np.float32], delta: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """For the values of the chosen rows: bin, weight r², and |d| / r, which is cut at the last bin's end."""
    r = rescalers[block.rescalers : block.rescalers + block.rows][rows].astype(np.float64)[:, None]
    values = np.abs(delta[block.start : block.stop].reshape(block.rows, block.row_length)[rows].astype(np.float64))
    scaled = np.minimum(values / r, _BINS / _STEPS_A_UNIT)
    bins = np.minimum((scaled * _STEPS_A_UNIT).astype(np.int64), _BINS - 1)
    return bins.reshape(-1), np.broadcast_to(r * r, scaled.shape).reshape(-1), scaled.reshape(-1)


def _two_levels(weight: NDArray[np.float64], sums: NDArray[np.float64]) -> tuple[int, tuple[float, float]]:
    """(first bin that is large, (small level, large level)) of a histogram of weights and of weighted values."""
    weights, values = np.cumsum(weight), np.cumsum(sums)
    border = _STEPS_A_UNIT
    small = large = 1.0
    for _ in range(_ROUNDS):
        below, above = weights[border - 1], weights[-1] - weights[border - 1]
        small = float(values[border - 1] / below) if below > 0 else 0.0
        large = float((values[-1] - values[border - 1]) / above) if above > 0 else small
        moved = min(max(round((small + large) / 2 * _STEPS_A_UNIT), 1), _BINS - 1)
        if moved == border:
            break
        border = moved
    return border, (small, large)


def kept(layout: Layout, granularity: Granularity, plane: Plane, groups: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The bits of these groups alone, tensor after tensor, each from a new byte on; for the store."""
    parts = [np.zeros(0, np.uint8)]
    for entry, own in zip(layout.entries, groups_of_tensors(layout, granularity), strict=True):
        rows = groups[own]
        if rows.any():
            bits = np.unpackbits(plane[entry.offset // 8 :], count=entry.size, bitorder="little")
            parts.append(np.packbits(bits.reshape(len(rows), -1)[rows], bitorder="little"))
    return np.concatenate(parts)


def spread(
    layout: Layout, granularity: Granularity, bits: NDArray[np.uint8], groups: NDArray[np.bool_]
) -> Plane | None:
    """The inverse of `kept`: a plane with 0 in all other groups; None where the bits do not fit these groups."""
    plane, at = np.zeros(layout.total // 8, np.uint8), 0
    for entry, own in zip(layout.entries, groups_of_tensors(layout, granularity), strict=True):
        rows = groups[own]
        if not rows.any():
            continue
        count = entry.size // len(rows) * int(rows.sum())
        part = bits[at : at + -(-count // 8)]
        at += -(-count // 8)
        if at > len(bits):
            return None
        values = np.zeros((len(rows), entry.size // len(rows)), np.uint8)
        values[rows] = np.unpackbits(part, count=count, bitorder="little").reshape(int(rows.sum()), -1)
        write_bits(plane, entry.offset, values.reshape(-1).view(np.bool_))
    return plane if at == len(bits) else None
