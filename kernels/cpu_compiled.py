"""The compiled functions of the CPU backend: all layers in one call, each weight read once a step.

The functions below are compiled by Numba without the GIL and cached between processes. They know addresses only. A
table of int64 has one row a layer, whose fields are named below; everything that one object works on lies in buffers of
its own, so that objects in several threads never meet. They stand in one file, because Numba's cache looks at the file
of the function called only.

Every layer is taken as ``A`` of shape (q, p), q >= p: the weight, or its transpose. Matrices with one row for each of
p or q and one column for each vector of the block ("lanes": 8, or 16 where r > 8; those beyond r are zero) serve its
products, so that eight lanes are one register, no sum runs across a register, and loops have no odd ends. Numba has no
vector types: the few loops over registers are written in LLVM's own terms, by the functions named ``_build_*``.

One thread forms ``T`` and ``Z`` of a few rows of ``A`` at a time. Several form ``T`` of as many rows as lie in a cache,
each thread some of them, and then ``Z``, each thread some of its rows: no sum is split over threads, and results are
the same bit for bit, however many there are. They are the threads of torch's own OpenMP runtime, which are awake
already; Numba's threading layers would be threads beside them, and break forked workers.

Deltas from the specification, :mod:`lightning_lip.kernels.reference`:

1. ``T`` cannot be scaled by its largest magnitude before ``Z = T A``, which would cost a second read. It is multiplied
   by a power of two that the layer keeps from step to step; a step whose ``T`` leaves [2^-8, 2^8] is done again with
   a new one, so fp32 holds at weights of 1e+-30 too.
2. ``Z`` is formed of the images as they come and rotated afterwards. After the first steps the rotation is close to
   the identity.
3. The Gram matrix and its eigen-decomposition (Jacobi) are in fp64; rotations that move no Ritz value by more than a
   tenth of fp32's rounding are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from lightning_lip.kernels.reference import PENALTY_CODES, PRODUCT_CAP

MAX_BLOCK_SIZE = 16

PRODUCT, SOFTPLUS_LOG, HINGE_LOG, LOG, LAYER_SUM, LAYER_SUM_SQUARES = PENALTY_CODES.values()

# A layer's row in the table. Leading dimensions (LD) are in elements. ALONG is 0 where the contiguous dimension is the
# shorter side p, 1 where it is q. BF16 is 0 for fp32.
(
    _WEIGHT_LD,
    _WEIGHT_BF16,
    _WEIGHT_ALONG,
    _GRAD_LD,
    _GRAD_BF16,
    _GRAD_ALONG,
    _R,
    _LANES,
    _P,
    _Q,
    _VECTORS,  # V (p, lanes) fp32
    _PRODUCTS,  # Z (p, lanes) fp32, scratch that layers share
    _IMAGES,  # T (q, lanes) fp32, likewise
    _LONG,  # the singular vector of q elements, fp32
    _SHORT,  # the singular vector of p elements, fp32
    _MULTIPLICITY,
    _AGAIN,  # 1: T is to be formed (again)
    _N_FIELDS,
) = range(18)

# The header. The addresses are those of the table, of L weights and then L gradients (0: leave it alone), of what else
# has one entry a layer, of the tasks, of the scratch of each thread, and of the two functions that threads start with.
(
    _LAYERS,
    _TABLE,
    _ADDRESSES,
    _SIGMA,
    _COEFFICIENTS,
    _SCALES,
    _VALUE,
    _TASKS,  # (n, 6): what, the layer, and where: rows of T from, to, rows of Z from, to
    _PHASES,  # (n + 1,): each phase's first task; the next one begins when all are done
    _N_PHASES,  # the last one is the update
    _SMALL,  # (threads, small) fp64
    _BAND,  # (threads, band) fp32
    _BAND_SIZE,
    _POOL,  # GOMP_parallel, 0 where there is none
    _THREAD,  # what each thread runs
    _THREADS,  # how many threads, 1 for none but the caller
    _ADVANCE,
    _NEXT_TASK,
    _LAST_TASK,
    _NEXT_THREAD,
    _N_HEADER,
) = range(21)

FORM_IMAGES, FORM_PRODUCTS, FINISH, UPDATE = range(4)
"""What a task does."""

_SMALL_SIZE = 3 * MAX_BLOCK_SIZE**2 + 4 * MAX_BLOCK_SIZE
_BAND_ELEMENTS = 1 << 16
"""Columns of ``A^T`` (p, q) that are read twice are as many as lie in a second-level cache of 512 kB."""

# Bits of 2^-8, 2^8 and infinity in fp32.
_LOW, _HIGH, _INFINITE = (127 - 8) << 23, (127 + 8) << 23, 255 << 23
_MIN_NORM, _MAX_NORM = 2.0**-8, 2.0**8
_NEGLIGIBLE = 5e-9
_LARGEST_PRODUCT = math.exp(PRODUCT_CAP)

_COEFFICIENTS_GIVEN, _NO_UPDATE = -1, -2

_F = TypeVar("_F", bound=Callable[..., Any])
_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]
_I64 = NDArray[np.int64]


def _compiled(function: _F) -> _F:
    # No `nnan` and `ninf`: a NaN in a weight must arrive as NaN in sigma.
    flags = {"reassoc", "contract", "nsz", "arcp"}
    return cast(_F, numba.njit(fastmath=flags, nogil=True, cache=True, error_model="numpy")(function))


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


# Loops over registers of eight lanes, and what else Python has no words for. Addresses and counts are int64, leading
# dimensions in elements.

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
        name = "llvm.vector.reduce.fadd.v8f32"
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        total = cgutils.get_or_insert_function(e.builder.module, kind, name)
        with e.for_range(size) as loop:
            vector = e.mul(e.load(e.at(x, e.builder.mul(loop.index, ld)), _VECTOR), factors)
            target = e.at(out, loop.index)
            found = e.builder.call(total, [e.load(target, _FLOAT), vector], fastmath=_FAST)
            e.store(found, target)

    return _emitted(5, combine)


_combine = _build_combine()
"""Add ``X w`` to `out` (size,): X (size, 8), w (8,) in fp32."""


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


@_compiled
def _widen(target: int, source: int, size: int) -> None:
    """Copy `size` bf16 numbers to fp32."""
    words, bits = _u16(source, size), _u32(target, size)
    for j in range(size):
        bits[j] = np.uint32(words[j]) << np.uint32(16)


@_compiled
def _copy(target: _F32, source: _F32) -> None:
    # Numba's `target[:] = source` is several times slower.
    for j in range(target.size):
        target[j] = source[j]


@_compiled
def _axpy(z: _F32, s: np.float32, a: _F32) -> None:
    for j in range(z.size):
        z[j] += s * a[j]


@_compiled
def _add_dots(a: int, ld: int, rows: int, size: int, x: _F32, out: _F32) -> None:
    """Add ``A x`` to `out` (rows,), for A (rows, size): four rows at a time."""
    fours = rows // 4 * 4
    for i in range(0, fours, 4):
        a0, a1 = _f32(a + 4 * ld * i, size), _f32(a + 4 * ld * (i + 1), size)
        a2, a3 = _f32(a + 4 * ld * (i + 2), size), _f32(a + 4 * ld * (i + 3), size)
        s0 = s1 = s2 = s3 = np.float32(0)
        for j in range(size):
            s0 += x[j] * a0[j]
            s1 += x[j] * a1[j]
            s2 += x[j] * a2[j]
            s3 += x[j] * a3[j]
        out[i] += s0
        out[i + 1] += s1
        out[i + 2] += s2
        out[i + 3] += s3
    for i in range(fours, rows):
        a0 = _f32(a + 4 * ld * i, size)
        s0 = np.float32(0)
        for j in range(size):
            s0 += x[j] * a0[j]
        out[i] += s0


@_compiled
def _add_axpys(a: int, ld: int, rows: int, size: int, x: _F32, out: _F32) -> None:
    """Add ``A^T x`` to `out` (size,), for A (rows, size): four rows at a time."""
    fours = rows // 4 * 4
    for i in range(0, fours, 4):
        a0, a1 = _f32(a + 4 * ld * i, size), _f32(a + 4 * ld * (i + 1), size)
        a2, a3 = _f32(a + 4 * ld * (i + 2), size), _f32(a + 4 * ld * (i + 3), size)
        s0, s1, s2, s3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(size):
            out[j] += s0 * a0[j] + s1 * a1[j] + s2 * a2[j] + s3 * a3[j]
    for i in range(fours, rows):
        _axpy(out, x[i], _f32(a + 4 * ld * i, size))


@_compiled
def _add_forward(a: int, ld: int, rows: int, size: int, x: int, out: int, lanes: int) -> None:
    """Add ``A X`` to `out` (rows, lanes), for A (rows, size) and X (size, lanes)."""
    if lanes == 1:
        _add_dots(a, ld, rows, size, _f32(x, size), _f32(out, rows))
        return
    eights = rows // 8 * 8
    for c in range(0, 4 * lanes, 32):
        for i in range(0, eights, 8):
            _dots8(a + 4 * ld * i, ld, size, x + c, lanes, out + 4 * lanes * i + c, lanes, 8 * ld)
        for i in range(eights, rows):
            _dots1(a + 4 * ld * i, ld, size, x + c, lanes, out + 4 * lanes * i + c, lanes, ld)


@_compiled
def _add_backward(a: int, ld: int, rows: int, size: int, x: int, out: int, lanes: int) -> None:
    """Add ``A^T X`` to `out` (size, lanes), for A (rows, size) and X (rows, lanes)."""
    if lanes == 1:
        _add_axpys(a, ld, rows, size, _f32(x, rows), _f32(out, size))
        return
    eights = rows // 8 * 8
    for c in range(0, 4 * lanes, 32):
        for i in range(0, eights, 8):
            _axpys8(a + 4 * ld * i, ld, size, x + 4 * lanes * i + c, lanes, out + c, lanes)
        for i in range(eights, rows):
            _axpys1(a + 4 * ld * i, ld, size, x + 4 * lanes * i + c, lanes, out + c, lanes)


@_compiled
def _band_width(p: int) -> int:
    """Return the columns of ``A^T`` (p, q) that are read twice while in the cache."""
    return max(16, min(_BAND_ELEMENTS // p, 1024) // 16 * 16)


@_compiled
def _form_images(row: _I64, weight: int, scale: np.float32, band: int, begin: int, end: int) -> None:
    """Form ``T = scale A V`` of some rows of ``A``."""
    p, lanes, ld, bf16 = row[_P], row[_LANES], row[_WEIGHT_LD], row[_WEIGHT_BF16]
    size = 2 if bf16 else 4
    images = _f32(row[_IMAGES] + 4 * lanes * begin, lanes * (end - begin))
    for j in range(images.size):
        images[j] = 0
    along = row[_WEIGHT_ALONG]
    step = _band_width(p) if along else 8
    for i in range(begin, end, step):
        n = min(step, end - i)
        # In memory (rows, width), `a_ld` apart: a band of columns of A^T, or some rows of A.
        a, a_ld, rows, width = weight + size * (i if along else ld * i), ld, p if along else n, n if along else p
        if bf16:
            a, a_ld = _widened(band, a, a_ld, rows, width), width
        if along:
            _add_backward(a, a_ld, rows, width, row[_VECTORS], row[_IMAGES] + 4 * lanes * i, lanes)
        else:
            _add_forward(a, a_ld, rows, width, row[_VECTORS], row[_IMAGES] + 4 * lanes * i, lanes)
    for j in range(images.size):
        images[j] *= scale


@_compiled
def _form_products(row: _I64, weight: int, band: int, begin: int, end: int, first: int, last: int) -> None:
    """Add what some rows of ``A``, `begin` to `end`, give to ``Z = A^T T`` in its rows `first` to `last`."""
    p, lanes, ld, bf16 = row[_P], row[_LANES], row[_WEIGHT_LD], row[_WEIGHT_BF16]
    size = 2 if bf16 else 4
    products = row[_PRODUCTS] + 4 * lanes * first
    if begin == 0:
        cleared = _f32(products, lanes * (last - first))
        for j in range(cleared.size):
            cleared[j] = 0
    along = row[_WEIGHT_ALONG]
    step = _band_width(p) if along else 8
    for i in range(begin, end, step):
        n, m = min(step, end - i), last - first
        a, a_ld, rows, width = ld * first + i if along else ld * i + first, ld, m if along else n, n if along else m
        a = weight + size * a
        if bf16:
            a, a_ld = _widened(band, a, a_ld, rows, width), width
        if along:
            _add_forward(a, a_ld, rows, width, row[_IMAGES] + 4 * lanes * i, products, lanes)
        else:
            _add_backward(a, a_ld, rows, width, row[_IMAGES] + 4 * lanes * i, products, lanes)


@_compiled
def _widened(band: int, a: int, ld: int, rows: int, width: int) -> int:
    """Copy bf16 numbers (rows, width) to fp32, and return where."""
    for k in range(rows):
        _widen(band + 4 * width * k, a + 2 * ld * k, width)
    return band


@_compiled
def _largest(address: int, size: int) -> Any:
    """Return the bits of the largest magnitude: they are ordered like the numbers, infinity and NaN above all."""
    bits = _u32(address, size)
    top = np.uint32(0)
    for j in range(size):
        top = max(top, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
    return np.int64(top)


@_compiled
def _norm(x: _F32) -> float:
    total = 0.0
    for j in range(x.size):
        total += np.float64(x[j]) * np.float64(x[j])
    return math.sqrt(total)


@_compiled
def _scale_to(out: _F32, x: _F32, factor: float) -> None:
    # In fp64: the reciprocal of a norm below 3e-39 overflows fp32.
    for j in range(x.size):
        out[j] = np.float32(np.float64(x[j]) * factor)


@_compiled
def _form_gram(images: int, lanes: int, q: int, gram: int) -> float:
    """Write ``T^T T`` (lanes, lanes) in fp64, which its squares cannot overflow; return T's Frobenius norm."""
    for c in range(0, lanes, 8):
        for d in range(0, lanes, 8):
            _gram(images + 4 * c, images + 4 * d, lanes, q, gram + 8 * (lanes * c + d), lanes)
    return math.sqrt(_trace(_f64(gram, lanes * lanes), lanes))


