"""safetensors, written with the same bytes for the same arrays, and read without a copy.

The layout is the public one (8 bytes of header length, JSON, data), so any safetensors reader opens the files. Two
things are fixed here that the format leaves open: the header is sorted JSON, and the data starts at a multiple of 64
bytes, so that a mapped array is aligned for any kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from condu_ray.errors import StoreError

if TYPE_CHECKING:
    import numpy as np

_ALIGN = 64
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_CODES = {text: code for code, text in _NUMPY.items()}


def pieces(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[Any]:
    """Yields the bytes of a safetensors file piece by piece (buffers; no copy of arrays that are contiguous).

    arrays: any shape, bool, integers or float16/32/64, any byte order. Raises StoreError for another dtype.
    """
    import numpy as np

    entries: list[tuple[int, str, str]] = []
    for name, array in arrays.items():
        code = _CODES.get(array.dtype.newbyteorder("<").str)
        if code is None or name == "__metadata__":
            what = f"dtype {array.dtype}" if code is None else "a reserved name"
            raise StoreError(f"array {name!r} has {what}, which a store does not hold")
        entries.append((-array.dtype.itemsize, name, code))
    entries.sort()  # wide types first: every array starts at a multiple of its item size
    header: dict[str, Any] = {}
    offset = 0
    for _, name, code in entries:
        array = arrays[name]
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    yield len(text).to_bytes(8, "little") + text
    for _, name, code in entries:
        array = arrays[name]
        if array.size:
            little = np.asarray(array, dtype=np.dtype(_NUMPY[code]), order="C")
            yield little.reshape(-1).view(np.uint8).data


def _header(buffer: Any, where: str) -> tuple[dict[str, Any], int]:
    size = len(buffer)
    length = int.from_bytes(buffer[:8], "little") if size >= 8 else -1
    if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
        raise StoreError(f"{where} is not a safetensors file")
    try:
        header = json.loads(bytes(buffer[8 : 8 + length]))
    except ValueError as error:
        raise StoreError(f"{where} is not a safetensors file ({error})") from error
    if not isinstance(header, dict):
        raise StoreError(f"{where} is not a safetensors file")
    return header, 8 + length


def read(buffer: Any, where: str) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the arrays in a buffer (bytes or a read-only map), as read-only views of it; `where` is for errors.

    Raises StoreError if the header does not fit the buffer or holds a dtype that NumPy lacks.
    """
    import numpy as np

    header, start = _header(buffer, where)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for name in sorted(header.keys() - {"__metadata__"}):
        try:
            entry = header[name]
            dtype = np.dtype(_NUMPY[entry["dtype"]])
            shape = tuple(int(side) for side in entry["shape"])
            begin, end = (int(edge) for edge in entry["data_offsets"])
            count = math.prod(shape)
            if min((0, *shape)) < 0 or begin < 0 or end - begin != count * dtype.itemsize or start + end > len(buffer):
                raise ValueError("shape and offsets do not fit")
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{where}: array {name!r} cannot be read ({error!r})") from error
        if count:
            flat = np.frombuffer(buffer, dtype=dtype, count=count, offset=start + begin)
        else:
            flat = np.empty(0, dtype=dtype)
        arrays[name] = flat.reshape(shape)
        arrays[name].flags.writeable = False
    return arrays
