"""Arithmetic rounded upwards, and the error bounds of sums and products in floating point.

Every function returns a float that is at least the exact result in real arithmetic of the floats it is given, for
results of at least 0. Assumed: IEEE 754 double precision, rounding to nearest. Source of the error bounds: N. Higham,
"Accuracy and Stability of Numerical Algorithms" (2nd ed., 2002), chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
"""u: a rounded result is exact * (1 + delta), ``|delta| <= u``, unless it underflows."""

UNDERFLOW = 2.0**-960
"""More than all that underflow takes from sums of fewer than 2^60 terms, also where subnormals are flushed to zero."""


def up(value: float) -> float:
    """Return the next float above `value`."""
    return math.nextafter(value, math.inf)


def sum_up(terms: Iterable[float]) -> float:
    """Return an upper bound of the sum of `terms`, at most one float above; 0 for 0, inf where it overflows."""
    try:
        # Rounded once, so that it is 0 only if the sum is.
        total = math.fsum(terms)
    except OverflowError:
        return math.inf
    return up(total) if total else 0.0


def multiply_up(*factors: float) -> float:
    """Return an upper bound of the product of factors >= 0; exactly 0 if one of them is 0."""
    if any(factor == 0 for factor in factors):
        return 0.0
    product = factors[0]
    for factor in factors[1:]:
        product = up(product * factor)
    return product


def divide_up(numerator: float, denominator: float) -> float:
    """Return an upper bound of the quotient of `numerator` >= 0 and `denominator` > 0."""
    return up(numerator / denominator)


def sqrt_up(value: float) -> float:
    """Return an upper bound of the square root of `value` >= 0."""
    return up(math.sqrt(value))


def exp_up(value: float) -> float:
    """Return an upper bound of ``e^value``, two floats above the computed one; 0 for -inf, inf where it overflows."""
    if value == -math.inf:
        return 0.0
    try:
        return up(up(math.exp(value)))
    except OverflowError:
        return math.inf


def ldexp_up(value: float, exponent: int) -> float:
    """Return ``value * 2^exponent`` for `value` >= 0: exact, or rounded up if subnormal; inf above 1.8e308."""
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        return math.inf
    return scaled if math.ldexp(scaled, -exponent) == value else up(scaled)


def gamma(n_roundings: int) -> float:
    """Return an upper bound of ``gamma_k = k u / (1 - k u)``, k = `n_roundings` < 2^52.

    For an inner product of n terms, in any order and with or without fused multiply-adds,
    ``|fl(x^T y) - x^T y| <= gamma_n |x|^T |y|``.
    """
    relative = n_roundings * UNIT_ROUNDOFF
    return divide_up(relative, 1 - relative)


def frobenius_up(matrices: Tensor) -> float:
    """Return an upper bound of the Frobenius norm of a matrix (p, q), or of the largest of many (..., p, q).

    Args:
        matrices: fp64 on the CPU, of magnitudes whose squares do not overflow.
    """
    squares = matrices.square().sum((-2, -1))
    largest = squares.max().item() if squares.numel() else 0.0
    return sqrt_up(sum_up([divide_up(largest, 1 - gamma(matrices.shape[-2] * matrices.shape[-1] + 1)), UNDERFLOW]))