@_compiled
def _trace(matrix: _F64, n: int) -> float:
    total = 0.0
    for k in range(n):
        total += matrix[(n + 1) * k]
    return total


@_compiled
def _ritz(r: int, lanes: int, gram: int, rotation: int, factors: int) -> float:
    """Write the eigenvectors of a Gram matrix, which is overwritten, as rows of `rotation`; (lanes, lanes) in fp64.

    Returns:
        The largest eigenvalue; its eigenvector comes first, and the others in their order.
    """
    all_of = _f64(gram, lanes * lanes)
    identity = _f64(rotation, lanes * lanes)
    for k in range(lanes * lanes):
        identity[k] = 0.0
    for k in range(lanes):
        identity[(lanes + 1) * k] = 1.0
    # Sweeps converge quadratically and the last block is nearly diagonal.
    negligible = _NEGLIGIBLE * _trace(all_of, lanes)
    angle = _f64(factors, 2)
    for _ in range(30):
        rotated = False
        for k in range(1, r):
            for m in range(k):
                off = all_of[lanes * k + m]
                if abs(off) <= negligible:
                    continue
                rotated = True
                low, high = all_of[(lanes + 1) * m], all_of[(lanes + 1) * k]
                # tan of the angle, t = sign(theta) / (|theta| + sqrt(theta^2 + 1)) for theta = (high - low) / (2 off).
                half = 0.5 * (high - low)
                t = off / (half + math.copysign(math.sqrt(half * half + off * off), half))
                angle[0] = 1.0 / math.sqrt(t * t + 1.0)
                angle[1] = t * angle[0]
                for c in range(0, 8 * lanes, 64):
                    _rotate(gram + 8 * lanes * m + c, gram + 8 * lanes * k + c, factors)
                    _rotate(rotation + 8 * lanes * m + c, rotation + 8 * lanes * k + c, factors)
                for j in range(r):
                    all_of[lanes * j + m] = all_of[lanes * m + j]
                    all_of[lanes * j + k] = all_of[lanes * k + j]
                all_of[(lanes + 1) * m], all_of[(lanes + 1) * k] = low - t * off, high + t * off
                all_of[lanes * m + k] = all_of[lanes * k + m] = 0.0
        if not rotated:
            break
    angle[0], angle[1] = 0.0, -1.0
    for k in range(r - 1):
        best = k
        for m in range(k + 1, r):
            if all_of[(lanes + 1) * m] > all_of[(lanes + 1) * best]:
                best = m
        if best != k:
            all_of[(lanes + 1) * best], all_of[(lanes + 1) * k] = all_of[(lanes + 1) * k], all_of[(lanes + 1) * best]
            for c in range(0, 8 * lanes, 64):
                _rotate(rotation + 8 * lanes * k + c, rotation + 8 * lanes * best + c, factors)
    largest: float = all_of[0]
    return largest


