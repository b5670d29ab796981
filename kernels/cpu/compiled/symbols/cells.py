"""The cells of a convolution's symbol, compiled for the CPU: what is kept, and which of them are next."""

from __future__ import annotations

import math

import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F64, I64, compiled, f32, f64, i64
from lightning_lip.kernels.cpu.compiled.products import clear, row_of
from lightning_lip.kernels.cpu.compiled.registers import turn
from lightning_lip.kernels.cpu.compiled.symbols.uphill import WORK, power, reduced, write_powers
from lightning_lip.kernels.symbol import MOMENTUM, SAME_WAVE

_SHORTEST = 1e-6
"""Of a vector with momentum."""


def scratch_sizes(lanes: int, side: int, taps: int, n_lags: int, n_powers: int, n_cells: int) -> tuple[int, int]:
    """Return how many numbers a unit needs in fp64, and behind them in fp32."""
    return 7 * lanes + 2 * n_lags + 6 * n_powers + n_cells + WORK, lanes * (side + 2 * (n_lags + taps))


@compiled
def parts(row: I64, scratch: int) -> tuple[int, int, int, int, int]:
    """Return the addresses of fp32 scratch: right vectors, cosines, sines, and two sums over pairs."""
    lanes, taps = row[at.LANES], row[at.TAPS]
    right = scratch + 8 * row[at.N_DOUBLES]
    cosines = right + 4 * lanes * row[at.COLUMNS] * row[at.N_RESIDUES]
    sines = cosines + 4 * lanes * taps
    even = sines + 4 * lanes * taps
    return right, cosines, sines, even, even + 4 * lanes * row[at.N_LAGS]


@compiled
def write_phases(row: I64, wave: int, sign: float, powers: F64, cosines: int, sines: int) -> None:
    """Write cosine and sine of ``q.w`` of each tap for the two columns of a wave; see `turn` for the signs."""
    lanes, dims = row[at.LANES], row[at.DIMS]
    exponents = i64(row[at.EXPONENTS], row[at.TAPS] * dims)
    cosine, sine = f32(cosines, lanes * row[at.TAPS]), f32(sines, lanes * row[at.TAPS])
    for j in range(row[at.TAPS]):
        real, imaginary = power(row, powers, exponents, j * dims)
        first = lanes * j + 2 * wave
        cosine[first] = cosine[first + 1] = np.float32(real)
        sine[first], sine[first + 1] = np.float32(-sign * imaginary), np.float32(sign * imaginary)


@compiled
def cell_of(row: I64, number: int) -> int:
    """Return the address of a cell's row of the state."""
    address: int = row[at.STATE] + 4 * number * (4 * row[at.COLUMNS] * row[at.N_RESIDUES] + row[at.DIMS] + 2)
    return address


@compiled
def store(row: I64, number: int, right: int, wave: int, inverse: float, growth: float, sigma: float, w: F64) -> None:
    """Write the next v, the one before, w and sigma of a cell.

    A cell whose symbol is zero, or not finite, keeps its vector and loses its momentum.
    """
    lanes, dims, side = row[at.LANES], row[at.DIMS], row[at.COLUMNS] * row[at.N_RESIDUES]
    cell = f32(cell_of(row, number), 4 * side + dims + 2)
    vector, before = cell[: 2 * side], cell[2 * side : 4 * side]
    found = f32(right, lanes * side)
    length, beta = 0.0, np.float32(MOMENTUM)
    is_usable = 0.0 < sigma < np.inf
    if is_usable:
        factor, total = np.float32(growth * inverse), np.float32(0)
        for part in range(2):
            for i in range(side):
                mixed = factor * found[lanes * i + 2 * wave + part] - beta * before[side * part + i]
                before[side * part + i] = mixed
                total += mixed * mixed
        length = math.sqrt(total)
        is_usable = _SHORTEST < length < np.inf
    if is_usable:
        over = np.float32(1.0 / length)
        for i in range(2 * side):
            old = vector[i]
            vector[i] = before[i] * over
            before[i] = old * over
        for a in range(dims):
            cell[4 * side + a] = np.float32(w[a])
    else:
        for i in range(2 * side):
            before[i] = np.float32(0)
    cell[4 * side + dims] = np.float32(sigma)


@compiled
def take_turns(row: I64) -> None:
    """Go on to those whose turn is next."""
    n, at_turn = row[at.N_CELLS], 4 * row[at.COLUMNS] * row[at.N_RESIDUES] + row[at.DIMS] + 1
    for number in range(n):
        turn_of = f32(cell_of(row, number) + 4 * at_turn, 1)
        turn_of[0] = np.float32((np.int64(np.rint(turn_of[0])) + row[at.N_TURN]) % n)


