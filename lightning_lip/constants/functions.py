"""Functions of one variable as polynomials, with exact coefficients, in x and in functions of polynomials.

``x / 2 + x erf(.7 x) / 2`` is one polynomial however it is written. The slope of each term is known in closed form
(:mod:`lightning_lip.constants.slopes`), and that of the sum lies in the sum of the intervals: *exact* for one term
beside a linear one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from lightning_lip.constants import slopes
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.rigorous.rounding import Interval, exactly, exp_up, up

Atom = tuple[Any, ...]
"""The variable, ``("x",)``; or a function of a polynomial: its name, the polynomial, and what else it depends on."""

Polynomial = dict[tuple[tuple[Atom, int], ...], Fraction]
"""The coefficient of each product of powers of atoms."""

N_TERMS = 24
"""How many terms a polynomial may have."""

_X: Atom = ("x",)
_ZERO = Fraction(0)
_LINE = ((_X, 1),)
_SQUARE = ((_X, 2),)
_CUBE = ((_X, 3),)
_MAGNITUDE = ((("abs", ((_LINE, Fraction(1)),)), 1),)

VARIABLE: Polynomial = {_LINE: Fraction(1)}
"""x itself."""


class UnknownFunctionError(Exception):
    """The function is not one of those that can be read."""


def constant(number: float | Fraction) -> Polynomial:
    """Return a number as a polynomial."""
    number = Fraction(number)
    return {(): number} if number else {}


def plus(p: Polynomial, q: Polynomial, factor: float | Fraction = 1) -> Polynomial:
    """Return ``p + factor q``."""
    total = dict(p)
    for term, coefficient in q.items():
        total[term] = total.get(term, _ZERO) + Fraction(factor) * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient}


def times(p: Polynomial, q: Polynomial) -> Polynomial:
    """Return ``p q``."""
    result: Polynomial = {}
    for left, a in p.items():
        for right, b in q.items():
            powers = dict(left)
            for atom, n in right:
                # A step is its own square.
                powers[atom] = 1 if atom[0] == "step" else powers.get(atom, 0) + n
            term = tuple(sorted(powers.items(), key=repr))
            result[term] = result.get(term, _ZERO) + a * b
    if len(result) > N_TERMS:
        raise UnknownFunctionError
    return {term: coefficient for term, coefficient in result.items() if coefficient}


def power(p: Polynomial, exponent: Any) -> Polynomial:
    """Return p to a number's power."""
    if exponent == 0.5:
        return function("sqrt", p)
    if exponent == -0.5:
        return function("rsqrt", p)
    if exponent == -1:
        return reciprocal(p)
    if not isinstance(exponent, (int, float)) or exponent not in (1, 2, 3, 4):
        raise UnknownFunctionError
    result = p
    for _ in range(int(exponent) - 1):
        result = times(result, p)
    return result


def _key(p: Polynomial) -> tuple[Any, ...]:
    return tuple(sorted(p.items(), key=repr))


def function(name: str, p: Polynomial, *settings: Any) -> Polynomial:
    """Return the function of a polynomial that has a name.

    Raises:
        UnknownFunctionError: If it is not known to be defined everywhere.
    """
    if name in ("reciprocal", "sqrt", "rsqrt"):
        magnitude, square, rest = _coefficients(p, _MAGNITUDE, _SQUARE)
        if magnitude < 0 or square < 0 or rest < 0 or (rest == 0 and name != "sqrt"):
            raise UnknownFunctionError
    return {((((name, _key(p), *settings)), 1),): Fraction(1)}


def _single(p: Polynomial, name: str) -> tuple[Polynomial, Fraction] | None:
    """Return q and c if the polynomial is ``c name(q)``."""
    if len(p) != 1:
        return None
    ((term, coefficient),) = p.items()
    if len(term) != 1 or term[0][1] != 1 or term[0][0][0] != name:
        return None
    return dict(term[0][0][1]), coefficient


