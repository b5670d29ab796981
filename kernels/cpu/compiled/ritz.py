"""From T and Z to sigma, the singular vectors and the next block, compiled for the CPU: Rayleigh-Ritz and QR."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F32, F64, I64, compiled, f32, f64, u32
from lightning_lip.kernels.cpu.compiled.products import add_forward, clear, copy, row_of
from lightning_lip.kernels.cpu.compiled.registers import (
    add_columns,
    column_dots,
    reflect,
    reflect_back,
    rotate,
    write_gram,
)

_NEGLIGIBLE = 5e-9


@compiled
def largest(address: int, size: int) -> Any:
    """Return the bits of the largest magnitude: they are ordered like the numbers, infinity and NaN above all."""
    bits = u32(address, size)
    top = np.uint32(0)
    for j in range(size):
        top = max(top, np.uint32(bits[j] & np.uint32(0x7FFFFFFF)))
    return np.int64(top)


@compiled
def _norm(x: F32) -> float:
    total = 0.0
    for j in range(x.size):
        total += np.float64(x[j]) * np.float64(x[j])
    return math.sqrt(total)


@compiled
def _scale_to(out: F32, x: F32, factor: float) -> None:
    # In fp64: the reciprocal of a norm below 3e-39 overflows fp32.
    for j in range(x.size):
        out[j] = np.float32(np.float64(x[j]) * factor)


@compiled
def _form_gram(images: int, lanes: int, q: int, gram: int) -> float:
    """Write ``T^T T`` (lanes, lanes) in fp64, which its squares cannot overflow; return T's Frobenius norm."""
    for c in range(0, lanes, 8):
        for d in range(0, lanes, 8):
            write_gram(images + 4 * c, images + 4 * d, lanes, q, gram + 8 * (lanes * c + d), lanes)
    return math.sqrt(_trace(f64(gram, lanes * lanes), lanes))


@compiled
def _trace(matrix: F64, n: int) -> float:
    total = 0.0
    for k in range(n):
        total += matrix[(n + 1) * k]
    return total


@compiled
def ritz(r: int, lanes: int, gram: int, rotation: int, factors: int) -> float:
    """Write the eigenvectors of a Gram matrix, which is overwritten, as rows of `rotation`; (lanes, lanes) in fp64.

    Returns:
        The largest eigenvalue; its eigenvector comes first, and the others in their order.
    """
    all_of = f64(gram, lanes * lanes)
    identity = f64(rotation, lanes * lanes)
    for k in range(lanes * lanes):
        identity[k] = 0.0
    for k in range(lanes):
        identity[(lanes + 1) * k] = 1.0
    # Sweeps converge quadratically and the last block is nearly diagonal.
    negligible = _NEGLIGIBLE * _trace(all_of, lanes)
    angle = f64(factors, 2)
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
                    rotate(gram + 8 * lanes * m + c, gram + 8 * lanes * k + c, factors)
                    rotate(rotation + 8 * lanes * m + c, rotation + 8 * lanes * k + c, factors)
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
                rotate(rotation + 8 * lanes * k + c, rotation + 8 * lanes * best + c, factors)
    largest: float = all_of[0]
    return largest


@compiled
def _orthonormalise(x: int, r: int, lanes: int, p: int, scratch: int) -> None:
    """Replace the first r columns of X (p, lanes) by an orthonormal basis of theirs, in their order.

    Householder QR, as in the reference: a product of reflections is orthonormal to rounding whatever the rank, where
    Gram-Schmidt leaves the columns of a rank-deficient block to chance. The vector of reflection k is 1 in row k and,
    below it, what is kept in column k times ``inverse[k]``.
    """
    sums, factors = scratch, scratch + 4 * at.MAX_BLOCK_SIZE
    scales, inverse = f32(factors, r), f32(factors + 4 * at.MAX_BLOCK_SIZE, r)
    for step in range(2 * r):
        forward = step < r
        k = step if forward else 2 * r - 1 - step
        row, below = x + 4 * lanes * k, x + 4 * lanes * (k + 1)
        n, own = p - k - 1, k // 8 * 8
        for c in range(own, lanes, 8):
            column_dots(below + 4 * k, below + 4 * c, lanes, n, sums + 4 * c)
        if forward:
            squares = np.float64(f32(sums, lanes)[k])
            head = np.float64(f32(row, lanes)[k])
            if head * head + squares < 1e-12:
                # Squares that vanish in fp32 are no norm: the column's own magnitude does not matter.
                _normalise_column(row + 4 * k, lanes, n + 1)
                for c in range(own, lanes, 8):
                    column_dots(below + 4 * k, below + 4 * c, lanes, n, sums + 4 * c)
                squares = np.float64(f32(sums, lanes)[k])
                head = np.float64(f32(row, lanes)[k])
            norm = math.sqrt(head * head + squares)
            alpha = -norm if head > 0.0 else norm
            scales[k] = np.float32((alpha - head) / alpha if norm > 0.0 else 0.0)
            inverse[k] = np.float32(1.0 / (head - alpha) if norm > 0.0 else 0.0)
        # The own lanes last: what is kept in column k is read for all.
        for c in range(lanes - 8, own - 8, -8):
            if forward:
                reflect(below + 4 * c, row + 4 * c, lanes, n, below + 4 * k, k - c, sums + 4 * c, factors + 4 * k)
            else:
                reflect_back(below + 4 * c, row + 4 * c, lanes, n, below + 4 * k, k - c, sums + 4 * c, factors + 4 * k)
        if not forward:
            for j in range(k):
                f32(x + 4 * lanes * j, lanes)[k] = 0
            f32(row, lanes)[k] = np.float32(1) - scales[k]