@_compiled
def _orthonormalise(x: int, r: int, lanes: int, p: int, scratch: int) -> None:
    """Replace the first r columns of X (p, lanes) by an orthonormal basis of theirs, in their order.

    Householder QR, as in the reference: a product of reflections is orthonormal to rounding whatever the rank, where
    Gram-Schmidt leaves the columns of a rank-deficient block to chance. The vector of reflection k is 1 in row k and,
    below it, what is kept in column k times ``inverse[k]``.
    """
    sums, factors = scratch, scratch + 4 * MAX_BLOCK_SIZE
    scales, inverse = _f32(factors, r), _f32(factors + 4 * MAX_BLOCK_SIZE, r)
    for step in range(2 * r):
        forward = step < r
        k = step if forward else 2 * r - 1 - step
        row, below = x + 4 * lanes * k, x + 4 * lanes * (k + 1)
        n, own = p - k - 1, k // 8 * 8
        for c in range(own, lanes, 8):
            _column_dots(below + 4 * k, below + 4 * c, lanes, n, sums + 4 * c)
        if forward:
            squares = np.float64(_f32(sums, lanes)[k])
            head = np.float64(_f32(row, lanes)[k])
            if head * head + squares < 1e-12:
                # Squares that vanish in fp32 are no norm: the column's own magnitude does not matter.
                _normalise_column(row + 4 * k, lanes, n + 1)
                for c in range(own, lanes, 8):
                    _column_dots(below + 4 * k, below + 4 * c, lanes, n, sums + 4 * c)
                squares = np.float64(_f32(sums, lanes)[k])
                head = np.float64(_f32(row, lanes)[k])
            norm = math.sqrt(head * head + squares)
            alpha = -norm if head > 0.0 else norm
            scales[k] = np.float32((alpha - head) / alpha if norm > 0.0 else 0.0)
            inverse[k] = np.float32(1.0 / (head - alpha) if norm > 0.0 else 0.0)
        # The own lanes last: what is kept in column k is read for all.
        for c in range(lanes - 8, own - 8, -8):
            if forward:
                _reflect(below + 4 * c, row + 4 * c, lanes, n, below + 4 * k, k - c, sums + 4 * c, factors + 4 * k)
            else:
                _reflect_back(below + 4 * c, row + 4 * c, lanes, n, below + 4 * k, k - c, sums + 4 * c, factors + 4 * k)
        if not forward:
            for j in range(k):
                _f32(x + 4 * lanes * j, lanes)[k] = 0
            _f32(row, lanes)[k] = np.float32(1) - scales[k]


