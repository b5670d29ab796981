"""From T and Z to sigma, the frequencies and the next waves of a convolution's symbol, compiled for the CPU.

The algorithm is that of :mod:`lightning_lip.kernels.symbol`. A wave has two neighbouring columns of T and Z, for its
real and its imaginary part; sums run over rows, so that a register holds four waves. What remains for each wave alone,
Newton's method on a polynomial whose coefficients are known, is in fp64.

A step leaves the next one's rows x behind: which cells it takes and what it multiplies the kernel by is known as soon
as the state is.
"""

from __future__ import annotations

import math

import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F64, I64, compiled, f32, f64, i64
from lightning_lip.kernels.cpu.compiled.products import clear, row_of, scales_of
from lightning_lip.kernels.cpu.compiled.registers import column_squares, pair_sums, scale_columns, turn_and_add
from lightning_lip.kernels.cpu.compiled.ritz import largest, new_scale
from lightning_lip.kernels.cpu.compiled.symbols.cells import cell_of, parts, prepare, store, take_turns, write_phases
from lightning_lip.kernels.cpu.compiled.symbols.uphill import WORK, climb, write_powers

_STRIP = 32
"""Columns whose sums over pairs of taps are formed at a time: their taps lie in the first-level cache."""


@compiled
def _add_pairs(row: I64, even: int, odd: int) -> None:
    """Write the sums of ``<z_j, z_k>`` for each lag, of all waves."""
    lanes, columns, step = row[at.LANES], row[at.COLUMNS], row[at.COLUMN_STEP]
    clear(f32(even, lanes * row[at.N_LAGS]))
    clear(f32(odd, lanes * row[at.N_LAGS]))
    pairs, tap_step = i64(row[at.PAIRS], 3 * row[at.N_PAIRS]), 4 * lanes * row[at.TAP_STEP]
    for begin in range(0, columns, _STRIP):
        size, products = min(_STRIP, columns - begin), row[at.PRODUCTS] + 4 * lanes * step * begin
        for k in range(row[at.N_PAIRS]):
            one, other = products + tap_step * pairs[3 * k], products + tap_step * pairs[3 * k + 1]
            lag = 4 * lanes * pairs[3 * k + 2]
            for c in range(0, 4 * lanes, 32):
                # <z_l, z_j> of taps j before l.
                pair_sums(other + c, one + c, lanes * step, size, even + lag + c, odd + lag + c)


@compiled
def _join(row: I64, right: int, cosines: int, sines: int) -> None:
    """Write ``P(w)^H u``, the sums of ``e^{-i q.w} z`` over the taps of each residue, of all waves."""
    lanes, columns, n_residues = row[at.LANES], row[at.COLUMNS], row[at.N_RESIDUES]
    residues = i64(row[at.RESIDUES], row[at.TAPS])
    clear(f32(right, lanes * columns * n_residues))
    for j in range(row[at.TAPS]):
        source = row[at.PRODUCTS] + 4 * lanes * row[at.TAP_STEP] * j
        target, phase = right + 4 * lanes * residues[j], 4 * lanes * j
        for c in range(0, 4 * lanes, 32):
            turn_and_add(
                source + c,
                lanes * row[at.COLUMN_STEP],
                columns,
                cosines + phase + c,
                sines + phase + c,
                target + c,
                lanes * n_residues,
            )


@compiled
def _inverse(number: float) -> float:
    """Return its reciprocal; 0 for 0, NaN for NaN and infinity."""
    if number == 0.0:
        return 0.0
    return 1.0 / number if number < np.inf else np.nan


@compiled
def _write_leader(header: I64, row: I64, wave: int, over_image: float, over: float, scratch: int) -> None:
    """Write u and x of the leading wave, of which the phases are still those of ``e^{-i q.w}``."""
    p, q, lanes, n_residues = row[at.P], row[at.Q], row[at.LANES], row[at.N_RESIDUES]
    long, short, images = f32(row[at.LONG], 2 * q), f32(row[at.SHORT], 2 * p), f32(row[at.IMAGES], lanes * q)
    factor = np.float32(over_image)
    for i in range(q):
        long[i], long[q + i] = images[lanes * i + 2 * wave] * factor, images[lanes * i + 2 * wave + 1] * factor
    scales = scales_of(header, row)
    if scales:
        left, scale = f32(row[at.LEFT], 2 * q), f32(scales, q)
        for i in range(q):
            left[i], left[q + i] = long[i] * scale[i], long[q + i] * scale[i]
    right, cosines, sines, _, _ = parts(row, scratch)
    found, residues = f32(right, lanes * row[at.COLUMNS] * n_residues), i64(row[at.RESIDUES], row[at.TAPS])
    for j in range(row[at.TAPS]):
        cosine = np.float32(over) * f32(cosines + 4 * (lanes * j + 2 * wave), 1)[0]
        sine = np.float32(over) * f32(sines + 4 * (lanes * j + 2 * wave), 1)[0]
        target = row[at.TAP_STEP] * j
        for i in range(row[at.COLUMNS]):
            source = lanes * (n_residues * i + residues[j]) + 2 * wave
            short[target] = found[source] * cosine - found[source + 1] * sine
            short[p + target] = found[source] * sine + found[source + 1] * cosine
            target += row[at.COLUMN_STEP]


