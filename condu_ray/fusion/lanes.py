"""Sixteen coordinates at a time, written as LLVM vectors for `compiled`: no loop of Python's becomes them by itself.

Two bytes of a bit plane are sixteen yes or no as they stand. Everything is an address, and what is read and written
must be a whole number of vectors long. Nothing here may be contracted or reordered: no fast math.

Numba's cache of machine code looks at compiled.py alone: after a change here, touch that file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Parts of a sum, as in `kernels.lane_sums`: which a coordinate is added to follows from its place in the row alone."""

WIDTH = 16
"""Coordinates in one vector of machine code."""

TASKS_AT_ONCE = 4
"""Tasks are worked on so many at a time: the number of planes is padded to it, with planes of zeros."""

_BYTE, _INDEX, _FLOAT, _DOUBLE = ir.IntType(8), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_MASK = ir.IntType(WIDTH)
_FLOATS, _DOUBLES, _BITS = (ir.VectorType(each, WIDTH) for each in (_FLOAT, _DOUBLE, ir.IntType(1)))
_HALF, _SUMS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_DOUBLE, LANES)


class _Vectors:
    """The few operations that the loops need, on an LLVM builder."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, address: Any, kind: Any, index: Any) -> Any:
        """A pointer to the `index`-th `kind` from an address on."""
        base = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.gep(base, [index])

    def load(self, address: Any, kind: Any, index: Any) -> Any:
        return self.builder.load(self.at(address, kind, index), align=_alignment(kind))

    def store(self, value: Any, address: Any, index: Any) -> None:
        self.builder.store(value, self.at(address, value.type, index), align=_alignment(value.type))

    def splat(self, value: Any) -> Any:
        one = self.builder.insert_element(ir.VectorType(value.type, WIDTH)(ir.Undefined), value, ir.IntType(32)(0))
        zeros = ir.VectorType(ir.IntType(32), WIDTH)(None)
        return self.builder.shuffle_vector(one, one, zeros)

    def bits(self, mask: Any) -> Any:
        return self.builder.bitcast(mask, ir.VectorType(ir.IntType(1), mask.type.width))

    def mask(self, bits: Any) -> Any:
        return self.builder.bitcast(bits, _MASK)

    def size_of(self, values: Any) -> Any:
        """|x|, of f32 lanes."""
        kind, name = ir.FunctionType(values.type, [values.type]), f"llvm.fabs.v{values.type.count}f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [values])

    def larger(self, one: Any, other: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered(">", other, one), other, one)

    def wide(self, values: Any) -> Any:
        return self.builder.fpext(values, ir.VectorType(_DOUBLE, values.type.count))

    def kept(self, value: Any) -> Any:
        """A variable that starts as `value`."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place

    @contextmanager
    def each(self, count: Any) -> Iterator[Any]:
        with cgutils.for_range(self.builder, count, intp=_INDEX) as loop:
            yield loop.index