@_compiled
def _normalise_column(x: int, ld: int, size: int) -> None:
    """Divide a column by its norm, in fp64; one that is zero stays."""
    column = _f32(x, ld * size - ld + 1)[::ld]
    norm = 0.0
    for j in range(size):
        norm += np.float64(column[j]) ** 2
    norm = math.sqrt(norm)
    if norm > 0.0:
        for j in range(size):
            column[j] = np.float32(np.float64(column[j]) / norm)


@_compiled
def _finish(header: _I64, layer: int, scratch: int) -> bool:
    """Turn a layer's ``T`` and ``Z`` into sigma, its vectors and, if they are to advance, the next block.

    Returns:
        Whether ``T`` must be formed again, with the scale that was stored.
    """
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    r, lanes, p, q = row[_R], row[_LANES], row[_P], row[_Q]
    images, products, vectors = row[_IMAGES], row[_PRODUCTS], row[_VECTORS]
    advance = header[_ADVANCE] != 0
    scales = _f64(header[_SCALES], header[_LAYERS])
    sigma = _f64(header[_SIGMA], header[_LAYERS])
    long, short = _f32(row[_LONG], q), _f32(row[_SHORT], p)
    gram = scratch
    rotation, mixed = gram + 8 * lanes * lanes, gram + 16 * lanes * lanes

    image_norm = _norm(_f32(images, q)) if lanes == 1 else _form_gram(images, lanes, q, gram)
    # Whatever is not between them is looked at again, NaN too.
    if not _MIN_NORM < image_norm < _MAX_NORM:
        top = _largest(images, lanes * q)
        if top < _LOW or top > _HIGH:
            scale = 1.0
            if 0 < top < _INFINITE:
                scale = min(max(scales[layer] * 2.0 ** (127 - (top >> 23)), 2.0**-120), 2.0**120)
            if scale != scales[layer]:
                scales[layer] = scale
                return True
        if top >= _INFINITE or top == 0:
            sigma[layer] = 0.0 if top == 0 else np.nan
            long[:] = np.float32(sigma[layer])
            _first_column(short, vectors, lanes)
            return False
    leading = _f32(mixed + 4 * lanes * lanes, lanes)
    if lanes == 1:
        _scale_to(long, _f32(images, q), 1.0 / image_norm)
        _copy(short, _f32(products if advance else vectors, p))
    else:
        image_norm = math.sqrt(_ritz(r, lanes, gram, rotation, mixed))
        for j in range(lanes):
            leading[j] = np.float32(_f64(rotation, lanes)[j] / image_norm)
        _leading_column(long, images, lanes, leading)
        for j in range(lanes):
            leading[j] = np.float32(_f64(rotation, lanes)[j])
        _leading_column(short, products if advance else vectors, lanes, leading)
    if not advance:
        sigma[layer] = image_norm / scales[layer]
        return False

    product_norm = _norm(short)
    if not 0.0 < product_norm < np.inf:
        sigma[layer] = 0.0 if product_norm == 0.0 else np.nan
        _first_column(short, vectors, lanes)
        return False
    sigma[layer] = product_norm / image_norm
    _scale_to(short, short, 1.0 / product_norm)
    if lanes == 1:
        _copy(_f32(vectors, p), short)
        return False
    # A magnitude near one: reflections form products of entries in fp32.
    shrink = 2.0 ** -min(max(math.floor(math.log2(product_norm)), -126), 126)
    transposed, rotated = _f32(mixed, lanes * lanes), _f32(vectors, lanes * p)
    for k in range(lanes):
        for j in range(lanes):
            transposed[lanes * j + k] = np.float32(shrink * _f64(rotation, lanes * lanes)[lanes * k + j])
    for j in range(lanes * p):
        rotated[j] = 0
    _add_forward(products, lanes, p, lanes, mixed, vectors, lanes)
    _orthonormalise(vectors, r, lanes, p, gram)
    return False