def reciprocal(p: Polynomial) -> Polynomial:
    """Return ``1 / p``."""
    if set(p) <= {()}:
        return constant(1 / p.get((), _ZERO))
    root = _single(p, "sqrt")
    if root is not None:
        return times(constant(1 / root[1]), function("rsqrt", root[0]))
    # 1 / (c + c e^q) = sigmoid(-q) / c.
    rest = {term: coefficient for term, coefficient in p.items() if term != ()}
    exponential = _single(rest, "exp")
    if exponential is not None and exponential[1] == p.get((), _ZERO):
        return times(constant(1 / exponential[1]), function("sigmoid", negative(exponential[0])))
    return function("reciprocal", p)


def negative(p: Polynomial) -> Polynomial:
    """Return ``-p``."""
    return plus({}, p, -1)


def logarithm(p: Polynomial) -> Polynomial:
    """Return log p for p = 1 + e^q, the softplus."""
    exponential = _single(plus(p, constant(-1)), "exp")
    if exponential is None or exponential[1] != 1:
        raise UnknownFunctionError
    return function("softplus", exponential[0])


def clamp(p: Polynomial, low: Any, high: Any) -> Polynomial:
    """Return ``min(max(p, low), high)``; None is no limit."""
    limits = [default if limit is None else limit for limit, default in ((low, -math.inf), (high, math.inf))]
    if not all(isinstance(limit, (int, float)) and not math.isnan(limit) for limit in limits):
        raise UnknownFunctionError
    return function("clamp", p, float(limits[0]), float(limits[1]))


def step(p: Polynomial) -> Polynomial:
    """Return 1 where p > 0, else 0; its value at p = 0 does not matter to a continuous function."""
    return function("step", p)


def hard_sigmoid(p: Polynomial) -> Polynomial:
    """Return ``min(max(p + 3, 0), 6) / 6``."""
    return times(constant(Fraction(1, 6)), clamp(plus(p, constant(3)), 0, 6))


def slopes_of(p: Polynomial) -> Interval:
    """Return an interval in which all slopes of a polynomial in functions of x lie.

    A step, ``1`` where ``c x + d > 0``, leaves two functions, each on its side of ``-d / c``, which must agree there.

    Raises:
        UnsupportedLayerError: If they do not.
    """
    steps = {atom for term in p for atom, _ in term if atom[0] == "step"}
    if not steps:
        return _sum_of(_term_slopes(term, coefficient, _ZERO, 0) for term, coefficient in p.items())
    if len(steps) > 1:
        raise UnknownFunctionError
    (step,) = steps
    linear, shift = _linear(dict(step[1]))
    at = -shift / linear
    off = {term: coefficient for term, coefficient in p.items() if step not in dict(term)}
    jump = {
        tuple(f for f in term if f[0] != step): coefficient for term, coefficient in p.items() if step in dict(term)
    }
    height = _value_at(jump, at)
    if height != 0:
        raise UnsupportedLayerError(f"it is discontinuous: it jumps by {float(height):g} at {float(at):g}")
    on, sides = plus(off, jump), (1, -1) if linear > 0 else (-1, 1)
    return _sum_of(_term_slopes(t, c, at, sides[0]) for t, c in on.items()) | _sum_of(
        _term_slopes(t, c, at, sides[1]) for t, c in off.items()
    )


def _sum_of(intervals: Iterable[Interval]) -> Interval:
    total = Interval(0.0, 0.0)
    for interval in intervals:
        total = total + interval
    return total


def _linear(p: Polynomial) -> tuple[Fraction, Fraction]:
    """Return c and d of c x + d, c not zero."""
    linear = p.get(_LINE, _ZERO)
    if not linear or not set(p) <= {_LINE, ()}:
        raise UnknownFunctionError
    return linear, p.get((), _ZERO)


def _coefficients(p: Polynomial, *terms: tuple[tuple[Atom, int], ...]) -> list[Fraction]:
    """Return the coefficients of some terms and the constant; there may be no others."""
    if not set(p) <= {*terms, ()}:
        raise UnknownFunctionError
    return [p.get(term, _ZERO) for term in (*terms, ())]


