"""Bit planes: one bit a coordinate, least significant bit first; and how few bytes a plane with few bits needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError

Plane = NDArray[np.uint8]
"""uint8[total / 8]: one bit a coordinate, least significant bit first."""

_WORTH = 0.75  # a packed plane has to be at most this share of the plain one


def write_bits(plane: Plane, start: int, bits: NDArray[np.bool_]) -> None:
    """Sets bits from coordinate `start` on, in a plane that is still 0 there; rows need not start at a whole byte."""
    before = start % 8
    if before:
        bits = np.concatenate([np.zeros(before, np.bool_), bits])
    packed = np.packbits(bits, bitorder="little")
    plane[start // 8 : start // 8 + packed.size] |= packed


def read_bits(plane: Plane, start: int, stop: int) -> NDArray[np.uint8]:
    """uint8[stop - start], 0 or 1; rows need not start at a whole byte."""
    bits = np.unpackbits(plane[start // 8 : -(-stop // 8)], bitorder="little")
    return bits[start % 8 : start % 8 + stop - start]


@dataclass(frozen=True, eq=False)
class Planes:
    """What the masks of all tasks are made of.

    births: (session, mask bits after that session), in the order learned. flips: session -> bits that all tasks before
    it lost in it.
    """

    births: Sequence[tuple[int, Plane]]
    flips: Mapping[int, Plane]

    def masks(self, part: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Bytes `part` (a slice, or the places of some bytes) of the masks now, uint8[T, bytes]."""
        size = part.stop - part.start if isinstance(part, slice) else len(part)
        found, lost = np.empty((len(self.births), size), np.uint8), np.zeros(size, np.uint8)
        later = sorted(self.flips)
        for position in range(len(self.births) - 1, -1, -1):
            since, birth = self.births[position]
            while later and later[-1] > since:
                np.bitwise_or(lost, self.flips[later.pop()][part], out=lost)
            np.bitwise_and(birth[part], ~lost, out=found[position])
        return found

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """int64[2, T] and int64[2, F]: session and address of each birth, and of all flips, ascending."""
        births = [(since, _address(plane)) for since, plane in self.births]
        flips = [(session, _address(self.flips[session])) for session in sorted(self.flips)]
        first, second = (np.array(each, np.int64).reshape(-1, 2).T.copy() for each in (births, flips))
        return first, second


def _address(plane: Plane) -> int:
    assert plane.flags.c_contiguous, "a plane is in one piece"
    return int(plane.ctypes.data)


def packed(planes: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.uint8]:
    """uint8[ceil(T / 8), stop - start]: bit t % 8 of row t // 8 is that of planes[t], for eight tasks in a byte."""
    found = np.zeros((-(-len(planes) // 8), stop - start), np.uint8)
    for position, plane in enumerate(planes):
        found[position // 8] |= read_bits(plane, start, stop) << np.uint8(position % 8)
    return found


def shrink(plane: Plane) -> dict[str, NDArray[np.uint8]]:
    """The plane as arrays to store: as it is, or, where that is smaller, its bytes that are not 0 and where they are.

    The same plane always gives the same arrays, with any release of any compressor, so that a session that is repeated
    writes the same bytes.
    """
    there = plane != 0
    where, values = np.packbits(there, bitorder="little"), plane[there]
    if where.nbytes + values.nbytes > _WORTH * plane.nbytes:
        return {"flips": plane}
    return {"where": where, "values": values}


def grow(name: str, arrays: Mapping[str, NDArray[Any]], size: int) -> Plane:
    """The plane that `shrink` was given, uint8[size]. Raises FusionError, naming the object, where it does not fit."""
    if "where" not in arrays:
        raise FusionError(f"object {name!r} with array 'where' is missing")
    where, values = arrays["where"], arrays.get("values")
    if where.dtype != np.uint8 or where.shape != (-(-size // 8),) or values is None or values.dtype != np.uint8:
        raise FusionError(f"object {name!r}: its packed bits do not fit a plane of {size} bytes")
    there = np.unpackbits(where, count=size, bitorder="little").view(np.bool_)
    if values.shape != (np.count_nonzero(there),):
        raise FusionError(f"object {name!r}: {values.size} packed bytes for {np.count_nonzero(there)} places")
    plane = np.zeros(size, np.uint8)
    plane[there] = values
    return plane
