"""The ordered list of fused tensors, and the one flat float32 vector they share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from condu_ray.errors import FusionError

ALIGN = 64
"""Every tensor starts at a multiple of this many coordinates, so that no two tensors share a byte of a bit plane."""

_CHUNK = 1 << 20


class ArrayLike(Protocol):
    """A NumPy array, a torch tensor, or anything else with a shape and a floating dtype."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class Entry:
    """One fused tensor: its coordinates are [offset, offset + size) of the flat vector, in C order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int

    @property
    def stop(self) -> int:
        return self.offset + self.size

    @property
    def rows(self) -> int:
        """Length of dim 0; a tensor of 0 or 1 dimensions is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_length(self) -> int:
        return self.size // self.rows


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the flat vector. total: length of the vector with padding, a multiple of 64."""

    entries: tuple[Entry, ...]
    total: int

    def __post_init__(self) -> None:
        if not self.entries:
            raise FusionError("a layout needs at least one tensor (found none)")
        expected = 0
        names = set()
        for entry in self.entries:
            if entry.name in names:
                raise FusionError(f"layout: tensor {entry.name!r} stands in it twice")
            if entry.size < 1 or entry.size != math.prod(entry.shape):
                raise FusionError(
                    f"layout: tensor {entry.name!r} has shape {entry.shape} and size {entry.size}",
                    "leave tensors without elements out of the layout",
                )
            if entry.offset != expected:
                raise FusionError(f"layout: tensor {entry.name!r} starts at {entry.offset}, expected {expected}")
            names.add(entry.name)
            expected = _aligned(entry.stop)
        if self.total != expected:
            raise FusionError(f"layout: total is {self.total}, its tensors end at {expected}")

    @classmethod
    def of(cls, tensors: Mapping[str, ArrayLike]) -> Layout:
        """The layout of these tensors, in the mapping's order.

        tensors: floating dtypes only, at least one element each; otherwise FusionError, naming the tensor.
        """
        entries: list[Entry] = []
        end = 0
        for name, tensor in tensors.items():
            shape = tuple(int(length) for length in tensor.shape)
            dtype = str(tensor.dtype).removeprefix("torch.")
            if "float" not in dtype:
                raise FusionError(
                    f"tensor {name!r} has dtype {dtype}, only floating tensors are fused", "leave it out of the layout"
                )
            entry = Entry(str(name), shape, dtype, end, math.prod(shape))
            entries.append(entry)
            end = _aligned(entry.stop)
        return cls(tuple(entries), end)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """int64[tensors + 1]: the rows of tensor n are rows[n] .. rows[n + 1] - 1, counted over the whole layout."""
        return np.concatenate([[0], np.cumsum([entry.rows for entry in self.entries])]).astype(np.int64)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64[tensors]: where each tensor starts."""
        return np.array([entry.offset for entry in self.entries], np.int64)

    @property
    def parameters(self) -> int:
        """Coordinates without padding."""
        return sum(entry.size for entry in self.entries)

    def flatten(self, tensors: Mapping[str, ArrayLike]) -> NDArray[np.float32]:
        """Copies the tensors (any order, any floating dtype, any strides) into one f32[total]; padding is zero.

        Raises FusionError naming the first tensor that is missing, unknown, of another shape, or not finite in float32.
        """
        for entry in self.entries:
            if entry.name not in tensors:
                raise FusionError(f"tensor {entry.name!r} is missing", "give every tensor of the layout")
            shape = tuple(int(length) for length in tensors[entry.name].shape)
            if shape != entry.shape:
                raise FusionError(f"tensor {entry.name!r} has shape {shape}, the layout has {entry.shape}")
        if len(tensors) > len(self.entries):
            known = {entry.name for entry in self.entries}
            extra = next(name for name in tensors if name not in known)
            raise FusionError(f"tensor {extra!r} is not in the layout", "give only the tensors of the layout")
        vector = np.zeros(self.total, np.float32)
        for entry in self.entries:
            vector[entry.offset : entry.stop] = as_f32(tensors[entry.name]).reshape(-1)
            for start in range(entry.offset, entry.stop, _CHUNK):
                if not np.isfinite(vector[start : min(start + _CHUNK, entry.stop)]).all():
                    raise not_finite(entry)
        return vector

    def views(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The tensors inside a flat vector, shaped, without a copy. vector: [total], of any dtype."""
        if vector.shape != (self.total,):
            raise FusionError(f"the vector has shape {vector.shape}, the layout needs ({self.total},)")
        return {entry.name: vector[entry.offset : entry.stop].reshape(entry.shape) for entry in self.entries}

    def to_json(self) -> str:
        """The layout as JSON text; equal layouts give equal text."""
        rows = [{"name": e.name, "shape": list(e.shape), "dtype": e.dtype, "offset": e.offset} for e in self.entries]
        return json.dumps({"entries": rows, "total": self.total}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> Layout:
        """The layout that `to_json` wrote; its parsed form is taken too. Raises FusionError where it is not one."""
        try:
            data = json.loads(text) if isinstance(text, str | bytes) else text
            rows = [(e["name"], tuple(e["shape"]), e["dtype"], e["offset"]) for e in data["entries"]]
            return cls(tuple(Entry(*row, math.prod(row[1])) for row in rows), data["total"])
        except (KeyError, TypeError, ValueError) as error:
            raise FusionError(f"this is not a layout ({type(error).__name__}: {error})") from error

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the JSON text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def as_f32(value: Any) -> NDArray[np.float32]:
    """A float32 array of the same shape: NumPy arrays and torch tensors (any device, half precision, any strides)."""
    if hasattr(value, "detach"):
        import torch  # only a caller that holds torch tensors pays for it

        return np.asarray(value.detach().to("cpu", torch.float32).numpy())
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes Inf, which the callers refuse by name
        return np.asarray(value).astype(np.float32, copy=False)


def not_finite(entry: Entry) -> FusionError:
    return FusionError(
        f"the delta of tensor {entry.name!r} is not finite (NaN, infinite or beyond float32)",
        "train with a lower learning rate or in full precision",
    )


def _aligned(stop: int) -> int:
    return -(-stop // ALIGN) * ALIGN
