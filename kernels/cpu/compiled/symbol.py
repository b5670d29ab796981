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
from lightning_lip.kernels.cpu.compiled.registers import (
    column_squares,
    pair_sums,
    scale_columns,
    turn,
    turn_and_add,
)
from lightning_lip.kernels.cpu.compiled.ritz import largest, new_scale
from lightning_lip.kernels.frequencies import LEAST_CURVATURE, LONGEST_STEP, N_NEWTON_STEPS
from lightning_lip.kernels.symbol import MOMENTUM, SAME_WAVE

_STRIP = 32
"""Columns whose sums over pairs of taps are formed at a time: their taps lie in the first-level cache."""

_SHORTEST = 1e-6
"""Of a vector with momentum."""

_DERIVATIVES = 16
"""Numbers of a polynomial's value, at 0, gradient, from 1 on, and negative Hessian, from 4 on."""

WORK = 2 * _DERIVATIVES + 16


def scratch_sizes(lanes: int, side: int, taps: int, n_lags: int, n_powers: int, n_cells: int) -> tuple[int, int]:
    """Return how many numbers a unit needs in fp64, and behind them in fp32."""
    return 7 * lanes + 2 * n_lags + 6 * n_powers + n_cells + WORK, lanes * (side + 2 * (n_lags + taps))


@compiled
def _parts(row: I64, scratch: int) -> tuple[int, int, int, int, int]:
    """Return the addresses of fp32 scratch: right vectors, cosines, sines, and two sums over pairs."""
    lanes, taps = row[at.LANES], row[at.TAPS]
    right = scratch + 8 * row[at.N_DOUBLES]
    cosines = right + 4 * lanes * row[at.COLUMNS] * row[at.N_RESIDUES]
    sines = cosines + 4 * lanes * taps
    even = sines + 4 * lanes * taps
    return right, cosines, sines, even, even + 4 * lanes * row[at.N_LAGS]


@compiled
def write_powers(row: I64, w: F64, powers: F64) -> None:
    """Write ``e^{i k w}`` of each dimension, k from 0 on: (dims, n_powers, 2)."""
    n = row[at.N_POWERS]
    for a in range(row[at.DIMS]):
        own = powers[2 * n * a : 2 * n * (a + 1)]
        cosine, sine = math.cos(w[a]), math.sin(w[a])
        own[0], own[1] = 1.0, 0.0
        for k in range(1, n):
            own[2 * k] = own[2 * k - 2] * cosine - own[2 * k - 1] * sine
            own[2 * k + 1] = own[2 * k - 2] * sine + own[2 * k - 1] * cosine


@compiled
def power(row: I64, powers: F64, exponents: I64, begin: int) -> tuple[float, float]:
    """Return ``e^{i q.w}`` of the exponents q from `begin` on."""
    n = row[at.N_POWERS]
    real, imaginary = 1.0, 0.0
    for a in range(row[at.DIMS]):
        q = exponents[begin + a]
        cosine, sine = powers[2 * (n * a + abs(q))], powers[2 * (n * a + abs(q)) + 1]
        if q < 0:
            sine = -sine
        real, imaginary = real * cosine - imaginary * sine, real * sine + imaginary * cosine
    return real, imaginary


@compiled
def _write_phases(row: I64, wave: int, sign: float, powers: F64, cosines: int, sines: int) -> None:
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
def _cell(row: I64, number: int) -> int:
    """Return the address of a cell's row of the state."""
    return row[at.STATE] + 4 * number * (4 * row[at.COLUMNS] * row[at.N_RESIDUES] + row[at.DIMS] + 2)


@compiled
def _derive(row: I64, real: F64, imaginary: F64, w: F64, powers: F64, out: F64) -> float:
    """Write f, its gradient and its negative Hessian at w; return f."""
    dims = row[at.DIMS]
    lags = i64(row[at.LAGS], row[at.N_LAGS] * dims)
    write_powers(row, w, powers)
    for k in range(1, _DERIVATIVES):
        out[k] = 0.0
    value = real[0]
    for d in range(1, row[at.N_LAGS]):
        cosine, sine = power(row, powers, lags, d * dims)
        # Twice: the lags that are not here are the negatives of these.
        even = 2.0 * (real[d] * cosine - imaginary[d] * sine)
        odd = 2.0 * (real[d] * sine + imaginary[d] * cosine)
        value += even
        for a in range(dims):
            out[1 + a] -= odd * lags[d * dims + a]
            for b in range(a + 1):
                out[4 + 3 * a + b] += even * lags[d * dims + a] * lags[d * dims + b]
    halves = f64(row[at.HALVES], dims)
    for a in range(dims):
        if halves[a] == 0.0:  # f is constant along this dimension, and the way there 0
            out[4 + 4 * a] = 1.0 + abs(value)
        for b in range(a):
            out[4 + 3 * b + a] = out[4 + 3 * a + b]
    out[0] = value
    return value


@compiled
def _write_uphill(dims: int, at_w: F64, a: F64, step: F64) -> None:
    """Write Newton's step where the negative Hessian is positive definite, and a bounded gradient step elsewhere.

    At most `LONGEST_STEP` long. `a` is scratch, (9,).
    """
    least = LEAST_CURVATURE * max(abs(at_w[0]), 1e-30)
    for k in range(9):
        a[k] = at_w[4 + k]
    for i in range(dims):
        step[i] = at_w[1 + i]
    is_concave = True
    for i in range(dims):
        if not a[4 * i] > least:
            is_concave = False
            break
        for k in range(i + 1, dims):
            factor = a[3 * k + i] / a[4 * i]
            for j in range(dims):
                a[3 * k + j] -= factor * a[3 * i + j]
            step[k] -= factor * step[i]
    square = 0.0
    for i in range(dims - 1, -1, -1):
        if is_concave:
            for j in range(i + 1, dims):
                step[i] -= a[3 * i + j] * step[j]
            step[i] /= a[4 * i]
        else:
            bound = least
            for j in range(dims):
                bound += abs(at_w[4 + 3 * i + j])
            step[i] = at_w[1 + i] / bound
        square += step[i] * step[i]
    if square > LONGEST_STEP * LONGEST_STEP:
        for i in range(dims):
            step[i] *= LONGEST_STEP / math.sqrt(square)


