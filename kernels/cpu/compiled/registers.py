"""Loops over registers of eight numbers, for the compiled CPU kernels.

Numba has no vector types. The few loops that must run in registers are written here in LLVM's own terms. To compiled
code each is a function of addresses, counts and leading dimensions, all int64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import DOUBLE, FAST, FLOAT, INT, LANES, VECTOR, WIDE, Emitter, emitted


def _build_dots(n_rows: int) -> Any:
    def dots(e: Emitter, a: Any, a_ld: Any, size: Any, x: Any, x_ld: Any, out: Any, out_ld: Any, ahead: Any) -> None:
        sums = e.variables(VECTOR, n_rows)
        rows = [e.at(a, e.builder.mul(a_ld, INT(k))) for k in range(n_rows)]

        def add(column: Any) -> None:
            vector = e.load(e.at(x, e.builder.mul(column, x_ld)), VECTOR)
            for row, total in zip(rows, sums, strict=True):
                e.add_to(total, e.mul(e.splat(e.load(e.at(row, column), FLOAT), VECTOR), vector))

        # A cache line of each row at a time. The next rows are asked for: they are often pages away, where the
        # processor would not guess.
        lines = e.builder.lshr(size, INT(4))
        with e.for_range(lines) as line:
            first = e.builder.shl(line.index, INT(4))
            for row in rows:
                e.prefetch(e.at(row, first, ahead))
            with e.for_range(INT(16)) as loop:
                add(e.builder.add(first, loop.index))
        done = e.builder.shl(lines, INT(4))
        with e.for_range(e.builder.sub(size, done)) as loop:
            add(e.builder.add(done, loop.index))
        for k, total in enumerate(sums):
            target = e.at(out, e.builder.mul(out_ld, INT(k)))
            e.store(e.add(e.load(target, VECTOR), e.builder.load(total)), target)

    return emitted(dots)


def _build_axpys(n_rows: int) -> Any:
    def axpys(e: Emitter, a: Any, a_ld: Any, size: Any, x: Any, x_ld: Any, out: Any, out_ld: Any) -> None:
        factors = [e.load(e.at(x, e.builder.mul(x_ld, INT(k))), VECTOR) for k in range(n_rows)]
        rows = [e.at(a, e.builder.mul(a_ld, INT(k))) for k in range(n_rows)]
        with e.for_range(size) as loop:
            target = e.at(out, e.builder.mul(loop.index, out_ld))
            terms = [
                e.mul(e.splat(e.load(e.at(row, loop.index), FLOAT), VECTOR), factor)
                for row, factor in zip(rows, factors, strict=True)
            ]
            # Two chains: one of eight additions would have to wait for itself.
            chains = [e.load(target, VECTOR), *terms[:1]]
            for k, term in enumerate(terms[1:]):
                chains[k % 2] = e.add(chains[k % 2], term)
            e.store(e.add(*chains), target)

    return emitted(axpys)


dots8, dots1 = _build_dots(8), _build_dots(1)
"""Add ``A X`` to `out`: A (8 or 1, size), X (size, 8), out (8 or 1, 8), each with its leading dimension behind it.

