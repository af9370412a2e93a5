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

_TILE = 2048  # coordinates worked on at once; a multiple of 8, so that lanes go on from tile to tile


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


@_compile(
    _BLOCKS,
    _read(types.float32, 1),
    _read(types.float32, 1),
    _read(types.int64, 2),
    _read(types.int64, 2),
    _read(types.float32, 2),
    types.boolean,
    _write(types.float32, 1),
    _write(types.uint8, 1),
    _write(types.uint8, 1),
    types.Array(types.float64, 2, "A"),  # columns of a larger array
)
def fuse(table, u, delta, births, flipped, rescalers, per_row, out_u, birth, flips, sums):  # type: ignore[no-untyped-def]
    """`kernels.fuse_block` for the blocks of a span; see `kernels.fuse_span`."""
    tasks, sessions = births.shape[1], flipped.shape[1]
    groups, after = (tasks + 7) // 8, tasks // 8 + 1
    width = 4 if per_row else 8
    entries, parts = 1 << width, (tasks + width) // width
    words = np.empty((after, _TILE // 8 + 1), np.uint64)
    codes = words.view(np.uint8)
    share, largest, result = np.empty(_TILE), np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    born_words, flip_words = np.empty(_TILE // 8 + 1, np.uint64), np.empty(_TILE // 8 + 1, np.uint64)
    born, flip, held = born_words.view(np.uint8), flip_words.view(np.uint8), np.empty(_TILE, np.uint8)
    stable, mtable = np.zeros((max(groups, 1), 256)), np.zeros((max(groups, 1), 256), np.float32)
    bins = np.empty((parts, 4 * entries))
    chosen, lost = np.empty(entries), np.empty(_TILE // 8 + 1, np.uint8)
    last_bit = np.uint8(tasks % 8)
    for block in range(table.shape[0]):
        start, stop, rows = table[block, 0], table[block, 1], table[block, 2]
        length = (stop - start) // rows
        for row in range(rows):
            rescaler, slot = table[block, 4] + row, table[block, 3] + row
            for task in range(tasks):
                half = 1 << (task % 8)
                value = rescalers[task, rescaler]
                sums_of, max_of = stable[task // 8], mtable[task // 8]
                for entry in range(half):
                    sums_of[half + entry] = sums_of[entry] + value
                    max_of[half + entry] = max(max_of[entry], value)
            bins[:] = 0
            n0 = n1 = n2 = n3 = n4 = n5 = n6 = n7 = 0.0
            begin = start + row * length
            end = begin + length
            for at in range(begin, end, _TILE):
                count = min(_TILE, end - at)
                head = at % 8
                byte, size = at // 8, (head + count + 7) // 8

                for group in range(after):
                    for k in range(size):
                        words[group, k] = 0
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
                    shift = np.uint64(8 * (task % 8))
                    word = words[task // 8]
                    for k in range(size):
                        word[k] |= np.uint64(plane[k] & (lost[k] ^ np.uint8(255))) << shift
                for group in range(after):
                    word = words[group]
                    for k in range(size):  # 8 x 8 bits: from a byte a task to a byte a coordinate
                        x = word[k]
                        t = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
                        x = x ^ t ^ (t << np.uint64(7))
                        t = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
                        x = x ^ t ^ (t << np.uint64(14))
                        t = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
                        word[k] = x ^ t ^ (t << np.uint64(28))

                code = codes[0, head:]
                sums_of, max_of = stable[0], mtable[0]
                for k in range(count):
                    share[k] = sums_of[code[k]]
                    largest[k] = max_of[code[k]]
                    held[k] = code[k]
                for group in range(1, groups):
                    code = codes[group, head:]
                    sums_of, max_of = stable[group], mtable[group]
                    for k in range(count):
                        share[k] += sums_of[code[k]]
                        largest[k] = max(largest[k], max_of[code[k]])
                        held[k] |= code[k]

                born_words[0] = flip_words[0] = 0
                born_words[size - 1] = flip_words[size - 1] = 0
                born_here, flip_here = born[head:], flip[head:]
                old, new, out = u[at : at + count], delta[at : at + count], out_u[at : at + count]
                for k in range(count):
                    d, v = new[k], old[k]
                    positive = share[k] * np.float64(v) + np.float64(d) > 0
                    is_born = ((d > 0) == positive) & (d != 0)
                    born_here[k] = is_born
                    flip_here[k] = (held[k] != 0) & ((v < 0) == positive)
                    magnitude = max(largest[k] * abs(v), abs(d) if is_born else np.float32(0))
                    share[k] = magnitude
                    result[k] = (magnitude if positive else -magnitude) + np.float32(0)
                out[:] = result[:count]

                for group in range(after):
                    code = codes[group, head:]
                    for k in range(count):
                        code[k] &= flip_here[k] - np.uint8(1)
                code = codes[after - 1, head:]
                for k in range(count):
                    code[k] |= born_here[k] << last_bit

                for part in range(parts):
                    sums_in = bins[part]
                    if per_row:
                        code = codes[part // 2, head:]
                        nibble = np.uint8(4 * (part % 2))
                        for k in range(count):
                            sums_in[4 * ((code[k] >> nibble) & 15) + k % 4] += share[k]
                    else:
                        code = codes[part, head:]
                        for k in range(count):
                            sums_in[4 * np.int64(code[k]) + k % 4] += share[k]

                whole = count // 8 * 8
                for k in range(0, whole, 8):
                    n0 += abs(np.float64(new[k]))
                    n1 += abs(np.float64(new[k + 1]))
                    n2 += abs(np.float64(new[k + 2]))
                    n3 += abs(np.float64(new[k + 3]))
                    n4 += abs(np.float64(new[k + 4]))
                    n5 += abs(np.float64(new[k + 5]))
                    n6 += abs(np.float64(new[k + 6]))
                    n7 += abs(np.float64(new[k + 7]))
                rest = count - whole
                n0 += abs(np.float64(new[whole])) if rest > 0 else 0.0
                n1 += abs(np.float64(new[whole + 1])) if rest > 1 else 0.0
                n2 += abs(np.float64(new[whole + 2])) if rest > 2 else 0.0
                n3 += abs(np.float64(new[whole + 3])) if rest > 3 else 0.0
                n4 += abs(np.float64(new[whole + 4])) if rest > 4 else 0.0
                n5 += abs(np.float64(new[whole + 5])) if rest > 5 else 0.0
                n6 += abs(np.float64(new[whole + 6])) if rest > 6 else 0.0

                born_plane, flip_plane = birth[at // 8 :], flips[at // 8 :]
                for k in range(size):  # a row need not start at a whole byte
                    born_plane[k] |= np.uint8((born_words[k] * np.uint64(0x0102040810204080)) >> np.uint64(56))
                for k in range(size):
                    flip_plane[k] |= np.uint8((flip_words[k] * np.uint64(0x0102040810204080)) >> np.uint64(56))

            for part in range(parts):
                sums_in = bins[part]
                for entry in range(entries):
                    lane = 4 * entry
                    chosen[entry] = (sums_in[lane] + sums_in[lane + 1]) + (sums_in[lane + 2] + sums_in[lane + 3])
                for bit in range(min(width, tasks + 1 - part * width)):
                    total = 0.0
                    for entry in range(entries):
                        if entry >> bit & 1:
                            total += chosen[entry]
                    sums[part * width + bit, slot] = total
            sums[tasks + 1, slot] = ((n0 + n1) + (n2 + n3)) + ((n4 + n5) + (n6 + n7))


@_compile(_BLOCKS, _read(types.float32, 1), _write(types.float64, 1))
def norm(table, delta, sums):  # type: ignore[no-untyped-def]
    """`kernels.norm_span`."""
    for block in range(table.shape[0]):
        start, rows = table[block, 0], table[block, 2]
        length = (table[block, 1] - start) // rows
        for row in range(rows):
            values = delta[start + row * length : start + (row + 1) * length]
            n0 = n1 = n2 = n3 = n4 = n5 = n6 = n7 = 0.0
            whole = length // 8 * 8
            for k in range(0, whole, 8):
                n0 += abs(np.float64(values[k]))
                n1 += abs(np.float64(values[k + 1]))
                n2 += abs(np.float64(values[k + 2]))
                n3 += abs(np.float64(values[k + 3]))
                n4 += abs(np.float64(values[k + 4]))
                n5 += abs(np.float64(values[k + 5]))
                n6 += abs(np.float64(values[k + 6]))
                n7 += abs(np.float64(values[k + 7]))
            rest = length - whole
            n0 += abs(np.float64(values[whole])) if rest > 0 else 0.0
            n1 += abs(np.float64(values[whole + 1])) if rest > 1 else 0.0
            n2 += abs(np.float64(values[whole + 2])) if rest > 2 else 0.0
            n3 += abs(np.float64(values[whole + 3])) if rest > 3 else 0.0
            n4 += abs(np.float64(values[whole + 4])) if rest > 4 else 0.0
            n5 += abs(np.float64(values[whole + 5])) if rest > 5 else 0.0
            n6 += abs(np.float64(values[whole + 6])) if rest > 6 else 0.0
            sums[table[block, 3] + row] = ((n0 + n1) + (n2 + n3)) + ((n4 + n5) + (n6 + n7))


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