@compiled
def climb(row: I64, real: F64, imaginary: F64, powers: F64, work: F64, centre: F64, w: F64) -> None:
    """Move w uphill within its cell by Newton's method: f is not lower afterwards, unless a border is in the way."""
    dims = row[at.DIMS]
    now, then = work[:_DERIVATIVES], work[_DERIVATIVES : 2 * _DERIVATIVES]
    step, new, matrix = work[2 * _DERIVATIVES :], work[2 * _DERIVATIVES + 3 :], work[2 * _DERIVATIVES + 6 :]
    f = _derive(row, real, imaginary, w, powers, now)
    for _ in range(N_NEWTON_STEPS):
        _write_uphill(dims, now, matrix, step)
        rises = False
        for _ in range(2):
            for a in range(dims):
                new[a] = w[a] + step[a]
            found = _derive(row, real, imaginary, new, powers, then)
            if found >= f:
                f, rises = found, True
                now, then = then, now
                for a in range(dims):
                    w[a] = new[a]
                break
            for a in range(dims):
                step[a] *= 0.25
        if not rises:
            break
    halves = f64(row[at.HALVES], dims)
    for a in range(dims):
        w[a] = centre[a] + min(max(_reduced(w[a] - centre[a]), -halves[a]), halves[a])


@compiled
def _reduced(angle: float) -> float:
    """Return an angle between -pi and pi."""
    return angle - 2.0 * math.pi * np.rint(angle * (0.5 / math.pi))


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
def _store(row: I64, number: int, right: int, wave: int, inverse: float, growth: float, sigma: float, w: F64) -> None:
    """Write the next v, the one before, w and sigma of a cell.

    A cell whose symbol is zero, or not finite, keeps its vector and loses its momentum.
    """
    lanes, dims, side = row[at.LANES], row[at.DIMS], row[at.COLUMNS] * row[at.N_RESIDUES]
    cell = f32(_cell(row, number), 4 * side + dims + 2)
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
    right, cosines, sines, _, _ = _parts(row, scratch)
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
            _store(row, i64(row[at.CHOSEN], row[at.R] // 2)[wave], 0, wave, 0.0, 0.0, sigma, w)


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
    right, cosines, sines, even, odd = _parts(row, scratch)

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
                _take_turns(row)
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
        own, cell = w[3 * wave : 3 * wave + dims], f32(_cell(row, chosen[wave]), 4 * side + dims)
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
        _write_phases(row, wave, -1.0, powers, cosines, sines)
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
        _store(row, chosen[wave], right, wave, _inverse(of_right[wave]), growth, sigmas[wave], own)
    _take_turns(row)
    prepare(header, unit, scratch)
    return False


@compiled
def _write_norms(x: int, lanes: int, size: int, out: F64) -> None:
    """Write the norm of each wave's two columns of X (size, lanes) to the beginning of `out` (lanes,)."""
    for c in range(0, lanes, 8):
        column_squares(x + 4 * c, lanes, size, out.ctypes.data + 8 * c)
    for wave in range(lanes // 2):
        out[wave] = math.sqrt(out[2 * wave] + out[2 * wave + 1])


@compiled
def _take_turns(row: I64) -> None:
    """Go on to those whose turn is next."""
    n, at_turn = row[at.N_CELLS], 4 * row[at.COLUMNS] * row[at.N_RESIDUES] + row[at.DIMS] + 1
    for number in range(n):
        turn_of = f32(_cell(row, number) + 4 * at_turn, 1)
        turn_of[0] = np.float32((np.int64(np.rint(turn_of[0])) + row[at.N_TURN]) % n)


@compiled
def _is_twin(row: I64, one: int, other: int) -> bool:
    """Return whether two cells hold the same wave: one is near the other, or near its conjugate at -w."""
    dims, side = row[at.DIMS], row[at.COLUMNS] * row[at.N_RESIDUES]
    a, b = f32(_cell(row, one), 4 * side + dims), f32(_cell(row, other), 4 * side + dims)
    halves = f64(row[at.HALVES], dims)
    for sign in (1.0, -1.0):
        is_near = True
        for k in range(dims):
            away = _reduced(sign * np.float64(a[4 * side + k]) - np.float64(b[4 * side + k]))
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
        sigma = np.float64(f32(_cell(row, number) + 4 * at_sigma, 1)[0])
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
    number = np.int64(np.rint(f32(_cell(row, 0) + 4 * (at_sigma + 1), 1)[0]))
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
    right, cosines, sines, _, _ = _parts(row, scratch)
    vectors = f32(right, lanes * side)
    clear(vectors)
    clear(f32(cosines, 2 * lanes * taps))
    chosen = i64(row[at.CHOSEN], n_waves)
    for wave in range(n_waves):
        cell = f32(_cell(row, chosen[wave]), 4 * side + dims)
        for i in range(side):
            vectors[lanes * i + 2 * wave] = cell[i]
            vectors[lanes * i + 2 * wave + 1] = cell[side + i]
        for a in range(dims):
            w[a] = np.float64(cell[4 * side + a])
        write_powers(row, w, powers)
        _write_phases(row, wave, 1.0, powers, cosines, sines)
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
