"""Rayleigh-Ritz and the next block where an operator's maps are PyTorch's own, compiled for the CPU.

A convolution forms ``T = V A^T`` and ``Z = T A`` itself, as rows of up to a million elements. What remains of
:func:`lightning_lip.kernels.reference.iterate` takes a dozen passes over them as PyTorch operations, and as long as a
small map does. Here it is two: both Gram matrices in one, ``u``, ``v`` and the next block in the other, between them
some arithmetic with matrices of r x r in fp64.

Deltas from the specification:

1. ``Z`` is formed of the images as they come and rotated afterwards, as in
:mod:`lightning_lip.kernels.cpu.compiled.layers`. 2. The basis comes from the Cholesky factor of the Gram matrix, of the
   rotated rows. Where rounding would show in it, because rows are nearly dependent or cancel each other, there is a
   second pass (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm"); where that would not
   help, and for rows that are zero, not finite or of squares out of range, the reference serves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from lightning_lip.kernels.cpu.compiled.registers import (
    _F64,
    _I64,
    _compiled,
    _f32,
    _f64,
    _fetch_add,
    _i64,
    _mix_rows,
    _row_dots,
    _start_threads,
    sources_checksum,
)
from lightning_lip.kernels.cpu.compiled.ritz import _ritz
from lightning_lip.kernels.cpu.layout import MAX_BLOCK_SIZE

_LANES = MAX_BLOCK_SIZE
_CHUNK = 1 << 13
"""Columns of a task: a sum has its place in the order whatever the threads."""
_STRIP = 512
"""Columns that are worked on while they lie in a first-level cache, and summed in fp32."""

_LEAST_SQUARE, _MOST_SQUARE = 1e-20, 1e30
"""Between these squared lengths of rows fp32 loses nothing to the ends of its range."""
_LEAST_PIVOT = 0.1
"""How far each row must lie from the span of those before it, relative to its length."""
_GOOD_NOISE, _MOST_NOISE = 4.0, 300.0
"""Lengths of the terms that add up to a unit row: its rounding, over that of one entry. Up to the first bound one pass
is enough, beyond the second one two are not."""

(
    _R,
    _Q,
    _P,
    _IMAGES,  # T (r, q) fp32
    _PRODUCTS,  # Z (r, p) fp32, and then the next block
    _LEFT,  # u (q,) fp32
    _SIGMA,  # fp64
    _SUMS,  # a Gram matrix (lanes, lanes) fp64 for each task
    _MIX,  # (lanes + 1, lanes) fp32: what makes the next block of Z, then what makes u of T
    _STRIPS,  # (r, strip) fp32 for each thread
    _POOL,  # GOMP_parallel, 0 where there is none
    _THREAD,  # what each thread runs
    _THREADS,
    _COMBINES,  # whether tasks combine rows; else they form Gram matrices
    _NEXT_TASK,
    _LAST_TASK,
    _NEXT_THREAD,
    _N_HEADER,
) = range(18)


@_compiled
def _n_chunks(size: int) -> int:
    return (size + _CHUNK - 1) // _CHUNK


@_compiled
def _add_dots(x: int, ld: int, i: int, j: int, size: int, out: _F64) -> None:
    """Add the product of two rows of X (rows, ld) to `out` (lanes, lanes)."""
    a, b = _f32(x + 4 * ld * i, size), _f32(x + 4 * ld * j, size)
    total = np.float32(0)
    for k in range(size):
        total += a[k] * b[k]
    out[_LANES * i + j] += np.float64(total)


@_compiled
def _gram_rows(x: int, ld: int, r: int, begin: int, end: int, out: _F64) -> None:
    """Write the Gram matrix of columns of X (r, ld), its upper triangle too, to `out` (lanes, lanes)."""
    out[:] = 0.0
    fours = r // 4 * 4
    for first in range(begin, end, _STRIP):
        size = min(_STRIP, end - first)
        strip, done = x + 4 * first, size // 8 * 8
        for i in range(0, fours, 4):
            for j in range(0, i + 1, 4):
                target = out.ctypes.data + 8 * (_LANES * i + j)
                _row_dots(strip + 4 * ld * i, strip + 4 * ld * j, ld, done // 8, target, _LANES)
        for i in range(r):
            for j in range(i + 1):
                if i < fours:
                    _add_dots(strip + 4 * done, ld, i, j, size - done, out)
                else:
                    _add_dots(strip, ld, i, j, size, out)
    for i in range(r):
        for j in range(i):
            out[_LANES * j + i] = out[_LANES * i + j]


@_compiled
def _combine_rows(out: int, x: int, ld: int, r: int, mix: int, size: int) -> None:
    """Write one row (size,): the rows of X (r, ld) with the weights `mix` (r,)."""
    row, factors = _f32(out, size), _f32(mix, r)
    row[:] = 0
    j = 0
    while j + 4 <= r:
        a, b = _f32(x + 4 * ld * j, size), _f32(x + 4 * ld * (j + 1), size)
        c, d = _f32(x + 4 * ld * (j + 2), size), _f32(x + 4 * ld * (j + 3), size)
        for k in range(size):
            row[k] += factors[j] * a[k] + factors[j + 1] * b[k] + (factors[j + 2] * c[k] + factors[j + 3] * d[k])
        j += 4
    while j < r:
        a = _f32(x + 4 * ld * j, size)
        for k in range(size):
            row[k] += factors[j] * a[k]
        j += 1


@_compiled
def _combine(header: _I64, is_product: bool, begin: int, end: int, strip: int) -> None:
    """Write u, or the next block in the place of Z, in some columns."""
    r, q, p, mix = header[_R], header[_Q], header[_P], header[_MIX]
    for first in range(begin, end, _STRIP):
        size = min(_STRIP, end - first)
        if not is_product:
            images = header[_IMAGES] + 4 * first
            _combine_rows(header[_LEFT] + 4 * first, images, q, r, mix + 4 * _LANES * _LANES, size)
            continue
        products = header[_PRODUCTS] + 4 * first
        if r == 8:
            done = size // 8 * 8
            _mix_rows(products, p, done // 8, mix, _LANES)
            products += 4 * done
            size -= done
        for j in range(r):
            source, target = _f32(products + 4 * p * j, size), _f32(strip + 4 * _STRIP * j, size)
            for k in range(size):
                target[k] = source[k]
        for j in range(r):
            _combine_rows(products + 4 * p * j, strip, _STRIP, r, mix + 4 * _LANES * j, size)


@_compiled
def _run_thread(header: _I64) -> None:
    """Do tasks until none is left: first those of T, then those of Z, each some columns."""
    q, p, r = header[_Q], header[_P], header[_R]
    strip = header[_STRIPS] + 4 * r * _STRIP * _fetch_add(header.ctypes.data + 8 * _NEXT_THREAD, 1)
    n_images = _n_chunks(q)
    while True:
        task = _fetch_add(header.ctypes.data + 8 * _NEXT_TASK, 1)
        if task >= header[_LAST_TASK]:
            return
        is_product = task >= n_images
        begin = _CHUNK * (task - n_images if is_product else task)
        end = min(begin + _CHUNK, p if is_product else q)
        if header[_COMBINES]:
            _combine(header, is_product, begin, end, strip)
            continue
        sums = _f64(header[_SUMS] + 8 * _LANES * _LANES * task, _LANES * _LANES)
        _gram_rows(header[_PRODUCTS if is_product else _IMAGES], p if is_product else q, r, begin, end, sums)


@_compiled
def _run_tasks(header: _I64, combines: bool, first: int) -> None:
    """Do the tasks from one on, in several threads or in this one."""
    header[_COMBINES], header[_NEXT_TASK], header[_NEXT_THREAD] = combines, first, 0
    header[_LAST_TASK] = _n_chunks(header[_Q]) + _n_chunks(header[_P])
    if header[_THREADS] > 1:
        _start_threads(header[_POOL], header[_THREAD], header.ctypes.data, header[_THREADS])
    else:
        _run_thread(header)


@_compiled
def _summed(header: _I64, begin: int, end: int) -> _F64:
    """Add the Gram matrices of some tasks up, in the place of the first one's."""
    size = _LANES * _LANES
    total = _f64(header[_SUMS] + 8 * size * begin, size)
    for task in range(begin + 1, end):
        other = _f64(header[_SUMS] + 8 * size * task, size)
        for k in range(size):
            total[k] += other[k]
    return total


