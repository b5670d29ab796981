import itertools
import math
import random
from fractions import Fraction

from lightning_lip.rigorous.intervals import EVERYTHING, Interval, exactly


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
