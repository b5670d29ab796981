"""Depthwise convolutions, compiled for the CPU: the largest value of the symbols of all channels.

The algorithm is that of :mod:`lightning_lip.kernels.scalars`; only those channels are climbed that may have the largest
value of all, and only from those peaks. A unit is the whole kernel, and its "cells" are the points of the grid.
"""

from __future__ import annotations

import math

import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F32, F64, I64, compiled, f32, f64, i64
from lightning_lip.kernels.cpu.compiled.products import add_forward, clear, copy, row_of, scales_of, weight_of, widen
from lightning_lip.kernels.cpu.compiled.symbols.uphill import WORK, climb, power, write_powers
from lightning_lip.kernels.scalars import ASIDE, N_CLIMBS

_STRIP = 32
"""Channels whose values on the grid are formed at a time."""

_BEHIND = 0.97
"""Of the best value, below which a peak is left after the first steps of Newton's method."""


def scratch_sizes(channels: int, taps: int, n_lags: int, n_powers: int, n_points: int) -> tuple[int, int]:
    """Return how many numbers a unit needs in fp64, and behind them in fp32."""
    return channels + 2 * n_lags + 6 * n_powers + WORK + 12, _STRIP * (
        taps + n_lags + n_points + 1
    ) + taps + n_lags + n_points


@compiled
def _read(header: I64, row: I64, channel: int, taps: F32) -> float:
    """Copy the taps of a channel, with its scale, divided by their largest magnitude; return that, NaN or infinity too.

    All of it in fp32; zeros are left alone.
    """
    weight, ld = weight_of(header, row), row[at.WEIGHT_LD]
    if row[at.WEIGHT_BF16]:
        widen(taps.ctypes.data, weight + 2 * ld * channel, taps.size)
    else:
        copy(taps, f32(weight + 4 * ld * channel, taps.size))
    scales = scales_of(header, row)
    scale = np.float64(f32(scales, channel + 1)[channel]) if scales else 1.0
    magnitude = 0.0
    for j in range(taps.size):
        size = abs(np.float64(taps[j]) * scale)
        if not size <= magnitude:
            magnitude = size
            if not size < np.inf:
                return np.nan
    if magnitude > 0.0:
        for j in range(taps.size):
            taps[j] = np.float32(np.float64(taps[j]) * scale / magnitude)
    return magnitude


@compiled
def _sum_pairs(row: I64, taps: F32, sums: F32) -> None:
    """Write the coefficients of f for each lag."""
    pairs = i64(row[at.PAIRS], 3 * row[at.N_PAIRS])
    clear(sums)
    for k in range(row[at.N_PAIRS]):
        sums[pairs[3 * k + 2]] += taps[pairs[3 * k]] * taps[pairs[3 * k + 1]]


@compiled
def _write_values(header: I64, row: I64, values: F64, taps: F32, floats: int) -> int:
    """Write the largest value of each channel's |P(w)| on the grid; return whose is the largest, or is not finite."""
    n_taps, n_lags, n_points = row[at.TAPS], row[at.N_LAGS], row[at.N_CELLS]
    strip = f32(floats, _STRIP * n_taps)
    coefficients = f32(floats + 4 * _STRIP * n_taps, _STRIP * n_lags)
    on_grid = f32(floats + 4 * _STRIP * (n_taps + n_lags), _STRIP * n_points)
    best = f32(floats + 4 * _STRIP * (n_taps + n_lags + n_points), _STRIP)
    pairs = i64(row[at.PAIRS], 3 * row[at.N_PAIRS])
    most = 0
    clear(strip)
    for begin in range(0, row[at.Q], _STRIP):
        size = min(_STRIP, row[at.Q] - begin)
        for k in range(size):
            values[begin + k] = _read(header, row, begin + k, taps)
            if math.isnan(values[begin + k]):
                return begin + k
            for j in range(n_taps):
                strip[_STRIP * j + k] = taps[j]
        clear(coefficients)
        for number in range(row[at.N_PAIRS]):
            one, other = f32(floats + 4 * _STRIP * pairs[3 * number], _STRIP), pairs[3 * number + 1]
            second = f32(floats + 4 * _STRIP * other, _STRIP)
            lag = f32(coefficients.ctypes.data + 4 * _STRIP * pairs[3 * number + 2], _STRIP)
            for k in range(_STRIP):
                lag[k] += one[k] * second[k]
        clear(on_grid)
        add_forward(row[at.COSINES], n_lags, n_points, n_lags, coefficients.ctypes.data, on_grid.ctypes.data, _STRIP)
        clear(best)
        for p in range(n_points):
            own = f32(on_grid.ctypes.data + 4 * _STRIP * p, _STRIP)
            for k in range(_STRIP):
                best[k] = max(best[k], own[k])
        for k in range(size):
            values[begin + k] *= math.sqrt(np.float64(best[k]))
            if values[begin + k] > values[most]:
                most = begin + k
    return most