The last argument is how far behind its like in A an element lies that will be read soon."""
axpys8, axpys1 = _build_axpys(8), _build_axpys(1)
"""Add ``A^T X`` to `out`: A (8 or 1, size), X (8 or 1, 8), out (size, 8)."""


@emitted
def write_gram(e: Emitter, x: Any, y: Any, ld: Any, size: Any, out: Any, out_ld: Any) -> None:
    """Write ``X^T Y`` in fp64 to `out` (8, 8): X and Y (size, 8) in fp32 with one leading dimension."""
    sums = e.variables(WIDE, LANES)
    with e.for_range(size) as loop:
        offset = e.builder.mul(loop.index, ld)
        vector = e.builder.fpext(e.load(e.at(y, offset), VECTOR), WIDE)
        for k, total in enumerate(sums):
            factor = e.builder.fpext(e.load(e.at(x, offset, INT(k)), FLOAT), DOUBLE)
            e.add_to(total, e.mul(e.splat(factor, WIDE), vector))
    for k, total in enumerate(sums):
        e.store(e.builder.load(total), e.at(out, e.builder.mul(out_ld, INT(k)), size=8))


@emitted
def add_columns(e: Emitter, x: Any, ld: Any, size: Any, weights: Any, out: Any) -> None:
    """Add ``X w`` to `out` (size,): X (size, 8), w (8,) in fp32."""
    factors = e.load(weights, VECTOR)
    with e.for_range(size) as loop:
        vector = e.mul(e.load(e.at(x, e.builder.mul(loop.index, ld)), VECTOR), factors)
        target = e.at(out, loop.index)
        e.store(e.add(e.load(target, FLOAT), e.sum_of(vector)), target)


@emitted
def row_dots(e: Emitter, x: Any, y: Any, ld: Any, eights: Any, out: Any, out_ld: Any) -> None:
    """Add ``X Y^T`` to `out` (4, 4) in fp64: X and Y (4, 8 n), rows with one leading dimension, summed in fp32."""
    sums = e.variables(VECTOR, 16)
    with e.for_range(eights) as loop:
        column = e.builder.shl(loop.index, INT(3))
        a, b = ([e.load(e.at(rows, e.builder.mul(ld, INT(k)), column), VECTOR) for k in range(4)] for rows in (x, y))
        for k, total in enumerate(sums):
            e.add_to(total, e.mul(a[k // 4], b[k % 4]))
    for k, total in enumerate(sums):
        target = e.at(out, e.builder.mul(out_ld, INT(k // 4)), INT(k % 4), size=8)
        found = e.builder.fpext(e.sum_of(e.builder.load(total)), DOUBLE)
        e.store(e.add(e.load(target, DOUBLE), found), target)


@emitted
def mix_rows(e: Emitter, x: Any, ld: Any, eights: Any, factors: Any, factors_ld: Any) -> None:
    """Replace X (8, 8 n), rows with a leading dimension, by ``F X`` for factors F (8, 8) with theirs."""
    with e.for_range(eights) as loop:
        column = e.builder.shl(loop.index, INT(3))
        addresses = [e.at(x, e.builder.mul(ld, INT(k)), column) for k in range(LANES)]
        rows = [e.load(address, VECTOR) for address in addresses]
        for k, address in enumerate(addresses):
            own = [e.load(e.at(factors, e.builder.mul(factors_ld, INT(k)), INT(j)), FLOAT) for j in range(LANES)]
            terms = [e.mul(e.splat(factor, VECTOR), row) for factor, row in zip(own, rows, strict=True)]
            # Two chains, as above.
            even, odd = terms[:2]
            for j in range(2, LANES, 2):
                even, odd = e.add(even, terms[j]), e.add(odd, terms[j + 1])
            e.store(e.add(even, odd), address)


@emitted
def rotate(e: Emitter, x: Any, y: Any, factors: Any) -> None:
    """Rotate two rows of eight numbers in fp64 by the cosine and sine at `factors`."""
    cos, sin = (e.splat(e.load(e.at(factors, INT(k), size=8), DOUBLE), WIDE) for k in range(2))
    a, b = e.load(x, WIDE), e.load(y, WIDE)
    e.store(e.builder.fsub(e.mul(cos, a), e.mul(sin, b), flags=FAST), x)
    e.store(e.add(e.mul(sin, a), e.mul(cos, b)), y)


@emitted
def column_dots(e: Emitter, column: Any, x: Any, ld: Any, size: Any, out: Any) -> None:
    """Write ``x^T Y`` to `out` (8,): x (size,) and Y (size, 8), both with the same leading dimension."""
    # Four sums: one would wait for its own addition in every row.
    sums = e.variables(VECTOR, 4)

    def add(row: Any, total: Any) -> None:
        offset = e.builder.mul(row, ld)
        factor = e.splat(e.load(e.at(column, offset), FLOAT), VECTOR)
        e.add_to(total, e.mul(factor, e.load(e.at(x, offset), VECTOR)))

    fours = e.builder.lshr(size, INT(2))
    with e.for_range(fours) as loop:
        first = e.builder.shl(loop.index, INT(2))
        for k, total in enumerate(sums):
            add(e.builder.add(first, INT(k)), total)
    done = e.builder.shl(fours, INT(2))
    with e.for_range(e.builder.sub(size, done)) as loop:
        add(e.builder.add(done, loop.index), sums[0])
    a, b, c, d = (e.builder.load(total) for total in sums)
    e.store(e.add(e.add(a, b), e.add(c, d)), out)


def _build_reflect(forward: bool) -> Any:
    def reflect(
        e: Emitter, x: Any, row: Any, ld: Any, size: Any, column: Any, lane: Any, sums: Any, factors: Any
    ) -> None:
        """Apply a reflection to eight columns; see `_orthonormalise`."""
        builder, number = e.builder, ir.VectorType(ir.IntType(32), LANES)
        scale, inverse = (e.splat(e.load(e.at(factors, INT(at.MAX_BLOCK_SIZE * k)), FLOAT), VECTOR) for k in range(2))
        nothing = ir.Constant(VECTOR, None)
        one = builder.insert_element(
            ir.Constant(number, ir.Undefined), builder.trunc(lane, ir.IntType(32)), ir.IntType(32)(0)
        )
        own_lane = builder.shuffle_vector(one, one, ir.Constant(number, [0] * LANES))
        lanes = ir.Constant(number, list(range(LANES)))
        is_later, is_own = builder.icmp_signed(">", lanes, own_lane), builder.icmp_signed("==", lanes, own_lane)
        head = e.load(row, VECTOR)
        change = e.mul(e.mul(scale, inverse), e.load(sums, VECTOR))
        if forward:
            change = e.add(change, e.mul(scale, head))
        minus = builder.fsub(nothing, builder.select(is_later, change, nothing), flags=FAST)
        e.store(e.add(head, minus) if forward else builder.select(is_later, minus, head), row)
        added = e.mul(minus, inverse)
        if not forward:
            added = builder.select(is_own, builder.fsub(nothing, e.mul(scale, inverse), flags=FAST), added)
        with e.for_range(size) as loop:
            offset = builder.mul(loop.index, ld)
            factor = e.splat(e.load(e.at(column, offset), FLOAT), VECTOR)
            target = e.at(x, offset)
            kept = e.load(target, VECTOR)
            if not forward:
                kept = builder.select(is_own, nothing, kept)
            e.store(e.add(kept, e.mul(factor, added)), target)

    return emitted(reflect)


reflect, reflect_back = _build_reflect(True), _build_reflect(False)
"""Apply reflection k to eight columns.

