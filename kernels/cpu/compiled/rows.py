"""Rayleigh-Ritz and the next block where an operator's maps are PyTorch's own, compiled for the CPU.

A convolution forms ``T = V A^T`` and ``Z = T A`` itself, as rows of up to a million elements. What remains of
:func:`lightning_lip.kernels.reference.iterate` takes a dozen passes over them as PyTorch operations, and as long as a
small map does. Here it is two: both Gram matrices in one, ``u``, ``v`` and the next block in the other, between them
some arithmetic with matrices of r x r in fp64.

Deltas from the specification:

1. ``Z`` is formed of the images as they come and rotated afterwards, as in
   :mod:`lightning_lip.kernels.cpu.compiled.layers`.
2. The basis comes from the Cholesky factor of the Gram matrix, of the
   rotated rows. Where rounding would show in it, because rows are nearly dependent or cancel each other, there is a
   second pass (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm"); where that would not
   help, and for rows that are zero, not finite or of squares out of range, the reference serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F64, I64, compiled, f32, f64, i64, sources_checksum
from lightning_lip.kernels.cpu.compiled.products import copy
from lightning_lip.kernels.cpu.compiled.registers import fetch_add, mix_rows, row_dots, start_threads
from lightning_lip.kernels.cpu.compiled.ritz import ritz

LANES = at.MAX_BLOCK_SIZE
CHUNK = 1 << 13
"""Columns of a task: a sum has its place in the order whatever the threads."""
STRIP = 512
"""Columns that are worked on while they lie in a first-level cache, and summed in fp32."""

_LEAST_SQUARE, _MOST_SQUARE = 1e-20, 1e30
"""Between these squared lengths of rows fp32 loses nothing to the ends of its range."""
LEAST_PIVOT = 0.1
"""How far each row must lie from the span of those before it, relative to its length."""
_GOOD_NOISE, _MOST_NOISE = 4.0, 300.0
"""Lengths of the terms that add up to a unit row: its rounding, over that of one entry. Up to the first bound one pass
is enough, beyond the second one two are not."""

(
    R,
    Q,
    P,
    IMAGES,  # T (r, q) fp32
    PRODUCTS,  # Z (r, p) fp32, and then the next block
    LEFT,  # u (q,) fp32
    SIGMA,  # fp64
    SUMS,  # a Gram matrix (lanes, lanes) fp64 for each task
    MIX,  # (lanes + 1, lanes) fp32: what makes the next block of Z, then what makes u of T
    STRIPS,  # (r, strip) fp32 for each thread
    POOL,  # GOMP_parallel, 0 where there is none
    THREAD,  # what each thread runs
    THREADS,
    COMBINES,  # whether tasks combine rows; else they form Gram matrices
    NEXT_TASK,
    LAST_TASK,
    NEXT_THREAD,
    N_HEADER,
) = range(18)


@compiled
def _n_chunks(size: int) -> int:
    return (size + CHUNK - 1) // CHUNK


@compiled
def _add_dots(x: int, ld: int, i: int, j: int, size: int, out: F64) -> None:
    """Add the product of two rows of X (rows, ld) to `out` (lanes, lanes)."""
    a, b = f32(x + 4 * ld * i, size), f32(x + 4 * ld * j, size)
    total = np.float32(0)
    for k in range(size):
        total += a[k] * b[k]
    out[LANES * i + j] += np.float64(total)


@compiled
def _gram_rows(x: int, ld: int, r: int, begin: int, end: int, out: F64) -> None:
    """Write the Gram matrix of columns of X (r, ld), its upper triangle too, to `out` (lanes, lanes)."""
    out[:] = 0.0
    fours = r // 4 * 4
    for first in range(begin, end, STRIP):
        size = min(STRIP, end - first)
        strip, done = x + 4 * first, size // 8 * 8
        for i in range(0, fours, 4):
            for j in range(0, i + 1, 4):
                target = out.ctypes.data + 8 * (LANES * i + j)
                row_dots(strip + 4 * ld * i, strip + 4 * ld * j, ld, done // 8, target, LANES)
        for i in range(r):
            for j in range(i + 1):
                if i < fours:
                    _add_dots(strip + 4 * done, ld, i, j, size - done, out)
                else:
                    _add_dots(strip, ld, i, j, size, out)
    for i in range(r):
        for j in range(i):
            out[LANES * j + i] = out[LANES * i + j]


@compiled
def _combine_rows(out: int, x: int, ld: int, r: int, mix: int, size: int) -> None:
    """Write one row (size,): the rows of X (r, ld) with the weights `mix` (r,)."""
    row, factors = f32(out, size), f32(mix, r)
    row[:] = 0
    for j in range(0, r // 4 * 4, 4):
        a, b = f32(x + 4 * ld * j, size), f32(x + 4 * ld * (j + 1), size)
        c, d = f32(x + 4 * ld * (j + 2), size), f32(x + 4 * ld * (j + 3), size)
        for k in range(size):
            row[k] += factors[j] * a[k] + factors[j + 1] * b[k] + (factors[j + 2] * c[k] + factors[j + 3] * d[k])
    for j in range(r // 4 * 4, r):
        a = f32(x + 4 * ld * j, size)
        for k in range(size):
            row[k] += factors[j] * a[k]


@compiled
def _combine(header: I64, is_product: bool, begin: int, end: int, strip: int) -> None:
    """Write u, or the next block in the place of Z, in some columns."""
    r, q, p, mix = header[R], header[Q], header[P], header[MIX]
    for first in range(begin, end, STRIP):
        size = min(STRIP, end - first)
        if not is_product:
            images = header[IMAGES] + 4 * first
            _combine_rows(header[LEFT] + 4 * first, images, q, r, mix + 4 * LANES * LANES, size)
            continue
        products = header[PRODUCTS] + 4 * first
        if r == 8:
            done = size // 8 * 8
            mix_rows(products, p, done // 8, mix, LANES)
            products += 4 * done
            size -= done
        for j in range(r):
            copy(f32(strip + 4 * STRIP * j, size), f32(products + 4 * p * j, size))
        for j in range(r):
            _combine_rows(products + 4 * p * j, strip, STRIP, r, mix + 4 * LANES * j, size)


@compiled
def _run_thread(header: I64) -> None:
    """Do tasks until none is left: first those of T, then those of Z, each some columns."""
    q, p, r = header[Q], header[P], header[R]
    strip = header[STRIPS] + 4 * r * STRIP * fetch_add(header.ctypes.data + 8 * NEXT_THREAD, 1)
    n_images = _n_chunks(q)
    while True:
        task = fetch_add(header.ctypes.data + 8 * NEXT_TASK, 1)
        if task >= header[LAST_TASK]:
            return
        is_product = task >= n_images
        begin = CHUNK * (task - n_images if is_product else task)
        end = min(begin + CHUNK, p if is_product else q)
        if header[COMBINES]:
            _combine(header, is_product, begin, end, strip)
            continue
        sums = f64(header[SUMS] + 8 * LANES * LANES * task, LANES * LANES)
        _gram_rows(header[PRODUCTS if is_product else IMAGES], p if is_product else q, r, begin, end, sums)


@compiled
def _run_tasks(header: I64, combines: bool, first: int) -> None:
    """Do the tasks from one on, in several threads or in this one."""
    header[COMBINES], header[NEXT_TASK], header[NEXT_THREAD] = combines, first, 0
    header[LAST_TASK] = _n_chunks(header[Q]) + _n_chunks(header[P])
    if header[THREADS] > 1:
        start_threads(header[POOL], header[THREAD], header.ctypes.data, header[THREADS])
    else:
        _run_thread(header)


@compiled
def _summed(header: I64, begin: int, end: int) -> F64:
    """Add the Gram matrices of some tasks up, in the place of the first one's."""
    size = LANES * LANES
    total = f64(header[SUMS] + 8 * size * begin, size)
    for task in range(begin + 1, end):
        other = f64(header[SUMS] + 8 * size * task, size)
        for k in range(size):
            total[k] += other[k]
    return total


