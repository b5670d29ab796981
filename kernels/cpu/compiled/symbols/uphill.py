"""Newton's method on the polynomial of a frequency whose coefficients are known, compiled for the CPU, in fp64."""

from __future__ import annotations

import math

import numpy as np

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.emitter import F64, I64, compiled, f64, i64
from lightning_lip.kernels.frequencies import LEAST_CURVATURE, LONGEST_STEP, N_NEWTON_STEPS

_DERIVATIVES = 16
"""Numbers of a polynomial's value, at 0, gradient, from 1 on, and negative Hessian, from 4 on."""

WORK = 2 * _DERIVATIVES + 16
"""Numbers of scratch of Newton's method."""


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
def _derive(row: I64, real: F64, imaginary: F64, w: F64, powers: F64, out: F64) -> float:
    """Write f, its gradient and its negative Hessian at w; return f."""
    dims = row[at.DIMS]
    lags = i64(row[at.LAGS], row[at.N_LAGS] * dims)
    write_powers(row, w, powers)
    for k in range(1, _DERIVATIVES):
        out[k] = 0.0
    value: float = real[0]
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
def climb(row: I64, real: F64, imaginary: F64, powers: F64, work: F64, centre: F64, w: F64) -> float:
    """Move w uphill within its cell by Newton's method: f is not lower afterwards, unless a border is in the way.

    Returns:
        f where Newton's method ends.
    """
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
        w[a] = centre[a] + min(max(reduced(w[a] - centre[a]), -halves[a]), halves[a])
    return f


@compiled
def reduced(angle: float) -> float:
    """Return an angle between -pi and pi."""
    turns: float = np.rint(angle * (0.5 / math.pi))
    return angle - 2.0 * math.pi * turns