def _term_slopes(term: tuple[tuple[Atom, int], ...], coefficient: Fraction, at: Fraction, side: int) -> Interval:
    """Return where the slopes of a term lie: everywhere, or on the side of x = `at` that a sign says."""
    powers = dict(term)
    n_x = powers.pop(_X, 0)
    if not powers:
        if n_x > 1:
            raise UnknownFunctionError
        return exactly(coefficient) if n_x else Interval(0.0, 0.0)
    if len(powers) > 1 or n_x > 1:
        raise UnknownFunctionError
    ((atom, power),) = powers.items()
    inner = dict(atom[1])
    if power == 2 and not n_x and atom[0] in ("sin", "cos"):
        # (sin^2 q)' = q' sin 2 q.
        found: Interval | None = Interval(-1.0, 1.0) * exactly(_linear(inner)[0])
    elif power > 1:
        raise UnknownFunctionError
    elif n_x:
        found = _product_slopes(atom, inner)
    else:
        found = _function_slopes(atom, inner, at, side)
    if found is None:
        raise UnknownFunctionError
    return found * exactly(coefficient)


def _function_slopes(atom: Atom, inner: Polynomial, at: Fraction, side: int) -> Interval | None:
    """Return where the slopes of g(q) lie."""
    name = atom[0]
    if name in slopes.OF_FUNCTION:
        return slopes.OF_FUNCTION[name] * exactly(_linear(inner)[0])
    if name == "exp":
        if set(inner) <= {_LINE, ()} and inner.get(_LINE):
            linear, shift = _linear(inner)
            # It grows to one side: on the other one its slope is largest where that ends.
            if not side or (linear > 0) != (side < 0):
                return None
            return exactly(linear) * Interval(0.0, exp_up(up(float(linear * at + shift))))
        if _MAGNITUDE in inner:
            return slopes.of_laplace(*_coefficients(inner, _MAGNITUDE))
        return slopes.of_exponential(*_coefficients(inner, _SQUARE, _LINE))
    if name == "reciprocal":
        magnitude, square, constant = _coefficients(inner, _MAGNITUDE, _SQUARE)
        return slopes.of_reciprocal(constant, magnitude, square)
    if name in ("sqrt", "rsqrt"):
        known = slopes.of_root if name == "sqrt" else slopes.of_inverse_root
        return known(*_coefficients(inner, _SQUARE))
    return None


def _product_slopes(atom: Atom, inner: Polynomial) -> Interval | None:
    """Return where the slopes of x g(q) lie."""
    name = atom[0]
    if name == "tanh" and _single(inner, "softplus") is not None:
        within, factor = _single(inner, "softplus") or ({}, _ZERO)
        return slopes.of_mish() if factor == 1 and within == VARIABLE else None
    if name == "tanh" and _CUBE in inner:
        cubic, linear, shift = _coefficients(inner, _CUBE, _LINE)
        return None if shift else slopes.of_tanh_cubic_product(linear, cubic)
    if name == "clamp":
        return slopes.of_clamped_product(atom[2], atom[3], _linear(inner)[1])
    if name == "exp":
        return slopes.of_exponential_product(*_coefficients(inner, _SQUARE))
    if name == "reciprocal":
        magnitude, constant = _coefficients(inner, _MAGNITUDE)
        return slopes.of_softsign(constant, magnitude)
    if name == "rsqrt":
        return slopes.of_inverse_root_product(*_coefficients(inner, _SQUARE))
    return slopes.of_product(name, _linear(inner)[1])


_AT_ZERO = {"exp": 1.0, "tanh": 0.0, "erf": 0.0, "sin": 0.0, "atan": 0.0, "cos": 1.0, "sigmoid": 0.5}
"""The values of functions at 0 that are rational numbers."""


def _value_at(p: Polynomial, x: Fraction) -> Fraction:
    """Return the exact value of a polynomial in functions of x."""
    total = _ZERO
    for term, coefficient in p.items():
        product = coefficient
        for atom, power in term:
            product *= (x if atom == _X else _atom_at(atom, x)) ** power
        total += product
    return total


def _atom_at(atom: Atom, x: Fraction) -> Fraction:
    name = str(atom[0])
    value: Fraction = _value_at(dict(atom[1]), x)
    if name == "abs":
        return abs(value)
    if name == "clamp":
        # The limits may be infinite, which no fraction is.
        low, high = atom[2:]
        value = Fraction(low) if value < low else value
        return Fraction(high) if value > high else value
    if name in _AT_ZERO and value == 0:
        return Fraction(_AT_ZERO[name])
    raise UnknownFunctionError