@_compiled
def _first_column(out: _F32, x: int, lanes: int) -> None:
    """Copy the first column of X (out.size, lanes)."""
    for j in range(out.size):
        out[j] = _f32(x + 4 * lanes * j, 1)[0]


@_compiled
def _leading_column(out: _F32, x: int, lanes: int, weights: _F32) -> None:
    """Write the sum of the columns of X (out.size, lanes), weighted."""
    if lanes == 1:
        _copy(out, _f32(x, out.size))
        return
    for j in range(out.size):
        out[j] = 0
    for c in range(0, lanes, 8):
        _combine(x + 4 * c, lanes, out.size, weights.ctypes.data + 4 * c, out.ctypes.data)


@_compiled
def _update(header: _I64, layer: int, band: int, begin: int, end: int) -> None:
    """Add ``c u v^T`` to a gradient that has an address, in fp32, rounded once: rows `begin` to `end` of q."""
    n_layers = header[_LAYERS]
    coefficient = _f32(header[_COEFFICIENTS], n_layers)[layer]
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    grad, ld, bf16 = _i64(header[_ADDRESSES], 2 * n_layers)[n_layers + layer], row[_GRAD_LD], row[_GRAD_BF16]
    if grad == 0 or coefficient == 0:
        return
    outer, inner, size = row[_LONG], row[_SHORT], row[_P]
    if row[_GRAD_ALONG] == 1:
        # Its rows are p: as large a part of them.
        outer, inner, size = inner, outer, row[_Q]
        begin, end = begin * row[_P] // row[_Q], end * row[_P] // row[_Q]
    factor = header[_COEFFICIENTS] + 4 * layer
    if not bf16:
        _rank_one(grad + 4 * ld * begin, ld, end - begin, size, outer + 4 * begin, inner, factor)
        return
    for i in range(begin, end):
        words = _u16(grad + 2 * ld * i, size)
        _widen(band, grad + 2 * ld * i, size)
        _rank_one(band, 0, 1, size, outer + 4 * i, inner, factor)
        bits = _u32(band, size)
        for j in range(size):
            word = np.uint32(bits[j])
            # To nearest, ties to even; the sum would carry some NaN over to zero.
            even = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            words[j] = np.uint16(0x7FC0 if (word & np.uint32(0x7FFFFFFF)) > _INFINITE else even)


