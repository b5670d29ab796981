"""Loops over registers of eight numbers, for the compiled CPU kernels.

Numba has no vector types. The few loops that must run in registers are written here in LLVM's own terms. To compiled
code each is a function of addresses, counts and leading dimensions, all int64.
"""

from __future__ import annotations

from collections.abc import Callable
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
    sums = e.variables(VECTOR, 4)

    def add(row: Any, total: Any) -> None:
        offset = e.builder.mul(row, ld)
        factor = e.splat(e.load(e.at(column, offset), FLOAT), VECTOR)
        e.add_to(total, e.mul(factor, e.load(e.at(x, offset), VECTOR)))

    _in_fours(e, size, sums, add)
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


def _build_rank(n_terms: int) -> Any:
    def emit(e: Emitter, out: Any, ld: Any, rows: Any, size: Any, xs: list[Any], ys: list[Any], factor: Any) -> None:
        scale = e.load(factor, FLOAT)
        eights = e.builder.lshr(size, INT(3))
        done = e.builder.shl(eights, INT(3))
        with e.for_range(rows) as outer:
            row = e.at(out, e.builder.mul(outer.index, ld))
            scalars = [e.mul(scale, e.load(e.at(x, outer.index), FLOAT)) for x in xs]
            vectors = [e.splat(scalar, VECTOR) for scalar in scalars]

            def add(column: Any, factors: list[Any], kind: Any, row: Any = row) -> None:
                target = e.at(row, column)
                total = e.load(target, kind)
                for factor, y in zip(factors, ys, strict=True):
                    total = e.add(total, e.mul(factor, e.load(e.at(y, column), kind)))
                e.store(total, target)

            with e.for_range(eights) as loop:
                add(e.builder.shl(loop.index, INT(3)), vectors, VECTOR)
            with e.for_range(e.builder.sub(size, done)) as loop:
                add(e.builder.add(done, loop.index), scalars, FLOAT)

    def one(e: Emitter, out: Any, ld: Any, rows: Any, size: Any, x: Any, y: Any, factor: Any) -> None:
        emit(e, out, ld, rows, size, [x], [y], factor)

    def two(e: Emitter, out: Any, ld: Any, rows: Any, size: Any, x: Any, x2: Any, y: Any, y2: Any, factor: Any) -> None:
        emit(e, out, ld, rows, size, [x, x2], [y, y2], factor)

    return emitted(one if n_terms == 1 else two)


rank_one, rank_two = _build_rank(1), _build_rank(2)
"""Add ``c x y^T``, or two such terms, to `out` (rows, size), whose leading dimension comes next; c is at the last
address. `out` is read and written once."""


@emitted
def column_squares(e: Emitter, x: Any, ld: Any, size: Any, out: Any) -> None:
    """Write the squared norms of the columns of X (size, 8) in fp64 to `out` (8,)."""
    sums = e.variables(WIDE, 4)

    def add(row: Any, total: Any) -> None:
        vector = e.builder.fpext(e.load(e.at(x, e.builder.mul(row, ld)), VECTOR), WIDE)
        e.add_to(total, e.mul(vector, vector))

    _in_fours(e, size, sums, add)
    a, b, c, d = (e.builder.load(total) for total in sums)
    e.store(e.add(e.add(a, b), e.add(c, d)), out)


@emitted
def scale_columns(e: Emitter, x: Any, ld: Any, size: Any, factors: Any) -> None:
    """Multiply the columns of X (size, 8) by factors (8,)."""
    factor = e.load(factors, VECTOR)
    with e.for_range(size) as loop:
        target = e.at(x, e.builder.mul(loop.index, ld))
        e.store(e.mul(e.load(target, VECTOR), factor), target)


@emitted
def pair_sums(e: Emitter, x: Any, y: Any, ld: Any, size: Any, even: Any, odd: Any) -> None:
    """Add to `even` (8,) the column sums of X times Y, and to `odd` of X times Y with neighbours exchanged: (size, 8).

    Of columns that are real and imaginary parts in turn, ``<y, x>`` is the sum of two neighbours in `even`, and i times
    the second less the first in `odd`.
    """
    sums = e.variables(VECTOR, 8)

    def add(row: Any, total: Any) -> None:
        offset = e.builder.mul(row, ld)
        a, b = e.load(e.at(x, offset), VECTOR), e.load(e.at(y, offset), VECTOR)
        e.add_to(total, e.mul(a, b))
        e.add_to(sums[sums.index(total) + 4], e.mul(a, _exchanged(e, b)))

    _in_fours(e, size, sums[:4], add)
    for parts, target in ((sums[:4], even), (sums[4:], odd)):
        a, b, c, d = (e.builder.load(total) for total in parts)
        e.store(e.add(e.load(target, VECTOR), e.add(e.add(a, b), e.add(c, d))), target)


def _in_fours(e: Emitter, size: Any, sums: list[Any], add: Callable[[Any, Any], None]) -> None:
    """Add rows to four sums in turn: one would wait for its own addition in every row."""
    fours = e.builder.lshr(size, INT(2))
    with e.for_range(fours) as loop:
        first = e.builder.shl(loop.index, INT(2))
        for k, total in enumerate(sums):
            add(e.builder.add(first, INT(k)), total)
    done = e.builder.shl(fours, INT(2))
    with e.for_range(e.builder.sub(size, done)) as loop:
        add(e.builder.add(done, loop.index), sums[0])


def _exchanged(e: Emitter, vector: Any) -> Any:
    """Return a vector whose neighbours, real and imaginary parts, have changed places."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [k ^ 1 for k in range(LANES)])
    return e.builder.shuffle_vector(vector, vector, mask)


def _build_turn(adds: bool) -> Any:
    def turn(e: Emitter, x: Any, x_ld: Any, size: Any, cosines: Any, sines: Any, out: Any, out_ld: Any) -> None:
        cosine, sine = e.load(cosines, VECTOR), e.load(sines, VECTOR)
        with e.for_range(size) as loop:
            vector = e.load(e.at(x, e.builder.mul(loop.index, x_ld)), VECTOR)
            target = e.at(out, e.builder.mul(loop.index, out_ld))
            turned = e.add(e.mul(vector, cosine), e.mul(_exchanged(e, vector), sine))
            e.store(e.add(e.load(target, VECTOR), turned) if adds else turned, target)

    return emitted(turn)


turn, turn_and_add = _build_turn(False), _build_turn(True)
"""Turn complex numbers, X (size, 8) with real and imaginary parts in turn, by angles: to `out`, or added to it.

By the cosines (8,) and, with the signs that neighbours take, the sines (8,) of one angle for each column."""


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