@compiled
def _is_in_range(gram: F64, r: int) -> bool:
    """Return whether the rows' squares are in range; those of rows that are not finite are not."""
    for k in range(r):
        square = gram[(LANES + 1) * k]
        if not _LEAST_SQUARE < square < _MOST_SQUARE:
            return False
    return True


@compiled
def _times_transposed(a: F64, b: F64, r: int, out: F64) -> None:
    """Write ``A B^T`` (r, r)."""
    for i in range(r):
        for j in range(r):
            total = 0.0
            for k in range(r):
                total += a[LANES * i + k] * b[LANES * j + k]
            out[LANES * i + j] = total


@compiled
def _mix_of(gram: F64, rotation: F64, r: int, rotated: F64, factor: F64, mix: int) -> tuple[float, float]:
    """Write what makes an orthonormal basis of rows: the inverse Cholesky factor of their rotated Gram matrix, rotated.

    Args:
        gram: G, of the rows as they are.
        rotation: Q^T, whose rows mix them.
        r: Rows.
        rotated: Receives ``Q^T G Q``.
        factor: Scratch.
        mix: Address of the result, fp32.

    Returns:
        The squared length of the first rotated row, and the noise of the basis; infinite where there is none.
    """
    _times_transposed(rotation, gram, r, factor)  # G is symmetric
    _times_transposed(factor, rotation, r, rotated)
    first = rotated[0]
    noise = 0.0
    for i in range(r):
        # Row i of the Cholesky factor, and then of its inverse times Q^T.
        for j in range(i + 1):
            total = rotated[LANES * i + j]
            for k in range(j):
                total -= factor[LANES * i + k] * factor[LANES * j + k]
            if j < i:
                factor[LANES * i + j] = total / factor[(LANES + 1) * j]
            elif total > LEAST_PIVOT * LEAST_PIVOT * rotated[(LANES + 1) * i]:
                factor[(LANES + 1) * i] = math.sqrt(total)
            else:  # NaN, too
                return first, math.inf
        length = 0.0
        for j in range(r):
            total = rotation[LANES * i + j]
            for k in range(i):
                total -= factor[LANES * i + k] * rotation[LANES * k + j]
            total /= factor[(LANES + 1) * i]
            rotation[LANES * i + j] = total
            f32(mix + 4 * LANES * i, r)[j] = np.float32(total)
            length += abs(total) * math.sqrt(gram[(LANES + 1) * j])
        noise = max(noise, length)
    return first, noise