@compiled
def _normalise_column(x: int, ld: int, size: int) -> None:
    """Divide a column by its norm, in fp64; one that is zero stays."""
    column = f32(x, ld * size - ld + 1)[::ld]
    norm = 0.0
    for j in range(size):
        norm += np.float64(column[j]) ** 2
    norm = math.sqrt(norm)
    if norm > 0.0:
        for j in range(size):
            column[j] = np.float32(np.float64(column[j]) / norm)


@compiled
def new_scale(header: I64, unit: int, top: int) -> bool:
    """Write the power of two by which ``T``, with a largest magnitude of these bits, comes near one; True if it is new.

    Where T is zero or not finite it is one.
    """
    scales = f64(header[at.SCALES], header[at.UNITS])
    scale = 1.0
    if 0 < top < at.INFINITE:
        scale = min(max(scales[unit] * 2.0 ** (127 - (top >> 23)), 2.0**-120), 2.0**120)
    is_new: bool = scale != scales[unit]
    scales[unit] = scale
    return is_new


@compiled
def finish(header: I64, unit: int, scratch: int) -> bool:
    """Turn a matrix's ``T`` and ``Z`` into sigma, its vectors and, if they are to advance, the next block.

    Returns:
        Whether ``T`` must be formed again, with the scale that was stored.
    """
    row = row_of(header, unit)
    r, lanes, p, q = row[at.R], row[at.LANES], row[at.P], row[at.Q]
    images, products, vectors = row[at.IMAGES], row[at.PRODUCTS], row[at.VECTORS]
    advance = header[at.ADVANCE] != 0
    scales = f64(header[at.SCALES], header[at.UNITS])
    sigma = f64(header[at.SIGMAS], header[at.UNITS])
    long, short = f32(row[at.LONG], q), f32(row[at.SHORT], p)
    gram = scratch
    rotation, mixed = gram + 8 * lanes * lanes, gram + 16 * lanes * lanes

    image_norm = _norm(f32(images, q)) if lanes == 1 else _form_gram(images, lanes, q, gram)
    # Whatever is not between them is looked at again, NaN too.
    if not at.MIN_NORM < image_norm < at.MAX_NORM:
        top = largest(images, lanes * q)
        if (top < at.LOW or top > at.HIGH) and new_scale(header, unit, top):
            return True
        if top >= at.INFINITE or top == 0:
            sigma[unit] = 0.0 if top == 0 else np.nan
            long[:] = np.float32(sigma[unit])
            _first_column(short, vectors, lanes)
            return False
    leading = f32(mixed + 4 * lanes * lanes, lanes)
    if lanes == 1:
        _scale_to(long, f32(images, q), 1.0 / image_norm)
        copy(short, f32(products if advance else vectors, p))
    else:
        image_norm = math.sqrt(ritz(r, lanes, gram, rotation, mixed))
        for j in range(lanes):
            leading[j] = np.float32(f64(rotation, lanes)[j] / image_norm)
        _leading_column(long, images, lanes, leading)
        for j in range(lanes):
            leading[j] = np.float32(f64(rotation, lanes)[j])
        _leading_column(short, products if advance else vectors, lanes, leading)
    if not advance:
        sigma[unit] = image_norm / scales[unit]
        return False

    product_norm = _norm(short)
    if not 0.0 < product_norm < np.inf:
        sigma[unit] = 0.0 if product_norm == 0.0 else np.nan
        _first_column(short, vectors, lanes)
        return False
    sigma[unit] = product_norm / image_norm
    _scale_to(short, short, 1.0 / product_norm)
    if lanes == 1:
        copy(f32(vectors, p), short)
        return False
    # A magnitude near one: reflections form products of entries in fp32.
    shrink = 2.0 ** -min(max(math.floor(math.log2(product_norm)), -126), 126)
    transposed = f32(mixed, lanes * lanes)
    for k in range(lanes):
        for j in range(lanes):
            transposed[lanes * j + k] = np.float32(shrink * f64(rotation, lanes * lanes)[lanes * k + j])
    clear(f32(vectors, lanes * p))
    add_forward(products, lanes, p, lanes, mixed, vectors, lanes)
    _orthonormalise(vectors, r, lanes, p, gram)
    return False


@compiled
def _first_column(out: F32, x: int, lanes: int) -> None:
    """Copy the first column of X (out.size, lanes)."""
    for j in range(out.size):
        out[j] = f32(x + 4 * lanes * j, 1)[0]


@compiled
def _leading_column(out: F32, x: int, lanes: int, weights: F32) -> None:
    """Write the sum of the columns of X (out.size, lanes), weighted."""
    clear(out)
    for c in range(0, lanes, 8):
        add_columns(x + 4 * c, lanes, out.size, weights.ctypes.data + 4 * c, out.ctypes.data)