@_compiled
def _work(header: _I64, task: int, small: int, band: int) -> None:
    """Do one task."""
    what, layer, begin, end, first, last = _i64(header[_TASKS] + 48 * task, 6)
    if what == UPDATE:
        _update(header, layer, band, begin, end)
        return
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    if not row[_AGAIN]:
        return
    weight = _i64(header[_ADDRESSES], header[_LAYERS])[layer]
    if what == FORM_IMAGES:
        scale = np.float32(_f64(header[_SCALES], header[_LAYERS])[layer])
        _form_images(row, weight, scale, band, begin, end)
    elif what == FINISH:
        row[_AGAIN] = _finish(header, layer, small)
    elif header[_ADVANCE]:
        _form_products(row, weight, band, begin, end, first, last)


@_compiled
def _run_thread(header: _I64) -> None:
    """Do tasks of the present phase until none is left."""
    number = _fetch_add(header.ctypes.data + 8 * _NEXT_THREAD, 1)
    small, band = header[_SMALL] + 8 * _SMALL_SIZE * number, header[_BAND] + 4 * header[_BAND_SIZE] * number
    while True:
        task = _fetch_add(header.ctypes.data + 8 * _NEXT_TASK, 1)
        if task >= header[_LAST_TASK]:
            return
        _work(header, task, small, band)


