"""The one pass over a block: elect, choose, flip, sum (our reconstruction of ConDU's unifying step as one pass).

All old values at a coordinate are u times a rescaler, so they share the sign of u, and a byte of mask bits is all that
has to be looked at: one table gives the sum of the rescalers of its bits, another their maximum. The masks are packed:
bit `t % 8` of packed[t // 8, j] belongs to task number t.

What is here defines the bits. A vector of `COMPILED_FROM` coordinates or more is worth machine code, which `compiled`
makes from the same steps, and which gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from condu_ray.fusion.groups import Block, Span
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.planes import Planes, write_bits
from condu_ray.fusion.planes import packed as packed_masks

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bits = NDArray[np.bool_]
Packed = NDArray[np.uint8]

COMPILED_FROM = 1 << 24
"""Coordinates of a vector. Below, NumPy takes less than a second; compiling takes 8 s once, loading half a second."""

_LANES = 8


@dataclass(frozen=True)
class Written:
    """Where a span's results go. u: f32[n]. birth, flips: uint8[n / 8], zeros. sums: f64[T + 2, sums of the span]."""

    u: F32
    birth: Packed
    flips: Packed
    sums: F64


def fuse_span(layout: Layout, span: Span, u: F32, delta: F32, planes: Planes, rescalers: F32, written: Written) -> None:
    """Adds a task to the n coordinates of a span; padding among them becomes 0.

    u, delta: f32[n]; written.u may be u itself. planes, rescalers (f32[T, G]): of the whole layout.
    """
    if layout.total >= COMPILED_FROM:
        from condu_ray.fusion import compiled  # only where it pays: importing it costs half a second or more

        per_row, delta = span.blocks[0].per_row, np.require(delta, requirements=["C", "A"])
        births, flips = planes.places()
        for places in (births, flips):
            places[1] += span.start // 8
        out = (written.u, written.birth, written.flips, written.sums)
        compiled.fuse(span.table(), u, delta, births, flips, rescalers, per_row, *out)
    else:
        masks = planes.masks(slice(span.start // 8, span.stop // 8))
        _fuse_blocks(span, u, delta, masks, rescalers, written)
    for gap in span.gaps():
        written.u[gap] = 0


def norm_span(layout: Layout, span: Span, delta: F32) -> F64:
    """f64[sums of the span]: sum of |delta|, which is f32[n]."""
    if layout.total < COMPILED_FROM:
        wide = [(b, np.abs(delta[b.start - span.start : b.stop - span.start]).astype(np.float64)) for b in span.blocks]
        return np.concatenate([lane_sums(block, values) for block, values in wide])
    from condu_ray.fusion import compiled

    sums = np.empty(span.sums)
    compiled.norm(span.table(), np.require(delta, requirements=["C", "A"]), sums)
    return sums


def add_span(
    layout: Layout, span: Span, delta: F32, scales: F64, largest: float, magnitudes: NDArray[np.uint32], signs: Packed
) -> None:
    """magnitudes += min(round(|delta| * scale), largest), in place; signs: one bit where delta is above 0.

    delta: f32[n]. scales: f64[G], of the whole layout. magnitudes: uint32[n]. signs: uint8[n / 8], zeros.
    """
    if layout.total >= COMPILED_FROM:
        from condu_ray.fusion import compiled

        delta = np.require(delta, requirements=["C", "A"])
        compiled.add(span.table(), delta, scales, largest, magnitudes, signs)
        return
    for block in span.blocks:
        here = slice(block.start - span.start, block.stop - span.start)
        scale = scales[block.rescalers : block.rescalers + block.rows, None]
        values = delta[here].reshape(block.rows, block.row_length)
        summand = np.minimum(np.rint(np.abs(values) * scale), largest)
        magnitudes[here] += summand.astype(np.uint32).reshape(-1)
        write_bits(signs, here.start, delta[here] > 0)


def _fuse_blocks(span: Span, u: F32, delta: F32, masks: Packed, rescalers: F32, written: Written) -> None:
    at = 0
    for block in span.blocks:
        start, stop = block.start - span.start, block.stop - span.start
        here, own = slice(start, stop), slice(block.rescalers, block.rescalers + block.rows)
        packed, after = packed_masks(masks, start, stop), np.empty((len(masks) // 8 + 1, stop - start), np.uint8)
        fused = fuse_block(block, u[here], delta[here], packed, rescalers[:, own], written.u[here], after)
        write_bits(written.birth, start, fused.born)
        write_bits(written.flips, start, fused.flipped)
        written.sums[:, at : at + block.rows] = fused.sums
        at += block.rows


@dataclass(frozen=True)
class Fused:
    """What one block gives besides its new u and masks.

    born, flipped: bool[n]. sums: f64[T + 2, rows]: for each task, the new one last, the sum of |u'| over its set bits;
    then the sum of |delta|.
    """

    born: Bits
    flipped: Bits
    sums: F64


def fuse_block(
    block: Block, u: F32, delta: F32, packed: Packed, rescalers: F32, out_u: F32, out_packed: Packed
) -> Fused:
    """Adds a task to one block of n coordinates.

    u, delta: f32[n]. packed: uint8[ceil(T / 8), n]. rescalers: f32[T, rows]. Written: out_u f32[n], finite and without
    -0.0; out_packed uint8[T // 8 + 1, n]. A delta with NaN or Inf shows as a last sum that is not finite; the other
    results mean nothing then.
    """
    tasks = len(rescalers)
    share, largest, held = _old_tasks(block, packed, rescalers)
    np.multiply(share, u, out=share)
    np.add(share, delta, out=share)  # two roundings: a fused multiply-add would decide ties differently
    positive = share > 0
    born = ((delta > 0) == positive) & (delta != 0)
    flipped = held & ((u < 0) == positive)
    stays = ~flipped

    largest *= np.abs(u)  # where the sign flips, |delta| is larger still
    size = np.abs(delta)
    size *= born
    np.maximum(largest, size, out=size)
    np.multiply(positive, np.float32(2), out=out_u)
    out_u -= 1
    out_u *= size
    out_u += 0.0  # -0.0 becomes +0.0

    out_packed[: len(packed)] = packed
    out_packed[: len(packed)] *= stays
    if len(out_packed) > len(packed):
        out_packed[-1] = 0
    out_packed[-1] |= born.view(np.uint8) << np.uint8(tasks % 8)

    weights = size.astype(np.float64)
    norm = lane_sums(block, np.abs(delta).astype(np.float64))
    return Fused(born, flipped, np.vstack([_masses(block, out_packed, weights, tasks + 1), norm]))


def _old_tasks(block: Block, packed: Packed, rescalers: F32) -> tuple[F64, F32, Bits]:
    """At each coordinate: sum (f64) and maximum (f32) of the rescalers whose bit is set, and whether any is."""
    count = block.stop - block.start
    share, largest, held = np.zeros(count), np.zeros(count, np.float32), np.zeros(count, np.bool_)
    for group, bits in enumerate(packed):
        sums, maxima = _tables(rescalers[8 * group : 8 * group + 8])
        index = bits.astype(np.intp)
        if block.rows > 1:
            index += _row_index(block.row_length, block.rows, sums.shape[1])
        # `clip` only because it is the mode without a copy; no index is out of range
        if group == 0:
            np.take(sums, index, out=share, mode="clip")
            np.take(maxima, index, out=largest, mode="clip")
        else:
            share += np.take(sums, index, mode="clip")
            np.maximum(largest, np.take(maxima, index, mode="clip"), out=largest)
        held |= bits != 0
    return share, largest, held


def _tables(rescalers: F32) -> tuple[F64, F32]:
    """Sum and maximum, ascending, of the rescalers of a byte value's bits: [rows, 2^k] each, from f32[k <= 8, rows]."""
    tasks, rows = rescalers.shape
    sums, maxima = np.zeros((rows, 1 << tasks)), np.zeros((rows, 1 << tasks), np.float32)
    for bit, rescaler in enumerate(rescalers):
        half = 1 << bit
        np.add(sums[:, :half], rescaler[:, None], out=sums[:, half : 2 * half])
        np.maximum(maxima[:, :half], rescaler[:, None], out=maxima[:, half : 2 * half])
    return sums, maxima


def _masses(block: Block, packed: Packed, weights: F64, tasks: int) -> F64:
    """Sum of weights over each task's set bits, f64[tasks, rows]: one add a coordinate for many tasks at once.

    Four interleaved tables, lane = (coordinate - block start) mod 4, of 256 sums, one a byte value; then
    ((l0 + l1) + (l2 + l3)), and a task's sum is that of the byte values with its bit, ascending. With `row`: tables for
    each row, lanes from the row's start, and 16 sums for half a byte, because rows can be short.
    """
    width = 4 if block.per_row else 8
    base = _table_index(block.row_length, block.rows, 1 << width)
    masses = np.empty((tasks, block.rows))
    for first in range(0, tasks, width):
        values = packed[first // 8]
        if width == 4:
            values = (values >> np.uint8(first % 8)) & np.uint8(15)
        bins = np.bincount(base + values, weights=weights, minlength=block.rows * 4 << width)
        lane = bins.reshape(block.rows, 4, 1 << width).swapaxes(0, 1)
        table = (lane[0] + lane[1]) + (lane[2] + lane[3])
        last = min(first + width, tasks)
        chosen = table[:, _values_with_bit(width)[: last - first]]
        masses[first:last] = np.add.accumulate(chosen, axis=2)[:, :, -1].T
    return masses


def lane_sums(block: Block, values: F64) -> F64:
    """Sum of each row, f64[rows]: eight lanes by (coordinate - row start) mod 8, ((0+1)+(2+3)) + ((4+5)+(6+7))."""
    index = _lane_index(block.row_length, block.rows)
    lane = np.bincount(index, weights=values, minlength=block.rows * _LANES).reshape(block.rows, _LANES).T
    sums: F64 = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]))
    return sums


# np.bincount adds one after the other in each bin, so an index array is what fixes the order of a sum.


@lru_cache(maxsize=8)
def _lane_index(row_length: int, rows: int) -> NDArray[np.intp]:
    lane = np.arange(row_length, dtype=np.intp) % _LANES
    return (np.arange(rows, dtype=np.intp)[:, None] * _LANES + lane).reshape(-1)


@lru_cache(maxsize=8)
def _row_index(row_length: int, rows: int, entries: int) -> NDArray[np.intp]:
    return np.repeat(np.arange(rows, dtype=np.intp) * entries, row_length)


@lru_cache(maxsize=8)
def _table_index(row_length: int, rows: int, entries: int) -> NDArray[np.intp]:
    lane = np.arange(row_length, dtype=np.intp) % 4
    return ((np.arange(rows, dtype=np.intp)[:, None] * 4 + lane) * entries).reshape(-1)


@lru_cache(maxsize=2)
def _values_with_bit(width: int) -> NDArray[np.intp]:
    """[width, 2^width / 2]: the values that have bit b, ascending."""
    values = range(1 << width)
    return np.array([[value for value in values if value >> bit & 1] for bit in range(width)], np.intp)
