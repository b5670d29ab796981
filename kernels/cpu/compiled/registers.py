"""Loops over registers of eight numbers, for the compiled CPU kernels: what Numba has no words for.

Numba has no vector types. The few loops that must run in registers are written in LLVM's own terms by the functions
named ``_build_*``; to compiled code each is a function of addresses, counts and leading dimensions, all int64.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from lightning_lip.kernels.cpu.layout import MAX_BLOCK_SIZE

_F = TypeVar("_F", bound=Callable[..., Any])
_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_I64 = NDArray[np.int64]


def sources_checksum() -> int:
    """Return a checksum of the sources of everything that is compiled: a part of the keys of Numba's cache."""
    here = Path(__file__).parent
    return zlib.crc32(b"".join(path.read_bytes() for path in [here.parent / "layout.py", *sorted(here.glob("*.py"))]))


def _compiled(function: _F) -> _F:
    # No `nnan` and `ninf`: a NaN in a weight must arrive as NaN in sigma. Only what Python calls is cached, see
    # cpu_compiled.
    flags = {"reassoc", "contract", "nsz", "arcp"}
    return cast(_F, numba.njit(fastmath=flags, nogil=True, error_model="numpy")(function))


def _pointer_to(element: Any) -> Any:
    def cast_address(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(address), generate

    return intrinsic(cast_address)


_to_f32 = _pointer_to(types.float32)
_to_f64 = _pointer_to(types.float64)
_to_i64 = _pointer_to(types.int64)
_to_u32 = _pointer_to(types.uint32)
_to_u16 = _pointer_to(types.uint16)


@_compiled
def _f32(address: int, size: int) -> _F32:
    view: _F32 = numba.carray(_to_f32(address), (size,))
    return view


@_compiled
def _f64(address: int, size: int) -> _F64:
    view: _F64 = numba.carray(_to_f64(address), (size,))
    return view


@_compiled
def _i64(address: int, size: int) -> _I64:
    view: _I64 = numba.carray(_to_i64(address), (size,))
    return view


@_compiled
def _u16(address: int, size: int) -> NDArray[np.uint16]:
    view: NDArray[np.uint16] = numba.carray(_to_u16(address), (size,))
    return view


@_compiled
def _u32(address: int, size: int) -> NDArray[np.uint32]:
    view: NDArray[np.uint32] = numba.carray(_to_u32(address), (size,))
    return view


_W = 8
_INT, _FLOAT, _DOUBLE = ir.IntType(64), ir.FloatType(), ir.DoubleType()
_VECTOR, _WIDE = ir.VectorType(_FLOAT, _W), ir.VectorType(_DOUBLE, _W)
_FAST = ("reassoc", "contract", "nsz", "arcp")


class _Emitter:
    """Writes LLVM instructions on fp32 (or fp64) memory at computed addresses."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, base: Any, *offsets: Any, size: int = 4) -> Any:
        """Return ``base + size * sum(offsets)``."""
        for offset in offsets:
            base = self.builder.add(base, self.builder.mul(offset, _INT(size)))
        return base

    def load(self, address: Any, kind: Any) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 8 if kind in (_WIDE, _DOUBLE) else 4
        return value

    def store(self, value: Any, address: Any) -> None:
        instruction = self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()))
        instruction.align = 8 if value.type == _WIDE else 4

    def prefetch(self, address: Any) -> None:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        # To read, into the second-level cache, data.
        self.builder.call(function, [self.builder.inttoptr(address, pointer), number(0), number(2), number(1)])

    def splat(self, scalar: Any, kind: Any) -> Any:
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), _W), [0] * _W)
        return self.builder.shuffle_vector(one, one, mask)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=_FAST)

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=_FAST)

    def variables(self, kind: Any, count: int) -> list[Any]:
        """Return stack slots set to zero, which LLVM turns into registers."""
        slots = [cgutils.alloca_once(self.builder, kind) for _ in range(count)]
        for slot in slots:
            self.builder.store(ir.Constant(kind, None), slot)
        return slots

    def add_to(self, slot: Any, value: Any) -> None:
        self.builder.store(self.add(self.builder.load(slot), value), slot)

    def sum_of(self, vector: Any) -> Any:
        """Return the sum of a vector's eight numbers."""
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.vector.reduce.fadd.v8f32")
        return self.builder.call(function, [_FLOAT(0.0), vector], fastmath=_FAST)

    def for_range(self, count: Any) -> Any:
        return cgutils.for_range(self.builder, count, intp=_INT)


def _emitted(n_arguments: int, emit: Callable[..., Any], result: Any = types.void) -> Any:
    """Return a function of `n_arguments` int64 for compiled code, whose instructions `emit` writes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = emit(_Emitter(builder), *arguments)
        return context.get_dummy_value() if value is None else value

    names = ", ".join(f"a{i}" for i in range(n_arguments))
    signature = result(*[types.int64] * n_arguments)
    # `intrinsic` looks at the number of parameters.
    typed = eval(f"lambda context, {names}: found", {"found": (signature, generate)})
    typed.__name__ = emit.__name__
    return intrinsic(typed)


def _build_dots(n_rows: int) -> Any:
    def dots(e: _Emitter, a: Any, a_ld: Any, size: Any, x: Any, x_ld: Any, out: Any, out_ld: Any, ahead: Any) -> None:
        sums = e.variables(_VECTOR, n_rows)
        rows = [e.at(a, e.builder.mul(a_ld, _INT(k))) for k in range(n_rows)]

        def add(column: Any) -> None:
            vector = e.load(e.at(x, e.builder.mul(column, x_ld)), _VECTOR)
            for row, total in zip(rows, sums, strict=True):
                e.add_to(total, e.mul(e.splat(e.load(e.at(row, column), _FLOAT), _VECTOR), vector))

        # A cache line of each row at a time. The next rows are asked for: they are often pages away, where the
        # processor would not guess.
        lines = e.builder.lshr(size, _INT(4))
        with e.for_range(lines) as line:
            first = e.builder.shl(line.index, _INT(4))
            for row in rows:
                e.prefetch(e.at(row, first, ahead))
            with e.for_range(_INT(16)) as loop:
                add(e.builder.add(first, loop.index))
        done = e.builder.shl(lines, _INT(4))
        with e.for_range(e.builder.sub(size, done)) as loop:
            add(e.builder.add(done, loop.index))
        for k, total in enumerate(sums):
            target = e.at(out, e.builder.mul(out_ld, _INT(k)))
            e.store(e.add(e.load(target, _VECTOR), e.builder.load(total)), target)

    return _emitted(8, dots)


def _build_axpys(n_rows: int) -> Any:
    def axpys(e: _Emitter, a: Any, a_ld: Any, size: Any, x: Any, x_ld: Any, out: Any, out_ld: Any) -> None:
        factors = [e.load(e.at(x, e.builder.mul(x_ld, _INT(k))), _VECTOR) for k in range(n_rows)]
        rows = [e.at(a, e.builder.mul(a_ld, _INT(k))) for k in range(n_rows)]
        with e.for_range(size) as loop:
            target = e.at(out, e.builder.mul(loop.index, out_ld))
            terms = [
                e.mul(e.splat(e.load(e.at(row, loop.index), _FLOAT), _VECTOR), factor)
                for row, factor in zip(rows, factors, strict=True)
            ]
            # Two chains: one of eight additions would have to wait for itself.
            chains = [e.load(target, _VECTOR), *terms[:1]]
            for k, term in enumerate(terms[1:]):
                chains[k % 2] = e.add(chains[k % 2], term)
            e.store(e.add(*chains), target)

    return _emitted(7, axpys)


_dots8, _dots1 = _build_dots(8), _build_dots(1)
"""Add ``A X`` to `out`: A (8 or 1, size), X (size, 8), out (8 or 1, 8), each with its leading dimension behind it.

The last argument is how far behind its like in A an element lies that will be read soon."""
_axpys8, _axpys1 = _build_axpys(8), _build_axpys(1)
"""Add ``A^T X`` to `out`: A (8 or 1, size), X (8 or 1, 8), out (size, 8)."""


def _build_gram() -> Any:
    def gram(e: _Emitter, x: Any, y: Any, ld: Any, size: Any, out: Any, out_ld: Any) -> None:
        sums = e.variables(_WIDE, _W)
        with e.for_range(size) as loop:
            offset = e.builder.mul(loop.index, ld)
            vector = e.builder.fpext(e.load(e.at(y, offset), _VECTOR), _WIDE)
            for k, total in enumerate(sums):
                factor = e.builder.fpext(e.load(e.at(x, offset, _INT(k)), _FLOAT), _DOUBLE)
                e.add_to(total, e.mul(e.splat(factor, _WIDE), vector))
        for k, total in enumerate(sums):
            e.store(e.builder.load(total), e.at(out, e.builder.mul(out_ld, _INT(k)), size=8))

    return _emitted(6, gram)


_gram = _build_gram()
"""Write ``X^T Y`` in fp64 to `out` (8, 8): X and Y (size, 8) in fp32 with one leading dimension."""


def _build_combine() -> Any:
    def combine(e: _Emitter, x: Any, ld: Any, size: Any, weights: Any, out: Any) -> None:
        factors = e.load(weights, _VECTOR)
        with e.for_range(size) as loop:
            vector = e.mul(e.load(e.at(x, e.builder.mul(loop.index, ld)), _VECTOR), factors)
            target = e.at(out, loop.index)
            e.store(e.add(e.load(target, _FLOAT), e.sum_of(vector)), target)

    return _emitted(5, combine)


_combine = _build_combine()
"""Add ``X w`` to `out` (size,): X (size, 8), w (8,) in fp32."""


def _build_row_dots() -> Any:
    def row_dots(e: _Emitter, x: Any, y: Any, ld: Any, eights: Any, out: Any, out_ld: Any) -> None:
        sums = e.variables(_VECTOR, 16)
        with e.for_range(eights) as loop:
            column = e.builder.shl(loop.index, _INT(3))
            a, b = (
                [e.load(e.at(rows, e.builder.mul(ld, _INT(k)), column), _VECTOR) for k in range(4)] for rows in (x, y)
            )
            for k, total in enumerate(sums):
                e.add_to(total, e.mul(a[k // 4], b[k % 4]))
        for k, total in enumerate(sums):
            target = e.at(out, e.builder.mul(out_ld, _INT(k // 4)), _INT(k % 4), size=8)
            found = e.builder.fpext(e.sum_of(e.builder.load(total)), _DOUBLE)
            e.store(e.add(e.load(target, _DOUBLE), found), target)

    return _emitted(6, row_dots)


_row_dots = _build_row_dots()
"""Add ``X Y^T`` to `out` (4, 4) in fp64: X and Y (4, 8 n), rows with one leading dimension, summed in fp32."""


def _build_mix_rows() -> Any:
    def mix_rows(e: _Emitter, x: Any, ld: Any, eights: Any, factors: Any, factors_ld: Any) -> None:
        with e.for_range(eights) as loop:
            column = e.builder.shl(loop.index, _INT(3))
            addresses = [e.at(x, e.builder.mul(ld, _INT(k)), column) for k in range(_W)]
            rows = [e.load(address, _VECTOR) for address in addresses]
            for k, address in enumerate(addresses):
                own = [e.load(e.at(factors, e.builder.mul(factors_ld, _INT(k)), _INT(j)), _FLOAT) for j in range(_W)]
                terms = [e.mul(e.splat(factor, _VECTOR), row) for factor, row in zip(own, rows, strict=True)]
                # Two chains, as above.
                even, odd = terms[:2]
                for j in range(2, _W, 2):
                    even, odd = e.add(even, terms[j]), e.add(odd, terms[j + 1])
                e.store(e.add(even, odd), address)

    return _emitted(5, mix_rows)


_mix_rows = _build_mix_rows()
"""Replace X (8, 8 n), rows with a leading dimension, by ``F X`` for factors F (8, 8) with theirs."""


def _build_rotate() -> Any:
    def rotate(e: _Emitter, x: Any, y: Any, factors: Any) -> None:
        cos, sin = (e.splat(e.load(e.at(factors, _INT(k), size=8), _DOUBLE), _WIDE) for k in range(2))
        a, b = e.load(x, _WIDE), e.load(y, _WIDE)
        e.store(e.builder.fsub(e.mul(cos, a), e.mul(sin, b), flags=_FAST), x)
        e.store(e.add(e.mul(sin, a), e.mul(cos, b)), y)

    return _emitted(3, rotate)


_rotate = _build_rotate()
"""Rotate two rows of eight numbers in fp64 by the cosine and sine at `factors`."""


def _build_column_dots() -> Any:
    def column_dots(e: _Emitter, column: Any, x: Any, ld: Any, size: Any, out: Any) -> None:
        # Four sums: one would wait for its own addition in every row.
        sums = e.variables(_VECTOR, 4)

        def add(row: Any, total: Any) -> None:
            offset = e.builder.mul(row, ld)
            factor = e.splat(e.load(e.at(column, offset), _FLOAT), _VECTOR)
            e.add_to(total, e.mul(factor, e.load(e.at(x, offset), _VECTOR)))

        fours = e.builder.lshr(size, _INT(2))
        with e.for_range(fours) as loop:
            first = e.builder.shl(loop.index, _INT(2))
            for k, total in enumerate(sums):
                add(e.builder.add(first, _INT(k)), total)
        done = e.builder.shl(fours, _INT(2))
        with e.for_range(e.builder.sub(size, done)) as loop:
            add(e.builder.add(done, loop.index), sums[0])
        a, b, c, d = (e.builder.load(total) for total in sums)
        e.store(e.add(e.add(a, b), e.add(c, d)), out)

    return _emitted(5, column_dots)


_column_dots = _build_column_dots()
"""Write ``x^T Y`` to `out` (8,): x (size,) and Y (size, 8), both with the same leading dimension."""


def _build_reflect(forward: bool) -> Any:
    def reflect(e: _Emitter, x: Any, row: Any, ld: Any, size: Any, column: Any, lane: Any, sums: Any, at: Any) -> None:
        """Apply a reflection to eight columns; see `_orthonormalise`."""
        builder, number = e.builder, ir.VectorType(ir.IntType(32), _W)
        scale, inverse = (e.splat(e.load(e.at(at, _INT(MAX_BLOCK_SIZE * k)), _FLOAT), _VECTOR) for k in range(2))
        nothing = ir.Constant(_VECTOR, None)
        one = builder.insert_element(
            ir.Constant(number, ir.Undefined), builder.trunc(lane, ir.IntType(32)), ir.IntType(32)(0)
        )
        own_lane = builder.shuffle_vector(one, one, ir.Constant(number, [0] * _W))
        lanes = ir.Constant(number, list(range(_W)))
        is_later, is_own = builder.icmp_signed(">", lanes, own_lane), builder.icmp_signed("==", lanes, own_lane)
        head = e.load(row, _VECTOR)
        change = e.mul(e.mul(scale, inverse), e.load(sums, _VECTOR))
        if forward:
            change = e.add(change, e.mul(scale, head))
        minus = builder.fsub(nothing, builder.select(is_later, change, nothing), flags=_FAST)
        e.store(e.add(head, minus) if forward else builder.select(is_later, minus, head), row)
        added = e.mul(minus, inverse)
        if not forward:
            added = builder.select(is_own, builder.fsub(nothing, e.mul(scale, inverse), flags=_FAST), added)
        with e.for_range(size) as loop:
            offset = builder.mul(loop.index, ld)
            factor = e.splat(e.load(e.at(column, offset), _FLOAT), _VECTOR)
            target = e.at(x, offset)
            kept = e.load(target, _VECTOR)
            if not forward:
                kept = builder.select(is_own, nothing, kept)
            e.store(e.add(kept, e.mul(factor, added)), target)

    return _emitted(8, reflect)


_reflect, _reflect_back = _build_reflect(True), _build_reflect(False)
"""Apply reflection k to eight columns.

X (size, 8) below row k, that row, X's leading dimension and size; the vector of the reflection (size,), which lane it
lies in (below 0: in none of these), its products with the columns (8,), and where its factors are. Backwards, what is
kept in its own lane becomes a column of the basis."""


def _build_rank_one() -> Any:
    def rank_one(e: _Emitter, out: Any, ld: Any, rows: Any, size: Any, x: Any, y: Any, factor: Any) -> None:
        scale = e.load(factor, _FLOAT)
        eights = e.builder.lshr(size, _INT(3))
        done = e.builder.shl(eights, _INT(3))
        with e.for_range(rows) as outer:
            row = e.at(out, e.builder.mul(outer.index, ld))
            scalar = e.mul(scale, e.load(e.at(x, outer.index), _FLOAT))
            vector = e.splat(scalar, _VECTOR)
            with e.for_range(eights) as loop:
                column = e.builder.shl(loop.index, _INT(3))
                target = e.at(row, column)
                e.store(e.add(e.load(target, _VECTOR), e.mul(vector, e.load(e.at(y, column), _VECTOR))), target)
            with e.for_range(e.builder.sub(size, done)) as loop:
                column = e.builder.add(done, loop.index)
                target = e.at(row, column)
                e.store(e.add(e.load(target, _FLOAT), e.mul(scalar, e.load(e.at(y, column), _FLOAT))), target)

    return _emitted(7, rank_one)


_rank_one = _build_rank_one()
"""Add ``c x y^T`` to `out` (rows, size), whose leading dimension comes next; c is at the last address."""


def _build_fetch_add() -> Any:
    def fetch_add(e: _Emitter, address: Any, amount: Any) -> Any:
        return e.builder.atomic_rmw("add", e.builder.inttoptr(address, _INT.as_pointer()), amount, "acq_rel")

    return _emitted(2, fetch_add, types.int64)


_fetch_add = _build_fetch_add()
"""Return the number at an address and add to it, whatever other threads do there."""


def _build_start() -> Any:
    def start(e: _Emitter, pool: Any, thread: Any, header: Any, threads: Any) -> None:
        # void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags)
        number = ir.IntType(32)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, number, number])
        arguments = [e.builder.inttoptr(thread, pointer), e.builder.inttoptr(header, pointer)]
        arguments += [e.builder.trunc(threads, number), number(0)]
        e.builder.call(e.builder.inttoptr(pool, kind.as_pointer()), arguments)

    return _emitted(4, start)


_start_threads = _build_start()
"""Run a function of the header in so many threads, the calling one among them, and wait for all."""