@_compiled
def _is_in_range(gram: _F64, r: int) -> bool:
    """Return whether the rows' squares are in range; those of rows that are not finite are not."""
    for k in range(r):
        square = gram[(_LANES + 1) * k]
        if not _LEAST_SQUARE < square < _MOST_SQUARE:
            return False
    return True


@_compiled
def _times_transposed(a: _F64, b: _F64, r: int, out: _F64) -> None:
    """Write ``A B^T`` (r, r)."""
    for i in range(r):
        for j in range(r):
            total = 0.0
            for k in range(r):
                total += a[_LANES * i + k] * b[_LANES * j + k]
            out[_LANES * i + j] = total


@_compiled
def _mix_of(gram: _F64, rotation: _F64, r: int, rotated: _F64, factor: _F64, mix: int) -> tuple[float, float]:
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
            total = rotated[_LANES * i + j]
            for k in range(j):
                total -= factor[_LANES * i + k] * factor[_LANES * j + k]
            if j < i:
                factor[_LANES * i + j] = total / factor[(_LANES + 1) * j]
            elif total > _LEAST_PIVOT * _LEAST_PIVOT * rotated[(_LANES + 1) * i]:
                factor[(_LANES + 1) * i] = math.sqrt(total)
            else:  # NaN, too
                return first, math.inf
        length = 0.0
        for j in range(r):
            total = rotation[_LANES * i + j]
            for k in range(i):
                total -= factor[_LANES * i + k] * rotation[_LANES * k + j]
            total /= factor[(_LANES + 1) * i]
            rotation[_LANES * i + j] = total
            _f32(mix + 4 * _LANES * i, r)[j] = np.float32(total)
            length += abs(total) * math.sqrt(gram[(_LANES + 1) * j])
        noise = max(noise, length)
    return first, noise


