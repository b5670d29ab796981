"""Intervals of real numbers, rounded outwards: what a value or a slope is known to lie in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


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
