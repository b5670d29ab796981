import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from lightning_lip.rigorous.rounding import (
    EVERYTHING,
    Interval,
    divide_up,
    exactly,
    gamma,
    ldexp_up,
    multiply_up,
    sqrt_up,
    sum_up,
)

# Four units in the last place: what up to four roundings may add.
ULPS = 1 + Fraction(4, 2**52)


@pytest.fixture
def numbers():
    generator = np.random.default_rng(0)
    return (generator.lognormal(0, 30, (300, 4))).tolist()


def test_results_are_above_the_exact_ones_and_close(numbers):
    inexact = 0
    for row in numbers:
        a, b, *_ = exact = [Fraction(x) for x in row]
        for result, truth in (
            (sum_up(row), sum(exact)),
            (multiply_up(*row), math.prod(exact)),
            (divide_up(row[0], row[1]), a / b),
        ):
            assert truth <= Fraction(result) <= truth * ULPS
        assert a <= Fraction(sqrt_up(row[0])) ** 2 <= a * ULPS
        inexact += Fraction(math.fsum(row)) < sum(exact)
    # Without the rounding upwards about half of the sums would be too small.
    assert inexact > 50


def test_zeros_infinities_and_overflow():
    assert multiply_up(0.0, math.inf, 3.0) == 0.0
    assert multiply_up(1e-300, 1e-300) > 0
    assert multiply_up(1e300, 1e300) == math.inf
    assert sum_up([1e308, 1e308]) == math.inf
    assert sum_up([]) == sum_up([0.0, 0.0]) == 0.0
    assert sum_up([5e-324]) > 0


def test_powers_of_two():
    assert ldexp_up(0.75, 10) == 768.0
    assert ldexp_up(0.0, -5000) == 0.0
    assert ldexp_up(0.75, 5000) == math.inf
    for exponent in (-1074, -1075, -1080, -5000):
        assert Fraction(ldexp_up(0.75, exponent)) >= Fraction(3, 4) / 2**-exponent


@pytest.mark.parametrize("k", [1, 2, 1000, 2**30])
def test_gamma(k):
    relative = Fraction(k, 2**53)
    assert relative / (1 - relative) <= Fraction(gamma(k)) <= relative / (1 - relative) * ULPS


def test_operations_hold_every_result():
    rng = random.Random(0)
    for _ in range(300):
        ends = [sorted(rng.uniform(-3, 3) * 10 ** rng.randint(-9, 9) for _ in range(2)) for _ in range(2)]
        a, b = (Interval(*pair) for pair in ends)
        for x, y in itertools.product((a.low, a.high), (b.low, b.high)):
            for found, exact in (
                (a + b, Fraction(x) + Fraction(y)),
                (a - b, Fraction(x) - Fraction(y)),
                (a * b, Fraction(x) * Fraction(y)),
            ):
                assert found.low <= exact <= found.high
        assert (a | b).low == min(a.low, b.low)
        assert a.magnitude == max(abs(a.low), abs(a.high))


def test_what_is_exact_stays_so():
    unit = Interval(0.0, 1.0)
    assert unit * exactly(3.0) == Interval(0.0, 3.0)
    assert unit + exactly(0.0) == unit
    assert -unit == Interval(-1.0, 0.0)
    assert Interval(-5.0, 9.0).clamped(-1.0, 6.0) == Interval(-1.0, 6.0)
    third = exactly(Fraction(1, 3))
    assert third.low < Fraction(1, 3) < third.high


def test_infinite_ends():
    assert EVERYTHING * exactly(0.0) == exactly(0.0)
    assert EVERYTHING - EVERYTHING == EVERYTHING
    assert (Interval(0.0, math.inf) * Interval(-1.0, 2.0)) == EVERYTHING
    assert Interval(0.0, math.inf) + Interval(1.0, 1.0) == Interval(1.0, math.inf)