def _alignment(kind: Any) -> int:
    """Bytes: that of one element, since rows start anywhere."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return {_FLOAT: 4, _DOUBLE: 8}.get(element, 1)


@intrinsic
def elect(typing, vectors, tasks, alive, stride, sums, maxima, u, delta, out, sizes, born, flips):  # type: ignore[no-untyped-def]
    """One step of `kernels.fuse_block`: u', |u'|, birth bits and flip bits of so many vectors of coordinates.

    tasks: a multiple of TASKS_AT_ONCE. alive: uint8[tasks, stride]. sums, maxima: f64 and f32[tasks], both the
    rescalers, not negative. u, delta, out, sizes: f32. born, flips: uint8.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        vectors, tasks, alive, stride, sums, maxima, u, delta, out, sizes, born, flips = arguments
        v = _Vectors(builder)
        fours, zero = builder.udiv(tasks, _INDEX(TASKS_AT_ONCE)), _FLOATS(None)
        with v.each(vectors) as k:
            share, group = v.kept(_DOUBLES(None)), v.kept(_DOUBLES(None))
            largest, held = v.kept(zero), v.kept(_MASK(0))
            with v.each(fours) as four:
                for one in range(TASKS_AT_ONCE):
                    task = builder.add(builder.mul(four, _INDEX(TASKS_AT_ONCE)), _INDEX(one))
                    mask = v.load(builder.add(alive, builder.mul(task, stride)), _MASK, k)
                    bits, before = v.bits(mask), builder.load(group)
                    more = builder.fadd(before, v.splat(v.load(sums, _DOUBLE, task)))
                    builder.store(builder.select(bits, more, before), group)
                    most = builder.load(largest)
                    other = v.larger(most, v.splat(v.load(maxima, _FLOAT, task)))
                    builder.store(builder.select(bits, other, most), largest)  # one instruction, under a mask
                    builder.store(builder.or_(builder.load(held), mask), held)
                # eight tasks are summed, ascending, before they join the sum
                odd = builder.trunc(four, ir.IntType(1))
                last = builder.icmp_unsigned("==", builder.add(four, _INDEX(1)), fours)
                with builder.if_then(builder.or_(odd, last)):
                    builder.store(builder.fadd(builder.load(share), builder.load(group)), share)
                    builder.store(_DOUBLES(None), group)
            old, new = v.load(u, _FLOATS, k), v.load(delta, _FLOATS, k)
            drawn = builder.fadd(builder.fmul(builder.load(share), v.wide(old)), v.wide(new))
            positive = builder.fcmp_ordered(">", drawn, _DOUBLES(None))
            agrees = builder.not_(builder.xor(builder.fcmp_ordered(">", new, zero), positive))
            is_born = builder.and_(agrees, builder.fcmp_unordered("!=", new, zero))
            against = builder.not_(builder.xor(builder.fcmp_ordered("<", old, zero), positive))
            theirs = builder.fmul(builder.load(largest), v.size_of(old))
            size = v.larger(theirs, builder.select(is_born, v.size_of(new), zero))
            signed = builder.select(positive, size, builder.fneg(size))
            v.store(builder.fadd(signed, zero), out, k)  # -0.0 becomes +0.0
            v.store(size, sizes, k)
            v.store(v.mask(is_born), born, k)
            v.store(builder.and_(v.mask(against), builder.load(held)), flips, k)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12), generate


@intrinsic
def add_masses(typing, eights, tasks, alive, stride, sizes, sums):  # type: ignore[no-untyped-def]
    """sums[task, lane] += sizes where the task's bit is set, one after the other. sizes: f32. sums: f64[tasks, LANES].

    eights: times LANES coordinates.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        eights, tasks, alive, stride, sizes, sums = arguments
        v = _Vectors(builder)
        with v.each(builder.udiv(tasks, _INDEX(TASKS_AT_ONCE))) as four:
            first = builder.mul(four, _INDEX(TASKS_AT_ONCE))
            own = [builder.add(first, _INDEX(one)) for one in range(TASKS_AT_ONCE)]
            lanes = [v.kept(v.load(sums, _SUMS, task)) for task in own]
            planes = [builder.add(alive, builder.mul(task, stride)) for task in own]
            with v.each(eights) as k:
                size = v.wide(v.load(sizes, _HALF, k))
                for plane, lane in zip(planes, lanes, strict=True):
                    before = builder.load(lane)
                    more = builder.fadd(before, size)
                    builder.store(builder.select(v.bits(v.load(plane, _BYTE, k)), more, before), lane)
            for task, lane in zip(own, lanes, strict=True):
                v.store(builder.load(lane), sums, task)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def add_norms(typing, eights, values, sums):  # type: ignore[no-untyped-def]
    """sums[lane] += |values|, one after the other. values: f32. sums: f64[LANES]. eights: see `add_masses`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        eights, values, sums = arguments
        v = _Vectors(builder)
        lane = v.kept(v.load(sums, _SUMS, _INDEX(0)))
        with v.each(eights) as k:
            size = v.wide(v.size_of(v.load(values, _HALF, k)))
            builder.store(builder.fadd(builder.load(lane), size), lane)
        v.store(builder.load(lane), sums, _INDEX(0))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