@compiled
def _is_twin(row: I64, one: int, other: int) -> bool:
    """Return whether two cells hold the same wave: one is near the other, or near its conjugate at -w."""
    dims, side = row[at.DIMS], row[at.COLUMNS] * row[at.N_RESIDUES]
    a, b = f32(cell_of(row, one), 4 * side + dims), f32(cell_of(row, other), 4 * side + dims)
    halves = f64(row[at.HALVES], dims)
    for sign in (1.0, -1.0):
        is_near = True
        for k in range(dims):
            away = reduced(sign * np.float64(a[4 * side + k]) - np.float64(b[4 * side + k]))
            is_near = is_near and (halves[k] == 0.0 or abs(away) < halves[k])
        if not is_near:
            continue
        rr = ii = ri = ir = np.float32(0)
        for k in range(side):
            rr += a[k] * b[k]
            ii += a[side + k] * b[side + k]
            ri += a[k] * b[side + k]
            ir += a[side + k] * b[k]
        real, imaginary = rr + np.float32(sign) * ii, ri - np.float32(sign) * ir
        if real * real + imaginary * imaginary > SAME_WAVE * SAME_WAVE:
            return True
    return False


@compiled
def _choose(row: I64, n_turn: int, rank: F64) -> None:
    """Write which cells are next: the strongest without twins, then those whose turn it is; no two the same."""
    n, n_waves = row[at.N_CELLS], row[at.R] // 2
    chosen, at_sigma = i64(row[at.CHOSEN], n_waves), 4 * row[at.COLUMNS] * row[at.N_RESIDUES] + row[at.DIMS]
    if n_waves == n:
        for number in range(n):
            chosen[number] = number
        return
    for number in range(n):
        sigma = np.float64(f32(cell_of(row, number) + 4 * at_sigma, 1)[0])
        rank[number] = sigma if math.isfinite(sigma) else np.inf  # what is not finite is looked at
    for place in range(n_waves - n_turn):
        best = 0
        for number in range(1, n):
            if rank[number] > rank[best]:
                best = number
        chosen[place] = best
        # Twins come last, where there are not enough others.
        rank[best] = -2.0
        for number in range(n):
            if rank[number] >= 0.0 and _is_twin(row, number, best):
                rank[number] = -1.0
    number = np.int64(np.rint(f32(cell_of(row, 0) + 4 * (at_sigma + 1), 1)[0]))
    place = n_waves - n_turn
    while place < n_waves:
        if rank[number % n] > -2.0:
            chosen[place] = number % n
            place += 1
        number += 1


@compiled
def prepare(header: I64, unit: int, scratch: int) -> None:
    """Choose the cells of the next step and write their rows ``x = v (x) e^{i q.w}``."""
    row = row_of(header, unit)
    lanes, dims, n_waves = row[at.LANES], row[at.DIMS], row[at.R] // 2
    columns, taps, n_residues, n_lags = row[at.COLUMNS], row[at.TAPS], row[at.N_RESIDUES], row[at.N_LAGS]
    side = columns * n_residues
    after = scratch + 56 * lanes + 16 * n_lags
    powers, rank = f64(after, 6 * row[at.N_POWERS]), f64(after + 48 * row[at.N_POWERS], row[at.N_CELLS])
    w = f64(scratch, 3)
    _choose(row, row[at.N_TURN] if header[at.ADVANCE] else 0, rank)
    right, cosines, sines, _, _ = parts(row, scratch)
    vectors = f32(right, lanes * side)
    clear(vectors)
    clear(f32(cosines, 2 * lanes * taps))
    chosen = i64(row[at.CHOSEN], n_waves)
    for wave in range(n_waves):
        cell = f32(cell_of(row, chosen[wave]), 4 * side + dims)
        for i in range(side):
            vectors[lanes * i + 2 * wave] = cell[i]
            vectors[lanes * i + 2 * wave + 1] = cell[side + i]
        for a in range(dims):
            w[a] = np.float64(cell[4 * side + a])
        write_powers(row, w, powers)
        write_phases(row, wave, 1.0, powers, cosines, sines)
    residues = i64(row[at.RESIDUES], taps)
    for j in range(taps):
        source, phase = right + 4 * lanes * residues[j], 4 * lanes * j
        target = row[at.VECTORS] + 4 * lanes * row[at.TAP_STEP] * j
        for c in range(0, 4 * lanes, 32):
            turn(
                source + c,
                lanes * n_residues,
                columns,
                cosines + phase + c,
                sines + phase + c,
                target + c,
                lanes * row[at.COLUMN_STEP],
            )