@compiled
def _rayleigh_ritz(header: I64, rotation: F64, scratch: F64) -> float:
    """Write Q^T, and what makes u of T; return the first image's squared length, NaN where that is out of range."""
    r = header[R]
    gram = _summed(header, 0, _n_chunks(header[Q]))
    if not _is_in_range(gram, r):
        return math.nan
    square: float = ritz(r, LANES, gram.ctypes.data, rotation.ctypes.data, scratch.ctypes.data)
    leading = f32(header[MIX] + 4 * LANES * LANES, r)
    for j in range(r):
        leading[j] = np.float32(rotation[j] / math.sqrt(square))
    return square


@compiled
def _finish(header: I64) -> bool:
    """Turn T and Z into sigma, u and the next block, whose first row is v; return whether that was possible."""
    n_images, size = _n_chunks(header[Q]), LANES * LANES
    n_tasks = n_images + _n_chunks(header[P])
    scratch = header[SUMS] + 8 * size * n_tasks
    rotation, rotated, factor = f64(scratch, size), f64(scratch + 8 * size, size), f64(scratch + 16 * size, size)
    for again in range(2):
        first = n_images if again else 0
        _run_tasks(header, False, first)
        gram = _summed(header, n_images, n_tasks)
        if again:
            rotation[:] = 0.0
            for k in range(header[R]):
                rotation[(LANES + 1) * k] = 1.0
        image_square = 1.0 if again else _rayleigh_ritz(header, rotation, factor)
        if math.isnan(image_square) or not _is_in_range(gram, header[R]):
            return False
        product_square, noise = _mix_of(gram, rotation, header[R], rotated, factor, header[MIX])
        if not noise < (_GOOD_NOISE if again else _MOST_NOISE):
            return False
        if not again:
            f64(header[SIGMA], 1)[0] = math.sqrt(product_square / image_square)
        _run_tasks(header, True, first)
        if noise < _GOOD_NOISE:
            return True
    return False


def entries(checksum: int) -> tuple[Any, Callable[[int], None]]:
    """Return what Python calls, compiled and cached, and what a thread of the pool runs; as `entries` of layers."""

    def run(header_address: int) -> bool:
        _ = checksum
        return _finish(i64(header_address, N_HEADER))

    def thread(header_address: int) -> None:
        _ = checksum
        _run_thread(i64(header_address, N_HEADER))

    return numba.njit(nogil=True, cache=True, error_model="numpy")(run), thread


run, thread = entries(sources_checksum())
