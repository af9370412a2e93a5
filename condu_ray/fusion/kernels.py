"""The one pass over a block: elect, choose, flip, sum (our reconstruction of ConDU's unifying step as one pass).

All old values at a coordinate are u times a rescaler, so they share the sign of u, and a byte of mask bits is all that
has to be looked at: one table gives the sum of the rescalers of its bits, another their maximum. The masks are packed:
bit `t % 8` of packed[t // 8, j] belongs to task number t.

What is here defines the bits. A vector of `COMPILED_FROM` coordinates or more is worth machine code, which `compiled`
makes from the same steps, and which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from condu_ray.fusion.groups import Block, Span
from condu_ray.fusion.layout import Layout
from condu_ray.fusion.planes import Planes, read_bits, write_bits
from condu_ray.fusion.planes import packed as packed_masks

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bits = NDArray[np.bool_]
Packed = NDArray[np.uint8]

COMPILED_FROM = 1 << 24
"""Length of a vector from which the compiled loops are used: compiling them takes 8 s once, loading half a second, and
below that length NumPy takes less than a second."""

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

        delta = np.require(delta, requirements=["C", "A"])
        births, flips = planes.places()
        for places in (births, flips):
            places[1] += span.start // 8
        out = (written.u, written.birth, written.flips, written.sums)
        compiled.fuse(span.table(), u, delta, births, flips, rescalers, *out)
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
    for block, here, own in _places(span):
        values = delta[here].reshape(block.rows, block.row_length)
        summand = np.minimum(np.rint(np.abs(values) * scales[own, None]), largest)
        magnitudes[here] += summand.astype(np.uint32).reshape(-1)
        write_bits(signs, here.start, delta[here] > 0)


def restore_span(layout: Layout, span: Span, u: F32, mask: Packed, rescalers: F32, out: F32, adding: bool) -> None:
    """A task's reconstruction on a span: rescaler * u where the mask bit is set, else +0; padding stays as it is.

    u, out: f32[n]. mask: uint8[n / 8]. rescalers: f32[G], of the whole layout. adding: add to what stands in out.
    """
    if layout.total >= COMPILED_FROM:
        from condu_ray.fusion import compiled

        compiled.restore(span.table(), u, mask, rescalers, adding, out)
        return
    for block, here, own in _places(span):
        value = (u[here].reshape(block.rows, block.row_length) * rescalers[own, None]).reshape(-1)
        value.view(np.int32)[:] &= -read_bits(mask, here.start, here.stop).astype(np.int32)  # all ones or all zeros
        _put(out, here, value, adding)


@dataclass(frozen=True)
class Levels:
    """Which groups have a second bit (bool[G]), the bits (uint8[n / 8], or none where no group of the span has one),
    and f32[G, 2]: what a small and a large value is."""

    groups: Bits
    large: Packed
    values: F32


def restore_signed_span(
    layout: Layout,
    span: Span,
    magnitudes: NDArray[np.uint32],
    factors: F64,
    signs: Packed,
    levels: Levels,
    out: F32,
    adding: bool,
) -> None:
    """A task's reconstruction on a span: factor * magnitude, or a level, with the task's sign; no -0.0.

    magnitudes: uint32[n]. factors: f64[G], of the whole layout. signs: uint8[n / 8]. out, adding: see `restore_span`.
    """
    if layout.total >= COMPILED_FROM:
        from condu_ray.fusion import compiled

        second = (levels.groups, levels.large, levels.values)
        compiled.restore_signed(span.table(), magnitudes, factors, signs, *second, adding, out)
        return
    for block, here, own in _places(span):
        value = np.empty((block.rows, block.row_length), np.float32)
        shared = magnitudes[here].reshape(value.shape)
        np.multiply(shared, factors[own, None], out=value, casting="same_kind")
        rows = levels.groups[own]
        if rows.any():
            bits = read_bits(levels.large, here.start, here.stop).reshape(value.shape)[rows]
            smaller, larger = levels.values[own][rows].T[:, :, None]
            value[rows] = np.where(bits, larger, smaller)
        below = read_bits(signs, here.start, here.stop) ^ np.uint8(1)
        flat = value.reshape(-1)
        flat.view(np.uint32)[:] ^= below.astype(np.uint32) << np.uint32(31)
        flat += np.float32(0)  # -0.0 becomes +0.0
        _put(out, here, flat, adding)


def _places(span: Span) -> Iterator[tuple[Block, slice, slice]]:
    """Each block, its coordinates counted from the span's start, and its rescalers."""
    for block in span.blocks:
        here = slice(block.start - span.start, block.stop - span.start)
        yield block, here, slice(block.rescalers, block.rescalers + block.rows)


def _put(out: F32, here: slice, value: F32, adding: bool) -> None:
    if adding:
        out[here] += value
    else:
        out[here] = value


def _fuse_blocks(span: Span, u: F32, delta: F32, masks: Packed, rescalers: F32, written: Written) -> None:
    at = 0
    for block, here, own in _places(span):
        start, stop = here.start, here.stop
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
    return Fused(born, flipped, np.vstack([masses(block, out_packed, weights, tasks + 1), norm]))


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


def masses(block: Block, packed: Packed, weights: F64, tasks: int) -> F64:
    """Sum of weights over each task's set bits, f64[tasks, rows], by `lane_sums`."""
    every, held = np.empty((tasks, block.rows)), np.empty_like(weights)
    for task in range(tasks):
        bits = (packed[task // 8] >> np.uint8(task % 8)) & np.uint8(1)
        with np.errstate(invalid="ignore"):  # an infinite weight shows in the norm; the other sums mean nothing then
            np.multiply(weights, bits, out=held)
        every[task] = lane_sums(block, held)
    return every


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