@compiled
def _give_up(row: I64, header: I64, unit: int, sigma: float, w: F64) -> None:
    """Write what a kernel that is zero, or not finite, gives: sigma as it is, and cells without momentum."""
    for vector in (
        f32(row[at.LONG], 2 * row[at.Q]),
        f32(row[at.LEFT], 2 * row[at.Q]),
        f32(row[at.SHORT], 2 * row[at.P]),
    ):
        for j in range(vector.size):
            vector[j] = np.float32(sigma)
    f64(header[at.SIGMAS], header[at.UNITS])[unit] = sigma
    if header[at.ADVANCE]:
        for wave in range(row[at.R] // 2):
            store(row, i64(row[at.CHOSEN], row[at.R] // 2)[wave], 0, wave, 0.0, 0.0, sigma, w)


@compiled
def finish_symbol(header: I64, unit: int, scratch: int) -> bool:
    """Turn a unit's T and Z into sigma, its vectors and, if they are to advance, the state and the next rows x.

    Returns:
        Whether T must be formed again, with the scale that was stored.
    """
    row = row_of(header, unit)
    lanes, p, q, dims, n_waves = row[at.LANES], row[at.P], row[at.Q], row[at.DIMS], row[at.R] // 2
    side, n_lags = row[at.COLUMNS] * row[at.N_RESIDUES], row[at.N_LAGS]
    images, products, advance = row[at.IMAGES], row[at.PRODUCTS], header[at.ADVANCE] != 0
    # Squared norms of T, Z and the right vectors by column, then as norms by wave; frequencies; the rest of scratch.
    of_images, of_products = f64(scratch, lanes), f64(scratch + 8 * lanes, lanes)
    of_right = f64(scratch + 16 * lanes, lanes)
    sigmas = f64(scratch + 24 * lanes, n_waves)
    w = f64(scratch + 8 * (3 * lanes + lanes // 2), 3 * n_waves)
    real = f64(scratch + 56 * lanes, n_lags)
    imaginary = f64(scratch + 56 * lanes + 8 * n_lags, n_lags)
    powers = f64(scratch + 56 * lanes + 16 * n_lags, 6 * row[at.N_POWERS])
    work = f64(scratch + 8 * (7 * lanes + 2 * n_lags + 6 * row[at.N_POWERS] + row[at.N_CELLS]), WORK)
    right, cosines, sines, even, odd = parts(row, scratch)

    _write_norms(images, lanes, q, of_images)
    total = 0.0
    for wave in range(n_waves):
        total += of_images[wave] * of_images[wave]
    # Whatever is not between them is looked at again, NaN too.
    if not at.MIN_NORM < math.sqrt(total) < at.MAX_NORM:
        top = largest(images, lanes * q)
        if (top < at.LOW or top > at.HIGH) and new_scale(header, unit, top):
            return True
        if top >= at.INFINITE or top == 0:
            _give_up(row, header, unit, 0.0 if top == 0 else np.nan, w)
            if advance:
                take_turns(row)
                prepare(header, unit, scratch)
            return False
    _write_norms(products, lanes, p, of_products)
    factors = f32(even, lanes)
    clear(factors)
    for wave in range(n_waves):
        if 0.0 < of_products[wave] < np.inf:
            # Unit columns: their products in fp32 are those of any other kernel.
            factors[2 * wave] = factors[2 * wave + 1] = np.float32(min(1.0 / of_products[wave], 1e38))
    for c in range(0, 4 * lanes, 32):
        scale_columns(products + c, lanes, p, even + c)
    if n_lags > 1:
        _add_pairs(row, even, odd)
    chosen = i64(row[at.CHOSEN], n_waves)
    clear(f32(cosines, 2 * lanes * row[at.TAPS]))
    for wave in range(n_waves):
        own, cell = w[3 * wave : 3 * wave + dims], f32(cell_of(row, chosen[wave]), 4 * side + dims)
        for a in range(dims):
            own[a] = np.float64(cell[4 * side + a])
        if n_lags > 1 and 0.0 < of_products[wave] < np.inf:
            for d in range(n_lags):
                first = lanes * d + 2 * wave
                sums, differences = f32(even, lanes * n_lags), f32(odd, lanes * n_lags)
                real[d] = np.float64(sums[first]) + np.float64(sums[first + 1])
                imaginary[d] = np.float64(differences[first]) - np.float64(differences[first + 1])
            centre = f64(row[at.CENTRES] + 8 * dims * chosen[wave], dims)
            climb(row, real, imaginary, powers, work, centre, own)
            for a in range(dims):
                own[a] = np.float64(np.float32(own[a]))
        write_powers(row, own, powers)
        write_phases(row, wave, -1.0, powers, cosines, sines)
    _join(row, right, cosines, sines)
    _write_norms(right, lanes, side, of_right)
    best = 0
    for wave in range(n_waves):
        sigmas[wave] = of_right[wave] * of_products[wave] * _inverse(of_images[wave])
        if not sigmas[wave] <= sigmas[best] and not math.isnan(sigmas[best]):
            best = wave
    f64(header[at.SIGMAS], header[at.UNITS])[unit] = sigmas[best]
    _write_leader(header, row, best, _inverse(of_images[best]), _inverse(of_right[best]), scratch)
    if not advance:
        return False
    scale = f64(header[at.SCALES], header[at.UNITS])[unit]
    for wave in range(n_waves):
        growth = of_images[wave] / scale * _inverse(sigmas[wave])
        own = w[3 * wave : 3 * wave + dims]
        store(row, chosen[wave], right, wave, _inverse(of_right[wave]), growth, sigmas[wave], own)
    take_turns(row)
    prepare(header, unit, scratch)
    return False


@compiled
def _write_norms(x: int, lanes: int, size: int, out: F64) -> None:
    """Write the norm of each wave's two columns of X (size, lanes) to the beginning of `out` (lanes,)."""
    for c in range(0, lanes, 8):
        column_squares(x + 4 * c, lanes, size, out.ctypes.data + 8 * c)
    for wave in range(lanes // 2):
        out[wave] = math.sqrt(out[2 * wave] + out[2 * wave + 1])
