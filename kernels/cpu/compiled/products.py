"""T and Z of a layer and the update of its gradient, compiled for the CPU: what reads and writes matrices."""

from __future__ import annotations

import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F32, I64, compiled, f32, i64, u16, u32
from lightning_lip.kernels.cpu.compiled.registers import axpys1, axpys8, dots1, dots8, rank_one, rank_two


@compiled
def band_width(p: int) -> int:
    """Return the columns of ``A^T`` (p, q) that are read twice while in the cache."""
    return max(16, min(at.BAND_ELEMENTS // p, 1024) // 16 * 16)


@compiled
def row_of(header: I64, unit: int) -> I64:
    """Return a unit's row of the table."""
    return i64(header[at.TABLE] + 8 * at.N_FIELDS * unit, at.N_FIELDS)


@compiled
def weight_of(header: I64, row: I64) -> int:
    """Return the address of a unit's part of a weight."""
    address: int = i64(header[at.ADDRESSES], header[at.LAYERS])[row[at.LAYER]]
    offset: int = (2 if row[at.WEIGHT_BF16] else 4) * row[at.GROUP] * row[at.Q] * row[at.WEIGHT_LD]
    return address + offset


@compiled
def scales_of(header: I64, row: I64) -> int:
    """Return the address of what the rows of a unit are multiplied by, fp32; 0 for nothing."""
    address: int = i64(header[at.ADDRESSES], 3 * header[at.LAYERS])[2 * header[at.LAYERS] + row[at.LAYER]]
    return address + 4 * row[at.GROUP] * row[at.Q] if address else 0


@compiled
def widen(target: int, source: int, size: int) -> None:
    """Copy `size` bf16 numbers to fp32."""
    words, bits = u16(source, size), u32(target, size)
    for j in range(size):
        bits[j] = np.uint32(words[j]) << np.uint32(16)


@compiled
def copy(target: F32, source: F32) -> None:
    """Copy numbers one by one: Numba's `target[:] = source` is several times slower."""
    for j in range(target.size):
        target[j] = source[j]


@compiled
def clear(target: F32) -> None:
    """Write zeros one by one, for the same reason."""
    for j in range(target.size):
        target[j] = 0


@compiled
def _add_dots(a: int, ld: int, rows: int, size: int, x: F32, out: F32) -> None:
    """Add ``A x`` to `out` (rows,), for A (rows, size): four rows at a time."""
    fours = rows // 4 * 4
    for i in range(0, fours, 4):
        a0, a1 = f32(a + 4 * ld * i, size), f32(a + 4 * ld * (i + 1), size)
        a2, a3 = f32(a + 4 * ld * (i + 2), size), f32(a + 4 * ld * (i + 3), size)
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
        a0 = f32(a + 4 * ld * i, size)
        s0 = np.float32(0)
        for j in range(size):
            s0 += x[j] * a0[j]
        out[i] += s0


@compiled
def _add_axpys(a: int, ld: int, rows: int, size: int, x: F32, out: F32) -> None:
    """Add ``A^T x`` to `out` (size,), for A (rows, size): four rows at a time."""
    fours = rows // 4 * 4
    for i in range(0, fours, 4):
        a0, a1 = f32(a + 4 * ld * i, size), f32(a + 4 * ld * (i + 1), size)
        a2, a3 = f32(a + 4 * ld * (i + 2), size), f32(a + 4 * ld * (i + 3), size)
        s0, s1, s2, s3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(size):
            out[j] += s0 * a0[j] + s1 * a1[j] + s2 * a2[j] + s3 * a3[j]
    for i in range(fours, rows):
        a0 = f32(a + 4 * ld * i, size)
        for j in range(size):
            out[j] += x[i] * a0[j]


@compiled
def add_forward(a: int, ld: int, rows: int, size: int, x: int, out: int, lanes: int) -> None:
    """Add ``A X`` to `out` (rows, lanes), for A (rows, size) and X (size, lanes)."""
    if lanes == 1:
        _add_dots(a, ld, rows, size, f32(x, size), f32(out, rows))
        return
    eights = rows // 8 * 8
    for c in range(0, 4 * lanes, 32):
        for i in range(0, eights, 8):
            dots8(a + 4 * ld * i, ld, size, x + c, lanes, out + 4 * lanes * i + c, lanes, 8 * ld)
        for i in range(eights, rows):
            dots1(a + 4 * ld * i, ld, size, x + c, lanes, out + 4 * lanes * i + c, lanes, ld)


@compiled
def _add_backward(a: int, ld: int, rows: int, size: int, x: int, out: int, lanes: int) -> None:
    """Add ``A^T X`` to `out` (size, lanes), for A (rows, size) and X (rows, lanes)."""
    if lanes == 1:
        _add_axpys(a, ld, rows, size, f32(x, rows), f32(out, size))
        return
    eights = rows // 8 * 8
    for c in range(0, 4 * lanes, 32):
        for i in range(0, eights, 8):
            axpys8(a + 4 * ld * i, ld, size, x + 4 * lanes * i + c, lanes, out + c, lanes)
        for i in range(eights, rows):
            axpys1(a + 4 * ld * i, ld, size, x + 4 * lanes * i + c, lanes, out + c, lanes)


@compiled
def form_images(row: I64, weight: int, scales: int, scale: np.float32, band: int, begin: int, end: int) -> None:
    """Form ``T = scale A V`` of some rows of ``A``, which have scales of their own where there is an address of these.

    T times these scales once more is formed then, too.
    """
    p, lanes, ld, bf16 = row[at.P], row[at.LANES], row[at.WEIGHT_LD], row[at.WEIGHT_BF16]
    size = 2 if bf16 else 4
    images = f32(row[at.IMAGES] + 4 * lanes * begin, lanes * (end - begin))
    clear(images)
    along = row[at.WEIGHT_ALONG]
    step = band_width(p) if along else 8
    for i in range(begin, end, step):
        n = min(step, end - i)
        # In memory (rows, width), `a_ld` apart: a band of columns of A^T, or some rows of A.
        a, a_ld, rows, width = weight + size * (i if along else ld * i), ld, p if along else n, n if along else p
        if bf16:
            a, a_ld = _widened(band, a, a_ld, rows, width), width
        if along:
            _add_backward(a, a_ld, rows, width, row[at.VECTORS], row[at.IMAGES] + 4 * lanes * i, lanes)
        else:
            add_forward(a, a_ld, rows, width, row[at.VECTORS], row[at.IMAGES] + 4 * lanes * i, lanes)
    for j in range(images.size):
        images[j] *= scale
    if scales == 0:
        return
    scaled = f32(row[at.SCALED_IMAGES] + 4 * lanes * begin, images.size)
    for i in range(end - begin):
        factor = f32(scales, end)[begin + i]
        for j in range(lanes * i, lanes * (i + 1)):
            images[j] *= factor
            scaled[j] = images[j] * factor


@compiled
def form_products(row: I64, weight: int, images: int, band: int, begin: int, end: int, first: int, last: int) -> None:
    """Add what some rows of ``A``, `begin` to `end`, give to ``Z = A^T T`` in its rows `first` to `last`."""
    p, lanes, ld, bf16 = row[at.P], row[at.LANES], row[at.WEIGHT_LD], row[at.WEIGHT_BF16]
    size = 2 if bf16 else 4
    products = row[at.PRODUCTS] + 4 * lanes * first
    if begin == 0:
        clear(f32(products, lanes * (last - first)))
    along = row[at.WEIGHT_ALONG]
    step = band_width(p) if along else 8
    for i in range(begin, end, step):
        n, m = min(step, end - i), last - first
        a, a_ld, rows, width = ld * first + i if along else ld * i + first, ld, m if along else n, n if along else m
        a = weight + size * a
        if bf16:
            a, a_ld = _widened(band, a, a_ld, rows, width), width
        if along:
            add_forward(a, a_ld, rows, width, images + 4 * lanes * i, products, lanes)
        else:
            _add_backward(a, a_ld, rows, width, images + 4 * lanes * i, products, lanes)


@compiled
def _widened(band: int, a: int, ld: int, rows: int, width: int) -> int:
    """Copy bf16 numbers (rows, width) to fp32, and return where."""
    for k in range(rows):
        widen(band + 4 * width * k, a + 2 * ld * k, width)
    return band


@compiled
def update(header: I64, unit: int, band: int, begin: int, end: int) -> None:
    """Add ``c u v^T`` to a gradient that has an address, in fp32, rounded once: rows `begin` to `end` of q.

    Of a symbol that is the sum for the real and the imaginary parts; of units of one weight the leading one counts.
    """
    n_layers, row = header[at.LAYERS], row_of(header, unit)
    layer, is_symbol = row[at.LAYER], row[at.KIND] != at.MATRIX
    coefficient = f32(header[at.COEFFICIENTS], n_layers)[layer]
    grad, ld, bf16 = i64(header[at.ADDRESSES], 2 * n_layers)[n_layers + layer], row[at.GRAD_LD], row[at.GRAD_BF16]
    if grad == 0 or coefficient == 0 or i64(header[at.LEADERS], n_layers)[layer] != unit:
        return
    grad += (2 if bf16 else 4) * row[at.GROUP] * row[at.Q] * ld
    outer, inner, size = row[at.LONG], row[at.SHORT], row[at.P]
    if is_symbol and scales_of(header, row) != 0:
        outer = row[at.LEFT]
    outer_ld, inner_ld = 4 * row[at.Q], 4 * row[at.P]  # to the imaginary parts
    if row[at.GRAD_ALONG] == 1:
        # Its rows are p: as large a part of them.
        outer, inner, size = inner, outer, row[at.Q]
        begin, end = begin * row[at.P] // row[at.Q], end * row[at.P] // row[at.Q]
    if row[at.KIND] == at.SCALARS:  # u is zero elsewhere
        begin, end = max(begin, row[at.LEADING_ROW]), min(end, row[at.LEADING_ROW] + 1)
    factor = header[at.COEFFICIENTS] + 4 * layer
    if not bf16:
        out, x, n = grad + 4 * ld * begin, outer + 4 * begin, max(end - begin, 0)
        if is_symbol:
            rank_two(out, ld, n, size, x, x + outer_ld, inner, inner + inner_ld, factor)
        else:
            rank_one(out, ld, n, size, x, inner, factor)
        return
    for i in range(begin, end):
        words, x = u16(grad + 2 * ld * i, size), outer + 4 * i
        widen(band, grad + 2 * ld * i, size)
        if is_symbol:
            rank_two(band, 0, 1, size, x, x + outer_ld, inner, inner + inner_ld, factor)
        else:
            rank_one(band, 0, 1, size, x, inner, factor)
        bits = u32(band, size)
        for j in range(size):
            word = np.uint32(bits[j])
            # To nearest, ties to even; the sum would carry some NaN over to zero.
            even = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            words[j] = np.uint16(0x7FC0 if (word & np.uint32(0x7FFFFFFF)) > at.INFINITE else even)
