"""Arithmetic rounded upwards, intervals rounded outwards, and the error bounds of sums and products in floating point.

Every function of numbers returns a float that is at least the exact result in real arithmetic of the floats that it is
given, for results of at least 0. Assumed: IEEE 754 double precision, rounding to nearest. Source of the error bounds:
N. Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed., 2002), chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

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


@dataclass(frozen=True)
class Interval:
    """The real numbers from `low` to `high`; an infinite end is none of them.

    Results of operations hold every result of the exact operation on members: ends are moved outwards by one float,
    unless they are exact.
    """

    low: float
    high: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(_sum(self.low, other.low, -math.inf), _sum(self.high, other.high, math.inf))

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        ends = [(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        low = min(_product(a, b, -math.inf) for a, b in ends)
        return Interval(low, max(_product(a, b, math.inf) for a, b in ends))

    def __or__(self, other: Interval) -> Interval:
        """Return the smallest interval with both."""
        return Interval(min(self.low, other.low), max(self.high, other.high))

    def clamped(self, low: float, high: float) -> Interval:
        """Return the interval of ``min(max(x, low), high)``."""
        return Interval(min(max(self.low, low), high), min(max(self.high, low), high))

    @property
    def magnitude(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


EVERYTHING = Interval(-math.inf, math.inf)


def exactly(number: float | Fraction) -> Interval:
    """Return the interval of one number, as wide as its conversion to a float is inexact."""
    if isinstance(number, Fraction):
        value = float(number)
        if Fraction(value) != number:
            return Interval(math.nextafter(value, -math.inf), math.nextafter(value, math.inf))
        return Interval(value, value)
    return Interval(float(number), float(number))


def _sum(a: float, b: float, towards: float) -> float:
    total = a + b
    # A sum of one number and a zero is exact; infinities of both signs leave nothing known.
    if math.isnan(total):
        return towards
    return total if a == 0 or b == 0 else math.nextafter(total, towards)


def _product(a: float, b: float, towards: float) -> float:
    # An infinite end is no member: zero times all others is zero. And a factor of one is exact.
    if a == 0 or b == 0:
        return 0.0
    product = a * b
    return product if abs(a) == 1 or abs(b) == 1 else math.nextafter(product, towards)
