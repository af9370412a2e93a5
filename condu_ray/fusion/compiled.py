"""The passes of `kernels` as machine code (numba): the same bits, a tile of coordinates at a time.

Loops have no branches and touch few arrays each, so that they become vector instructions; every tile stays in the
first cache. No fast math and no contraction: products and sums round as NumPy rounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from condu_ray.fusion.lanes import LANES, TASKS_AT_ONCE, WIDTH, add_masses, add_norms, elect

_TILE = 8192  # coordinates worked on at once; a multiple of 8, so that lanes go on from tile to tile
_ROWS = 32  # most rows in a tile


def _read(dtype: Any, dims: int) -> Any:
    return types.Array(dtype, dims, "C", readonly=True)


def _write(dtype: Any, dims: int) -> Any:
    return types.Array(dtype, dims, "C")


_BLOCKS = _read(types.int64, 2)  # see `Span.table`


@intrinsic
def _bytes_at(typing, address):  # type: ignore[no-untyped-def]
    """A pointer to bytes: planes lie apart, and machine code takes no list of arrays."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.CPointer(types.uint8)(types.int64), generate


def _compile(*signature: Any) -> Callable[[Any], Any]:
    """Compiles at once, and keeps the machine code for the next process where a folder for it can be written."""

    def decorate(function: Any) -> Any:
        options = {"nogil": True, "error_model": "numpy", "boundscheck": False, "fastmath": False}
        try:
            return numba.njit(types.void(*signature), cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written
            return numba.njit(types.void(*signature), **options)(function)

    return decorate


@numba.njit(inline="always")
def _spread(plane, words):  # type: ignore[no-untyped-def]
    """A bit plane as bytes, not 0 where the bit is set: a word for each eight bits."""
    for k in range(len(plane)):
        word = np.uint64(plane[k]) * np.uint64(0x0101010101010101)
        words[k] = word & np.uint64(0x8040201008040201)


@numba.njit(inline="always")
def _total(lanes):  # type: ignore[no-untyped-def]
    """Of eight lanes, in the order of `kernels.lane_sums`."""
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))