@compiled
def _write_point(row: I64, taps: F32, magnitude: float, w: F64, powers: F64, found: F64, short: F32) -> float:
    """Write x at a frequency; return sigma there. `found` is scratch, (2,)."""
    dims, n_taps = row[at.DIMS], row[at.TAPS]
    residues, exponents = i64(row[at.RESIDUES], n_taps), i64(row[at.EXPONENTS], n_taps * dims)
    write_powers(row, w, powers)
    square = 0.0
    for residue in range(row[at.N_RESIDUES]):
        found[0] = found[1] = 0.0
        for j in range(n_taps):
            if residues[j] == residue:
                cosine, sine = power(row, powers, exponents, j * dims)
                found[0] += taps[j] * cosine
                found[1] -= taps[j] * sine
        square += found[0] * found[0] + found[1] * found[1]
        for j in range(n_taps):
            if residues[j] == residue:
                cosine, sine = power(row, powers, exponents, j * dims)
                short[j] = np.float32(found[0] * cosine - found[1] * sine)
                short[n_taps + j] = np.float32(found[0] * sine + found[1] * cosine)
    length = math.sqrt(square)
    if length > 0.0:
        over = np.float32(1.0 / length)
        for j in range(2 * n_taps):
            short[j] *= over
    return length * magnitude


@compiled
def finish_scalars(header: I64, unit: int, scratch: int) -> None:
    """Write sigma, u and x of the channel with the largest symbol."""
    row = row_of(header, unit)
    n, taps, dims, n_lags, n_points = row[at.Q], row[at.TAPS], row[at.DIMS], row[at.N_LAGS], row[at.N_CELLS]
    values = f64(scratch, n)
    real, imaginary = f64(scratch + 8 * n, n_lags), f64(scratch + 8 * (n + n_lags), n_lags)
    powers = f64(scratch + 8 * (n + 2 * n_lags), 6 * row[at.N_POWERS])
    work = f64(scratch + 8 * (n + 2 * n_lags + 6 * row[at.N_POWERS]), WORK)
    w, centre = f64(work.ctypes.data + 8 * WORK, 3), f64(work.ctypes.data + 8 * (WORK + 3), 3)
    best_w, found = f64(work.ctypes.data + 8 * (WORK + 6), 3), f64(work.ctypes.data + 8 * (WORK + 9), 2)
    floats = scratch + 8 * row[at.N_DOUBLES]
    own, sums = f32(floats, taps), f32(floats + 4 * taps, n_lags)
    on_grid = f32(floats + 4 * (taps + n_lags), n_points)
    strips = floats + 4 * (taps + n_lags + n_points)
    long, left, short = f32(row[at.LONG], 2 * n), f32(row[at.LEFT], 2 * n), f32(row[at.SHORT], 2 * taps)
    sigmas, factor = f64(header[at.SIGMAS], header[at.UNITS]), f64(row[at.HALVES], dims + 1)[dims]

    top = _write_values(header, row, values, own, strips)
    most = values[top]
    if not 0.0 < most < np.inf:
        sigmas[unit] = most
        for vector in (long, left, short):
            for j in range(vector.size):
                vector[j] = np.float32(most)
        return
    sigma, leader = 0.0, top
    for turn in range(-1, n):
        channel = top if turn < 0 else turn
        # All channels and peaks that may lead above the best so far: not below 1 / factor of it on the grid.
        if values[channel] * factor < max(sigma, most) or turn == top:
            continue
        magnitude = _read(header, row, channel, own)
        _sum_pairs(row, own, sums)
        for d in range(n_lags):
            real[d], imaginary[d] = np.float64(sums[d]), 0.0
        for p in range(n_points):
            cosines, value = f32(row[at.COSINES] + 4 * n_lags * p, n_lags), np.float32(0)
            for d in range(n_lags):
                value += cosines[d] * sums[d]
            on_grid[p] = value
        neighbours = i64(row[at.NEIGHBOURS], 2 * dims * n_points)
        for p in range(n_points):
            value = math.sqrt(max(np.float64(on_grid[p]), 0.0)) * magnitude
            is_peak = value * factor >= max(sigma, most)
            for k in range(2 * dims):
                is_peak = is_peak and on_grid[neighbours[2 * dims * p + k]] <= on_grid[p]
            if not is_peak:
                continue
            for a in range(dims):
                w[a] = f64(row[at.CENTRES], dims * n_points)[dims * p + a] + ASIDE
            for _ in range(N_CLIMBS):
                for a in range(dims):
                    centre[a] = w[a]
                value = math.sqrt(max(climb(row, real, imaginary, powers, work, centre, w), 0.0)) * magnitude
                # The steps that are left change a value by less: Newton's method began close to its peak.
                if value < _BEHIND * sigma:
                    break
            if value > sigma:
                sigma, leader = value, channel
                for a in range(dims):
                    best_w[a] = w[a]
    sigmas[unit] = _write_point(row, own, _read(header, row, leader, own), best_w, powers, found, short)
    clear(long)
    clear(left)
    scales = scales_of(header, row)
    long[leader], left[leader] = np.float32(1), f32(scales, n)[leader] if scales else np.float32(1)
    row[at.LEADING_ROW] = leader
