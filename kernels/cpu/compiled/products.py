"""T and Z of a layer and the update of its gradient, compiled for the CPU: what reads and writes matrices."""

from __future__ import annotations

import numpy as np

from lightning_lip.kernels.cpu.compiled.registers import (
    _F32,
    _I64,
    _axpys1,
    _axpys8,
    _compiled,
    _dots1,
    _dots8,
    _f32,
    _i64,
    _rank_one,
    _u16,
    _u32,
)
from lightning_lip.kernels.cpu.layout import (
    _ADDRESSES,
    _BAND_ELEMENTS,
    _COEFFICIENTS,
    _GRAD_ALONG,
    _GRAD_BF16,
    _GRAD_LD,
    _IMAGES,
    _INFINITE,
    _LANES,
    _LAYERS,
    _LONG,
    _N_FIELDS,
    _P,
    _PRODUCTS,
    _Q,
    _SHORT,
    _TABLE,
    _VECTORS,
    _WEIGHT_ALONG,
    _WEIGHT_BF16,
    _WEIGHT_LD,
)


@_compiled
def _band_width(p: int) -> int:
    """Return the columns of ``A^T`` (p, q) that are read twice while in the cache."""
    return max(16, min(_BAND_ELEMENTS // p, 1024) // 16 * 16)


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