def _thread(header_address: int) -> None:
    _run_thread(_i64(header_address, _N_HEADER))


@functools.cache
def thread_address() -> int:
    """Return the address of what a thread of the pool runs; the first call compiles it or loads it from the cache."""
    compiled: Any = numba.cfunc("void(int64)", cache=True, error_model="numpy")
    address: int = compiled(_thread).address
    return address


@_compiled
def _run_phase(header: _I64, phase: int) -> None:
    """Do all tasks of a phase in several threads."""
    limits = _i64(header[_PHASES] + 8 * phase, 2)
    header[_NEXT_TASK], header[_LAST_TASK], header[_NEXT_THREAD] = limits[0], limits[1], 0
    _start_threads(header[_POOL], header[_THREAD], header.ctypes.data, header[_THREADS])


@_compiled
def _iterate_layer(header: _I64, layer: int) -> None:
    """Iterate one layer in this thread: some rows serve T and Z while they lie in the cache."""
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    weight = _i64(header[_ADDRESSES], header[_LAYERS])[layer]
    p, q, band = row[_P], row[_Q], header[_BAND]
    step = _band_width(p) if row[_WEIGHT_ALONG] else 8
    again = True
    while again:
        scale = np.float32(_f64(header[_SCALES], header[_LAYERS])[layer])
        for i in range(0, q, step):
            end = min(i + step, q)
            _form_images(row, weight, scale, band, i, end)
            if header[_ADVANCE]:
                _form_products(row, weight, band, i, end, 0, p)
        again = _finish(header, layer, header[_SMALL])


