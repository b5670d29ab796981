"""The compiled functions of the CPU backend: all layers in one call, each weight read once a step.

The functions below are compiled by Numba: single-threaded (its threading layers break forked workers), without the
GIL, cached between processes. They know addresses only. A table of int64 has one row a layer, whose fields are named
below; everything that one object works on lies in buffers of its own, so that objects in several threads never meet.
They stand in one file, because Numba's cache looks at the file of the function called only.

Every layer is taken as ``A`` of shape (q, p), q >= p: the weight, or its transpose. Along the contiguous dimension of
the weight the loops differ: with rows of ``A`` contiguous, four rows serve ``T`` and ``Z`` while they lie in the cache;
with columns contiguous, a band of columns small enough for the cache is read twice.

Deltas from the specification, :mod:`lightning_lip.kernels.reference`:

1. ``T`` cannot be scaled by its largest magnitude before ``Z = T A``, which would cost a second read. It is multiplied
   by a power of two that the layer keeps from step to step; a step whose ``T`` leaves [2^-8, 2^8] is done again with
   a new one, so fp32 holds at weights of 1e+-30 too.
2. ``Z`` is formed of the images as they come and rotated afterwards. After the first steps the rotation is close to
   the identity.
3. The Gram matrix and its eigen-decomposition (cyclic Jacobi) are in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
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
    _P,
    _Q,
    _VECTORS,  # V (r, p) fp32
    _PRODUCTS,  # Z (r, p) fp32
    _IMAGES,  # T (r, q) fp32
    _LONG,  # the singular vector of q elements, fp32
    _SHORT,  # the singular vector of p elements, fp32
    _LARGE,  # 1: not in the compiled call
    _MULTIPLICITY,
    _N_FIELDS,
) = range(17)

# The header: L, then the addresses of the table, of the L addresses of weights and L of gradients (0: leave it alone),
# of what else has one entry a layer, and of the scratch.
_LAYERS, _TABLE, _ADDRESSES, _SIGMA, _COEFFICIENTS, _SCALES, _VALUE, _SMALL, _BAND, _N_HEADER = range(10)

# 64 kB of V and Z leave room for four rows in a first-level cache; wider blocks go in tiles of columns.
_TILE = 512
_TALL = 16
_UNTILED = 8192
_BAND_ELEMENTS = 1 << 18

# Bits of 2^-8, 2^8 and infinity in fp32.
_LOW, _HIGH, _INFINITE = (127 - 8) << 23, (127 + 8) << 23, 255 << 23
_MIN_NORM, _MAX_NORM = 2.0**-8, 2.0**8

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
def _dot(x: _F32, a: _F32) -> Any:  # np.float32
    total = np.float32(0)
    for j in range(x.size):
        total += x[j] * a[j]
    return total


@_compiled
def _dot4(x: _F32, a: _F32, b: _F32, c: _F32, d: _F32) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    s0 = s1 = s2 = s3 = np.float32(0)
    for j in range(x.size):
        s0 += x[j] * a[j]
        s1 += x[j] * b[j]
        s2 += x[j] * c[j]
        s3 += x[j] * d[j]
    return s0, s1, s2, s3


@_compiled
def _axpy(z: _F32, s: np.float32, a: _F32) -> None:
    for j in range(z.size):
        z[j] += s * a[j]


@_compiled
def _axpy4(z: _F32, s: _F32, a: _F32, b: _F32, c: _F32, d: _F32) -> None:
    s0, s1, s2, s3 = s[0], s[1], s[2], s[3]
    for j in range(z.size):
        z[j] += s0 * a[j] + s1 * b[j] + s2 * c[j] + s3 * d[j]


@_compiled
def _rows_dot(x: int, x_ld: int, r: int, a: int, a_ld: int, rows: int, size: int, out: int, out_ld: int) -> None:
    """Add ``X A^T`` to `out` (r, rows), for X (r, size) and A (rows, size)."""
    # Four rows of A by two of X: eight sums for six loads.
    pairs = r // 2 * 2
    fours = rows // 4 * 4
    for i in range(0, fours, 4):
        a0, a1 = _f32(a + 4 * a_ld * i, size), _f32(a + 4 * a_ld * (i + 1), size)
        a2, a3 = _f32(a + 4 * a_ld * (i + 2), size), _f32(a + 4 * a_ld * (i + 3), size)
        for k in range(0, pairs, 2):
            x0, x1 = _f32(x + 4 * x_ld * k, size), _f32(x + 4 * x_ld * (k + 1), size)
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0)
            for j in range(size):
                s0 += x0[j] * a0[j]
                s1 += x0[j] * a1[j]
                s2 += x0[j] * a2[j]
                s3 += x0[j] * a3[j]
                t0 += x1[j] * a0[j]
                t1 += x1[j] * a1[j]
                t2 += x1[j] * a2[j]
                t3 += x1[j] * a3[j]
            y = _f32(out + 4 * (out_ld * k + i), 4)
            y[0] += s0
            y[1] += s1
            y[2] += s2
            y[3] += s3
            y = _f32(out + 4 * (out_ld * (k + 1) + i), 4)
            y[0] += t0
            y[1] += t1
            y[2] += t2
            y[3] += t3
        if pairs < r:
            y = _f32(out + 4 * (out_ld * pairs + i), 4)
            s0, s1, s2, s3 = _dot4(_f32(x + 4 * x_ld * pairs, size), a0, a1, a2, a3)
            y[0] += s0
            y[1] += s1
            y[2] += s2
            y[3] += s3
    for i in range(fours, rows):
        for k in range(r):
            y = _f32(out + 4 * (out_ld * k + i), 1)
            y[0] += _dot(_f32(x + 4 * x_ld * k, size), _f32(a + 4 * a_ld * i, size))


@_compiled
def _rows_axpy(x: int, x_ld: int, r: int, a: int, a_ld: int, rows: int, size: int, out: int, out_ld: int) -> None:
    """Add ``X A`` to `out` (r, size), for X (r, rows) and A (rows, size)."""
    pairs = r // 2 * 2
    fours = rows // 4 * 4
    for i in range(0, fours, 4):
        a0, a1 = _f32(a + 4 * a_ld * i, size), _f32(a + 4 * a_ld * (i + 1), size)
        a2, a3 = _f32(a + 4 * a_ld * (i + 2), size), _f32(a + 4 * a_ld * (i + 3), size)
        for k in range(0, pairs, 2):
            x0, x1 = _f32(x + 4 * (x_ld * k + i), 4), _f32(x + 4 * (x_ld * (k + 1) + i), 4)
            s0, s1, s2, s3 = x0[0], x0[1], x0[2], x0[3]
            t0, t1, t2, t3 = x1[0], x1[1], x1[2], x1[3]
            y0, y1 = _f32(out + 4 * out_ld * k, size), _f32(out + 4 * out_ld * (k + 1), size)
            for j in range(size):
                y0[j] += s0 * a0[j] + s1 * a1[j] + s2 * a2[j] + s3 * a3[j]
                y1[j] += t0 * a0[j] + t1 * a1[j] + t2 * a2[j] + t3 * a3[j]
        if pairs < r:
            _axpy4(_f32(out + 4 * out_ld * pairs, size), _f32(x + 4 * (x_ld * pairs + i), 4), a0, a1, a2, a3)
    for i in range(fours, rows):
        for k in range(r):
            y = _f32(x + 4 * (x_ld * k + i), 1)
            _axpy(_f32(out + 4 * out_ld * k, size), y[0], _f32(a + 4 * a_ld * i, size))


@_compiled
def _band_width(p: int) -> int:
    """Return the columns of ``A^T`` (p, q) that are read twice while in the cache."""
    return max(16, min(_BAND_ELEMENTS // p, 1024))


@_compiled
def _multiply_one(row: _I64, weight: int, scale: np.float32, band: int, with_products: bool) -> None:
    """Do what `_multiply` does, for one vector and rows of ``A`` contiguous: four rows serve at once, in one go."""
    p, q, ld, bf16 = row[_P], row[_Q], row[_WEIGHT_LD], row[_WEIGHT_BF16]
    step = 2 if bf16 else 4
    vector, product = _f32(row[_VECTORS], p), _f32(row[_PRODUCTS], p)
    product[:] = 0
    fours = q // 4 * 4
    for i in range(0, fours, 4):
        a, a_ld = weight + step * ld * i, ld
        if bf16:
            for k in range(4):
                _widen(band + 4 * p * k, a + step * ld * k, p)
            a, a_ld = band, p
        a0, a1 = _f32(a, p), _f32(a + 4 * a_ld, p)
        a2, a3 = _f32(a + 8 * a_ld, p), _f32(a + 12 * a_ld, p)
        image = _f32(row[_IMAGES] + 4 * i, 4)
        s0, s1, s2, s3 = _dot4(vector, a0, a1, a2, a3)
        image[0] = s0 * scale
        image[1] = s1 * scale
        image[2] = s2 * scale
        image[3] = s3 * scale
        if with_products:
            _axpy4(product, image, a0, a1, a2, a3)
    for i in range(fours, q):
        a = weight + step * ld * i
        if bf16:
            _widen(band, a, p)
            a = band
        image = _f32(row[_IMAGES] + 4 * i, 1)
        image[0] = _dot(vector, _f32(a, p)) * scale
        if with_products:
            _axpy(product, image[0], _f32(a, p))


@_compiled
def _multiply(row: _I64, weight: int, scale: np.float32, band: int, with_products: bool) -> None:
    """Form ``T = scale V A^T`` and ``Z = T A``, reading the weight once."""
    r, p, q = row[_R], row[_P], row[_Q]
    if r == 1 and row[_WEIGHT_ALONG] == 0:
        _multiply_one(row, weight, scale, band, with_products)
        return
    ld, bf16 = row[_WEIGHT_LD], row[_WEIGHT_BF16]
    vectors, products, images = row[_VECTORS], row[_PRODUCTS], row[_IMAGES]
    step = 2 if bf16 else 4
    _f32(images, r * q)[:] = 0
    _f32(products, r * p)[:] = 0
    if row[_WEIGHT_ALONG] == 0:
        height, tile = (4, p) if r * p <= _UNTILED else (_TALL, _TILE)
        for i in range(0, q, height):
            rows = min(height, q - i)
            a, a_ld = weight + step * ld * i, ld
            if bf16:
                for k in range(rows):
                    _widen(band + 4 * p * k, a + step * ld * k, p)
                a, a_ld = band, p
            for c in range(0, p, tile):
                _rows_dot(vectors + 4 * c, p, r, a + 4 * c, a_ld, rows, min(tile, p - c), images + 4 * i, q)
            for k in range(r):
                _f32(images + 4 * (q * k + i), rows)[:] *= scale
            if with_products:
                for c in range(0, p, tile):
                    _rows_axpy(images + 4 * i, q, r, a + 4 * c, a_ld, rows, min(tile, p - c), products + 4 * c, p)
    else:
        width = _band_width(p)
        for i in range(0, q, width):
            columns = min(width, q - i)
            a, a_ld = weight + step * i, ld
            if bf16:
                for k in range(p):
                    _widen(band + 4 * columns * k, a + step * ld * k, columns)
                a, a_ld = band, columns
            _rows_axpy(vectors, p, r, a, a_ld, p, columns, images + 4 * i, q)
            for k in range(r):
                _f32(images + 4 * (q * k + i), columns)[:] *= scale
            if with_products:
                _rows_dot(images + 4 * i, q, r, a, a_ld, p, columns, products, p)


@_compiled
def _largest(address: int, size: int) -> Any:
    """Return the bits of the largest magnitude: they are ordered like the numbers, infinity and NaN above all."""
    bits = _u32(address, size)
    top = np.uint32(0)
    for j in range(size):
        top = max(top, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
    return np.int64(top)


@_compiled
def _combine(out: _F32, weights: _F64, rows: int) -> None:
    """Write the sum of `rows` (weights.size, out.size), weighted."""
    out[:] = 0
    for k in range(weights.size):
        _axpy(out, np.float32(weights[k]), _f32(rows + 4 * out.size * k, out.size))


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
def _rotate(x: _F64, y: _F64, cos: float, sin: float) -> None:
    for j in range(x.size):
        a, b = x[j], y[j]
        x[j] = cos * a - sin * b
        y[j] = sin * a + cos * b


@_compiled
def _ritz(images: int, r: int, q: int, gram: int, rotation: int) -> None:
    """Write the eigenvectors of ``T T^T`` as rows of `rotation`, the largest eigenvalue first; both (r, r), fp64."""
    for k in range(r):
        x = _f32(images + 4 * q * k, q)
        for m in range(k + 1):
            y = _f32(images + 4 * q * m, q)
            total = 0.0
            for j in range(q):
                total += np.float64(x[j]) * np.float64(y[j])
            _f64(gram, r * r)[k * r + m] = _f64(gram, r * r)[m * r + k] = total
    _f64(rotation, r * r)[:] = 0.0
    _f64(rotation, r * r)[:: r + 1] = 1.0
    all_of = _f64(gram, r * r)
    # Far below the rounding of T, which is fp32; sweeps converge quadratically and the last block is nearly diagonal.
    negligible = 1e-10 * all_of[:: r + 1].sum()
    for _ in range(30):
        rotated = False
        for k in range(1, r):
            upper = _f64(gram + 8 * r * k, r)
            for m in range(k):
                lower = _f64(gram + 8 * r * m, r)
                off = upper[m]
                if abs(off) <= negligible:
                    continue
                rotated = True
                theta = (upper[k] - lower[m]) / (2.0 * off)
                t = 1.0 / (abs(theta) + math.sqrt(theta * theta + 1.0))
                if theta < 0.0:
                    t = -t
                cos = 1.0 / math.sqrt(t * t + 1.0)
                sin = t * cos
                corner_m, corner_k = lower[m] - t * off, upper[k] + t * off
                _rotate(lower, upper, cos, sin)
                for j in range(r):
                    all_of[j * r + m] = lower[j]
                    all_of[j * r + k] = upper[j]
                lower[m], upper[k] = corner_m, corner_k
                lower[k] = upper[m] = 0.0
                _rotate(_f64(rotation + 8 * r * m, r), _f64(rotation + 8 * r * k, r), cos, sin)
        if not rotated:
            break
    for k in range(r - 1):
        best = k
        for m in range(k + 1, r):
            if all_of[m * r + m] > all_of[best * r + best]:
                best = m
        if best != k:
            all_of[best * r + best] = all_of[k * r + k]
            _rotate(_f64(rotation + 8 * r * k, r), _f64(rotation + 8 * r * best, r), 0.0, -1.0)


@_compiled
def _orthonormalise(rows: int, r: int, p: int, factors: _F64) -> None:
    """Replace the rows (r, p) by an orthonormal basis of theirs, in their order.

    Householder QR, as in the reference: a product of reflections is orthonormal to rounding whatever the rank, where
    Gram-Schmidt leaves the rows of a rank-deficient block to chance. Reflection k is kept in row k from k + 1 on.
    """
    for k in range(r):
        x = _f32(rows + 4 * (p * k + k), p - k)
        norm = _norm(x)
        factors[k] = 0.0
        if norm == 0.0:
            continue
        head = np.float64(x[0])
        alpha = -norm if head > 0.0 else norm
        factors[k] = (alpha - head) / alpha
        tail = x[1:]
        _scale_to(tail, tail, 1.0 / (head - alpha))
        for m in range(k + 1, r):
            y = _f32(rows + 4 * (p * m + k), p - k)
            shift = np.float32(factors[k] * (y[0] + _dot(tail, y[1:])))
            y[0] -= shift
            _axpy(y[1:], -shift, tail)
    for k in range(r - 1, -1, -1):
        tail = _f32(rows + 4 * (p * k + k + 1), p - k - 1)
        for m in range(k + 1, r):
            y = _f32(rows + 4 * (p * m + k), p - k)
            shift = np.float32(factors[k] * _dot(tail, y[1:]))
            y[0] = -shift
            _axpy(y[1:], -shift, tail)
        _scale_to(tail, tail, -factors[k])
        x = _f32(rows + 4 * p * k, k + 1)
        x[:] = 0
        x[k] = np.float32(1.0 - factors[k])


@_compiled
def _finish(header: _I64, layer: int, advance: bool) -> bool:
    """Turn a layer's ``T`` and ``Z`` into sigma, its vectors and, if `advance`, the next block.

    Returns:
        Whether ``T`` must be formed again, with the scale that was stored.
    """
    row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
    r, p, q = row[_R], row[_P], row[_Q]
    images, products = row[_IMAGES], row[_PRODUCTS]
    scales = _f64(header[_SCALES], header[_LAYERS])
    sigma = _f64(header[_SIGMA], header[_LAYERS])
    long, short = _f32(row[_LONG], q), _f32(row[_SHORT], p)
    first = _f32(row[_VECTORS], p)

    # With one vector its norm says in one loop what `_largest` and the norm say in two.
    image = _f32(images, q)
    image_norm = _norm(image) if r == 1 else 0.0
    if not _MIN_NORM < image_norm < _MAX_NORM:
        top = _largest(images, r * q)
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
            _copy(short, first)
            return False

    gram = header[_SMALL]
    rotation = gram + 8 * r * r
    weights = _f64(rotation, r)
    weights[0] = 1.0
    if r > 1:
        _ritz(images, r, q, gram, rotation)
        _combine(long, weights, images)
        image = long
        image_norm = _norm(long)
    _scale_to(long, image, 1.0 / image_norm)
    if not advance:
        sigma[layer] = image_norm / scales[layer]
        _combine(short, weights, row[_VECTORS])
        return False

    product = _f32(products, p)
    if r > 1:
        _combine(short, weights, products)
        product = short
    product_norm = _norm(product)
    top = _largest(products, r * p) if r > 1 else _LOW
    if top >= _INFINITE or not 0.0 < product_norm < np.inf:
        sigma[layer] = 0.0 if product_norm == 0.0 else np.nan
        _copy(short, first)
        return False
    sigma[layer] = product_norm / image_norm
    _scale_to(short, product, 1.0 / product_norm)
    if r == 1:
        _copy(first, short)
        return False
    # A magnitude near one: reflections form products of entries in fp32.
    shrink = 2.0 ** (127 - (top >> 23))
    for k in range(r):
        vector = _f32(row[_VECTORS] + 4 * p * k, p)
        _combine(vector, _f64(rotation + 8 * r * k, r), products)
        _scale_to(vector, vector, shrink)
    _orthonormalise(row[_VECTORS], r, p, _f64(gram, r))
    return False


@_compiled
def _iterate(header: _I64, n_iterations: int) -> None:
    scales = _f64(header[_SCALES], header[_LAYERS])
    weights = _i64(header[_ADDRESSES], header[_LAYERS])
    for layer in range(header[_LAYERS]):
        row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
        if row[_LARGE]:
            continue
        for _ in range(max(n_iterations, 1)):
            again = True
            while again:
                _multiply(row, weights[layer], np.float32(scales[layer]), header[_BAND], n_iterations > 0)
                again = _finish(header, layer, n_iterations > 0)


@_compiled
def _weigh(header: _I64, code: int, target_log: float, factor: float) -> None:
    """Write ``c = factor d penalty / d sigma`` and the value, for the penalties of :mod:`lightning_lip.penalties`."""
    n_layers = header[_LAYERS]
    sigma = _f64(header[_SIGMA], n_layers)
    coefficients = _f32(header[_COEFFICIENTS], n_layers)
    log_bound = 0.0
    value = 0.0
    for layer in range(n_layers):
        count = _i64(header[_TABLE] + 8 * (_N_FIELDS * layer + _MULTIPLICITY), 1)[0]
        log_bound += count * math.log(sigma[layer])
        value += count * (sigma[layer] if code == LAYER_SUM else sigma[layer] * sigma[layer])
    slope = 1.0
    if code == PRODUCT:
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
def _update(header: _I64) -> None:
    """Add ``c u v^T`` to each gradient that has an address, in fp32, rounded once."""
    n_layers = header[_LAYERS]
    coefficients = _f32(header[_COEFFICIENTS], n_layers)
    grads = _i64(header[_ADDRESSES] + 8 * n_layers, n_layers)
    for layer in range(n_layers):
        row = _i64(header[_TABLE] + 8 * _N_FIELDS * layer, _N_FIELDS)
        grad, ld, bf16 = grads[layer], row[_GRAD_LD], row[_GRAD_BF16]
        if grad == 0 or coefficients[layer] == 0:
            continue
        outer, inner = _f32(row[_LONG], row[_Q]), _f32(row[_SHORT], row[_P])
        if row[_GRAD_ALONG] == 1:
            outer, inner = inner, outer
        for i in range(outer.size):
            factor = np.float32(coefficients[layer] * outer[i])
            if not bf16:
                _axpy(_f32(grad + 4 * ld * i, inner.size), factor, inner)
                continue
            words = _u16(grad + 2 * ld * i, inner.size)
            _widen(header[_BAND], grad + 2 * ld * i, inner.size)
            _axpy(_f32(header[_BAND], inner.size), factor, inner)
            bits = _u32(header[_BAND], inner.size)
            for j in range(inner.size):
                word = np.uint32(bits[j])
                # To nearest, ties to even; the sum would carry some NaN over to zero.
                even = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                words[j] = np.uint16(0x7FC0 if (word & np.uint32(0x7FFFFFFF)) > _INFINITE else even)


@_compiled
def _run(header_address: int, n_iterations: int, code: int, target_log: float, factor: float) -> None:
    """Iterate (`n_iterations` >= 0), weigh (`code` >= 0) and update the gradients (`code` >= -1)."""
    header = _i64(header_address, _N_HEADER)
    if n_iterations >= 0:
        _iterate(header, n_iterations)
    if code >= 0:
        _weigh(header, code, target_log, factor)
    if code >= _COEFFICIENTS_GIVEN:
        _update(header)


@_compiled
def _finish_large(header_address: int, layer: int, advance: bool) -> bool:
    return _finish(_i64(header_address, _N_HEADER), layer, advance)