X (size, 8) below row k, that row, X's leading dimension and size; the vector of the reflection (size,), which lane it
lies in (below 0: in none of these), its products with the columns (8,), and where its factors are. Backwards, what is
kept in its own lane becomes a column of the basis."""


@emitted
def rank_one(e: Emitter, out: Any, ld: Any, rows: Any, size: Any, x: Any, y: Any, factor: Any) -> None:
    """Add ``c x y^T`` to `out` (rows, size), whose leading dimension comes next; c is at the last address."""
    scale = e.load(factor, FLOAT)
    eights = e.builder.lshr(size, INT(3))
    done = e.builder.shl(eights, INT(3))
    with e.for_range(rows) as outer:
        row = e.at(out, e.builder.mul(outer.index, ld))
        scalar = e.mul(scale, e.load(e.at(x, outer.index), FLOAT))
        vector = e.splat(scalar, VECTOR)
        with e.for_range(eights) as loop:
            column = e.builder.shl(loop.index, INT(3))
            target = e.at(row, column)
            e.store(e.add(e.load(target, VECTOR), e.mul(vector, e.load(e.at(y, column), VECTOR))), target)
        with e.for_range(e.builder.sub(size, done)) as loop:
            column = e.builder.add(done, loop.index)
            target = e.at(row, column)
            e.store(e.add(e.load(target, FLOAT), e.mul(scalar, e.load(e.at(y, column), FLOAT))), target)


@partial(emitted, result=types.int64)
def fetch_add(e: Emitter, address: Any, amount: Any) -> Any:
    """Return the number at an address and add to it, whatever other threads do there."""
    return e.builder.atomic_rmw("add", e.builder.inttoptr(address, INT.as_pointer()), amount, "acq_rel")


@emitted
def start_threads(e: Emitter, pool: Any, thread: Any, header: Any, threads: Any) -> None:
    """Run a function of the header in so many threads, the calling one among them, and wait for all."""
    # void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags)
    number = ir.IntType(32)
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, number, number])
    arguments = [e.builder.inttoptr(thread, pointer), e.builder.inttoptr(header, pointer)]
    arguments += [e.builder.trunc(threads, number), number(0)]
    e.builder.call(e.builder.inttoptr(pool, kind.as_pointer()), arguments)
