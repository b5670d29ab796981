"""From T and Z to sigma, the singular vectors and the next block, compiled for the CPU: Rayleigh-Ritz and QR."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_lip.kernels.cpu.compiled.products import _add_forward, _copy
from lightning_lip.kernels.cpu.compiled.registers import (
    _F32,
    _F64,
    _I64,
    _column_dots,
    _combine,
    _compiled,
    _f32,
    _f64,
    _gram,
    _i64,
    _reflect,
    _reflect_back,
    _rotate,
    _u32,
)
from lightning_lip.kernels.cpu.layout import (
    _ADVANCE,
    _HIGH,
    _IMAGES,
    _INFINITE,
    _LANES,
    _LAYERS,
    _LONG,
    _LOW,
    _MAX_NORM,
    _MIN_NORM,
    _N_FIELDS,
    _P,
    _PRODUCTS,
    _Q,
    _R,
    _SCALES,
    _SHORT,
    _SIGMA,
    _TABLE,
    _VECTORS,
    MAX_BLOCK_SIZE,
)

_NEGLIGIBLE = 5e-9


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