@_compiled
def _rayleigh_ritz(header: _I64, rotation: _F64, scratch: _F64) -> float:
    """Write Q^T, and what makes u of T; return the first image's squared length, NaN where that is out of range."""
    r = header[_R]
    gram = _summed(header, 0, _n_chunks(header[_Q]))
    if not _is_in_range(gram, r):
        return math.nan
    square: float = _ritz(r, _LANES, gram.ctypes.data, rotation.ctypes.data, scratch.ctypes.data)
    leading = _f32(header[_MIX] + 4 * _LANES * _LANES, r)
    for j in range(r):
        leading[j] = np.float32(rotation[j] / math.sqrt(square))
    return square


@_compiled
def _finish(header: _I64) -> bool:
    """Turn T and Z into sigma, u and the next block, whose first row is v; return whether that was possible."""
    n_images, size = _n_chunks(header[_Q]), _LANES * _LANES
    n_tasks = n_images + _n_chunks(header[_P])
    scratch = header[_SUMS] + 8 * size * n_tasks
    rotation, rotated, factor = _f64(scratch, size), _f64(scratch + 8 * size, size), _f64(scratch + 16 * size, size)
    for again in range(2):
        first = n_images if again else 0
        _run_tasks(header, False, first)
        gram = _summed(header, n_images, n_tasks)
        if again:
            rotation[:] = 0.0
            for k in range(header[_R]):
                rotation[(_LANES + 1) * k] = 1.0
        image_square = 1.0 if again else _rayleigh_ritz(header, rotation, factor)
        if math.isnan(image_square) or not _is_in_range(gram, header[_R]):
            return False
        product_square, noise = _mix_of(gram, rotation, header[_R], rotated, factor, header[_MIX])
        if not noise < (_GOOD_NOISE if again else _MOST_NOISE):
            return False
        if not again:
            _f64(header[_SIGMA], 1)[0] = math.sqrt(product_square / image_square)
        _run_tasks(header, True, first)
        if noise < _GOOD_NOISE:
            return True
    return False


def _entries(checksum: int) -> tuple[Any, Callable[[int], None]]:
    """Return what Python calls, compiled and cached, and what a thread of the pool runs; see cpu_compiled."""

    def run(header_address: int) -> bool:
        _ = checksum
        return _finish(_i64(header_address, _N_HEADER))

    def thread(header_address: int) -> None:
        _ = checksum
        _run_thread(_i64(header_address, _N_HEADER))

    return numba.njit(nogil=True, cache=True, error_model="numpy")(run), thread


_run, _thread = _entries(sources_checksum())


@functools.cache
def thread_address() -> int:
    """Return the address of what a thread of the pool runs; the first call compiles it or loads it from the cache."""
    compiled: Any = numba.cfunc("void(int64)", cache=True, error_model="numpy")
    address: int = compiled(_thread).address
    return address