@_compile(
    _BLOCKS,
    _read(types.float32, 1),
    _read(types.float32, 1),
    _read(types.int64, 2),
    _read(types.int64, 2),
    _read(types.float32, 2),
    _write(types.float32, 1),
    _write(types.uint8, 1),
    _write(types.uint8, 1),
    types.Array(types.float64, 2, "A"),  # columns of a larger array
)
def fuse(table, u, delta, births, flipped, rescalers, out_u, birth, flips, sums):  # type: ignore[no-untyped-def]
    """`kernels.fuse_block` for the blocks of a span; see `kernels.fuse_span`."""
    tasks, sessions, stride = births.shape[1], flipped.shape[1], _TILE // LANES
    before = (tasks + TASKS_AT_ONCE - 1) // TASKS_AT_ONCE * TASKS_AT_ONCE
    after = tasks // TASKS_AT_ONCE * TASKS_AT_ONCE + TASKS_AT_ONCE
    alive, flip = np.zeros((after, stride), np.uint8), np.empty(stride, np.uint8)
    lost, live = np.empty(stride + 1, np.uint8), np.empty(stride + 2, np.uint8)
    wide, narrow = np.zeros(after), np.zeros(after, np.float32)
    sizes, old, new, result = np.empty((4, _TILE), np.float32)
    masses, norms = np.empty((_ROWS, after, LANES)), np.empty((_ROWS, LANES))
    born = alive[tasks]
    rescaling = (wide.ctypes.data, narrow.ctypes.data)
    for block in range(table.shape[0]):
        start, stop, rows = table[block, 0], table[block, 1], table[block, 2]
        length = (stop - start) // rows
        at_once = min(_ROWS, max(1, _TILE // length)) if length % WIDTH == 0 else 1  # rows of whole vectors share loops
        for first in range(0, rows, at_once):
            some = min(at_once, rows - first)
            masses[:some] = 0
            norms[:some] = 0
            begin = start + first * length
            end = begin + some * length
            for at in range(begin, end, _TILE):
                count = min(_TILE, end - at)
                rest, vectors, eights = count % WIDTH, (count + WIDTH - 1) // WIDTH, (count + 7) // 8
                head, byte = at % 8, at // 8
                size = (head + count + 7) // 8
                for k in range(size):
                    lost[k] = 0
                session = sessions - 1
                for task in range(tasks - 1, -1, -1):  # from the newest: what later sessions flipped is lost
                    while session >= 0 and flipped[0, session] > births[0, task]:
                        plane = numba.carray(_bytes_at(flipped[1, session] + byte), (size,))
                        for k in range(size):
                            lost[k] |= plane[k]
                        session -= 1
                    plane = numba.carray(_bytes_at(births[1, task] + byte), (size,))
                    own = alive[task]
                    if head == 0:
                        for k in range(eights):
                            own[k] = plane[k] & (lost[k] ^ np.uint8(255))
                    else:  # a row need not start at a whole byte
                        for k in range(size):
                            live[k] = plane[k] & (lost[k] ^ np.uint8(255))
                        live[size] = 0
                        for k in range(eights):
                            own[k] = (live[k] >> head) | (live[k + 1] << (8 - head))
                    own[eights - 1] &= np.uint8(255) >> (-count % 8)
                    own[eights : vectors * WIDTH // 8] = 0
                born[: vectors * WIDTH // 8] = 0

                u_at, delta_at, out_at = u.ctypes.data + 4 * at, delta.ctypes.data + 4 * at, out_u.ctypes.data + 4 * at
                if rest > 0:
                    old[count : vectors * WIDTH], new[count : vectors * WIDTH] = 0, 0
                    old[:count], new[:count] = u[at : at + count], delta[at : at + count]
                    u_at, delta_at, out_at = old.ctypes.data, new.ctypes.data, result.ctypes.data
                for row in range(some):
                    for task in range(tasks):
                        wide[task] = narrow[task] = rescalers[task, table[block, 4] + first + row]
                    bits, values = row * eights // some, row * eights // some * 32
                    planes = (born.ctypes.data + bits, flip.ctypes.data + bits)
                    written = (out_at + values, sizes.ctypes.data + values)
                    given = (u_at + values, delta_at + values)
                    elect(
                        vectors // some, before, alive.ctypes.data + bits, stride, *rescaling, *given, *written, *planes
                    )
                if rest > 0:
                    out_u[at : at + count] = result[:count]
                for task in range(tasks):
                    own = alive[task]
                    for k in range(eights):
                        own[k] &= flip[k] ^ np.uint8(255)
                for row in range(some):
                    bits, values = row * eights // some, row * eights // some * 32
                    own_sizes, own_masses = sizes.ctypes.data + values, masses[row].ctypes.data
                    add_masses(eights // some, after, alive.ctypes.data + bits, stride, own_sizes, own_masses)
                    add_norms(eights // some, delta_at + values, norms[row].ctypes.data)

                born_plane, flip_plane = birth[byte : byte + size], flips[byte : byte + size]
                if head == 0:
                    for k in range(eights):
                        born_plane[k] |= born[k]
                        flip_plane[k] |= flip[k]
                else:
                    for k in range(eights):
                        born_plane[k] |= born[k] << head
                        flip_plane[k] |= flip[k] << head
                    for k in range(size - 1):
                        born_plane[k + 1] |= born[k] >> (8 - head)
                        flip_plane[k + 1] |= flip[k] >> (8 - head)
            for row in range(some):
                slot = table[block, 3] + first + row
                for task in range(tasks + 1):
                    sums[task, slot] = _total(masses[row, task])
                sums[tasks + 1, slot] = _total(norms[row])


@_compile(_BLOCKS, _read(types.float32, 1), _write(types.float64, 1))
def norm(table, delta, sums):  # type: ignore[no-untyped-def]
    """`kernels.norm_span`."""
    lanes, rest = np.empty(LANES), np.zeros(LANES, np.float32)
    for block in range(table.shape[0]):
        start, rows = table[block, 0], table[block, 2]
        length = (table[block, 1] - start) // rows
        for row in range(rows):
            begin, end = start + row * length, start + (row + 1) * length
            lanes[:] = 0
            add_norms(length // LANES, delta.ctypes.data + 4 * begin, lanes.ctypes.data)
            rest[:] = 0
            for k in range(length % LANES):
                rest[k] = delta[end - length % LANES + k]
            add_norms(1, rest.ctypes.data, lanes.ctypes.data)
            sums[table[block, 3] + row] = _total(lanes)


@_compile(
    _BLOCKS,
    _read(types.float32, 1),
    _read(types.float64, 1),
    types.float64,
    _write(types.uint32, 1),
    _write(types.uint8, 1),
)
def add(table, delta, scales, largest, magnitudes, signs):  # type: ignore[no-untyped-def]
    """`kernels.add_span`."""
    words = np.empty(_TILE // 8 + 1, np.uint64)
    above = words.view(np.uint8)
    for block in range(table.shape[0]):
        start, rows = table[block, 0], table[block, 2]
        length = (table[block, 1] - start) // rows
        for row in range(rows):
            scale = scales[table[block, 4] + row]
            end = start + (row + 1) * length
            for at in range(start + row * length, end, _TILE):
                count = min(_TILE, end - at)
                head = at % 8
                size = (head + count + 7) // 8
                values, sums = delta[at : at + count], magnitudes[at : at + count]
                for k in range(count):
                    summand = min(np.rint(np.float64(abs(values[k])) * scale), largest)
                    sums[k] += np.uint32(np.int32(summand))
                words[0] = words[size - 1] = 0
                above_here = above[head:]
                for k in range(count):
                    above_here[k] = values[k] > 0
                plane = signs[at // 8 :]
                for k in range(size):
                    plane[k] |= np.uint8((words[k] * np.uint64(0x0102040810204080)) >> np.uint64(56))


@_compile(
    _BLOCKS,
    _read(types.float32, 1),
    _read(types.uint8, 1),
    _read(types.float32, 1),
    types.boolean,
    _write(types.float32, 1),
)
def restore(table, u, mask, rescalers, adding, out):  # type: ignore[no-untyped-def]
    """`kernels.restore_span`."""
    words = np.empty(_TILE // 8 + 1, np.uint64)
    bits = words.view(np.uint8)
    for block in range(table.shape[0]):
        start, rows = table[block, 0], table[block, 2]
        length = (table[block, 1] - start) // rows
        for row in range(rows):
            rescaler = rescalers[table[block, 4] + row]
            end = start + (row + 1) * length
            for at in range(start + row * length, end, _TILE):
                count = min(_TILE, end - at)
                head = at % 8
                _spread(mask[at // 8 : (at + count + 7) // 8], words)
                held, values, to = bits[head:], u[at : at + count], out[at : at + count]
                if adding:
                    for k in range(count):
                        to[k] += values[k] * rescaler if held[k] else np.float32(0)
                else:
                    for k in range(count):
                        to[k] = values[k] * rescaler if held[k] else np.float32(0)


@_compile(
    _BLOCKS,
    _read(types.uint32, 1),
    _read(types.float64, 1),
    _read(types.uint8, 1),
    _read(types.boolean, 1),
    _read(types.uint8, 1),
    _read(types.float32, 2),
    types.boolean,
    _write(types.float32, 1),
)
def restore_signed(  # type: ignore[no-untyped-def]
    table, magnitudes, factors, signs, second, large, levels, adding, out
):
    """`kernels.restore_signed_span`."""
    words, large_words = np.empty(_TILE // 8 + 1, np.uint64), np.empty(_TILE // 8 + 1, np.uint64)
    bits, large_bits = words.view(np.uint8), large_words.view(np.uint8)
    sizes = np.empty(_TILE, np.float32)
    for block in range(table.shape[0]):
        start, rows = table[block, 0], table[block, 2]
        length = (table[block, 1] - start) // rows
        for row in range(rows):
            group = table[block, 4] + row
            factor, smaller, larger = factors[group], levels[group, 0], levels[group, 1]
            end = start + (row + 1) * length
            for at in range(start + row * length, end, _TILE):
                count = min(_TILE, end - at)
                head = at % 8
                here = slice(at // 8, (at + count + 7) // 8)
                if second[group]:
                    _spread(large[here], large_words)
                    is_large = large_bits[head:]
                    for k in range(count):
                        sizes[k] = larger if is_large[k] else smaller
                else:
                    shared = magnitudes[at : at + count]
                    for k in range(count):
                        sizes[k] = np.float32(np.float64(shared[k]) * factor)
                _spread(signs[here], words)
                above, to = bits[head:], out[at : at + count]
                if adding:
                    for k in range(count):
                        to[k] += (sizes[k] if above[k] else -sizes[k]) + np.float32(0)
                else:
                    for k in range(count):
                        to[k] = (sizes[k] if above[k] else -sizes[k]) + np.float32(0)