@_compiled
def _iterate(header: _I64) -> None:
    """Iterate all layers once."""
    if header[_THREADS] == 1:
        for layer in range(header[_LAYERS]):
            _iterate_layer(header, layer)
        return
    for layer in range(header[_LAYERS]):
        _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _AGAIN), 1)[0] = 1
    n_left = 1
    while n_left:
        for phase in range(header[_N_PHASES] - 1):
            _run_phase(header, phase)
        n_left = 0
        for layer in range(header[_LAYERS]):
            n_left += _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _AGAIN), 1)[0]


@_compiled
def _weigh(header: _I64, code: int, target_log: float, factor: float) -> None:
    """Write ``c = factor d penalty / d sigma`` and the value, for the penalties of :mod:`lightning_lip.penalties`."""
    n_layers = header[_LAYERS]
    sigma = _f64(header[_SIGMA], n_layers)
    coefficients = _f32(header[_COEFFICIENTS], n_layers)
    # S is the logarithm of the product, taken where that would leave the range. A logarithm or exponential that is not
    # called is a page of code that is not fetched: at four small layers that shows.
    log_bound, product, value = 0.0, 1.0, 0.0
    for layer in range(n_layers):
        for _ in range(_i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _MULTIPLICITY), 1)[0]):
            product *= sigma[layer]
            value += sigma[layer] if code == LAYER_SUM else sigma[layer] * sigma[layer]
            if not 1e-100 < product < 1e100:
                log_bound += math.log(product)
                product = 1.0
    slope = 1.0
    is_short = code == PRODUCT and log_bound == 0.0 and product <= _LARGEST_PRODUCT
    if not is_short:
        log_bound += math.log(product)
    if is_short:
        slope = value = product
    elif code == PRODUCT:
        slope = math.exp(min(log_bound, PRODUCT_CAP))
        value = slope * (1.0 + max(log_bound - PRODUCT_CAP, 0.0))
    elif code == SOFTPLUS_LOG:
        # exp of a negative number only: it cannot overflow.
        small = math.exp(-abs(log_bound - target_log))
        value = max(log_bound - target_log, 0.0) + math.log1p(small)
        slope = (1.0 if log_bound > target_log else small) / (1.0 + small)
    elif code == HINGE_LOG:
        slope = 2.0 * max(log_bound - target_log, 0.0)
        value = 0.25 * slope * slope
    elif code == LOG:
        value = log_bound
    for layer in range(n_layers):
        count = _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _MULTIPLICITY), 1)[0]
        change = slope / sigma[layer]
        if code == LAYER_SUM:
            change = 1.0
        elif code == LAYER_SUM_SQUARES:
            change = 2.0 * sigma[layer]
        coefficient = np.float32(factor * count * change)
        usable = sigma[layer] > 0.0 and math.isfinite(coefficient)
        coefficients[layer] = coefficient if usable else np.float32(0.0)
    _f32(header[_VALUE], 1)[0] = np.float32(factor * value)


@_compiled
def _run(header_address: int, n_iterations: int, code: int, target_log: float, factor: float) -> None:
    """Iterate (`n_iterations` >= 0), weigh (`code` >= 0) and update the gradients (`code` >= -1)."""
    header = _i64(header_address, _N_HEADER)
    header[_ADVANCE] = n_iterations > 0
    if n_iterations >= 0:
        for _ in range(max(n_iterations, 1)):
            _iterate(header)
    if code >= 0:
        _weigh(header, code, target_log, factor)
    if code < _COEFFICIENTS_GIVEN:
        return
    if header[_THREADS] > 1:
        _run_phase(header, header[_N_PHASES] - 1)
        return
    for layer in range(header[_LAYERS]):
        row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
        _update(header, layer, header[_BAND], 0, row[_Q])
