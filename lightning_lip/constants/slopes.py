"""Slopes of functions of one variable that are written out: where the derivatives of g(q) and x g(q) lie.

Every interval holds all slopes. The ends follow from a zero of the second derivative, whose equation stands beside
them, and are attained or approached, but for those with a shift d (see :func:`of_product`).
"""

from __future__ import annotations

import math
from fractions import Fraction

from lightning_lip.constants import modules as constants
from lightning_lip.rigorous.rounding import Interval, exactly, exp_up, sqrt_up, up

MISH_LOWEST = -0.1125261223894626
"""The smallest slope of mish, at x = -2.25637639636079, the other zero of f''."""

_ERF_PRODUCT = 2 * constants.GELU - 1
_TANH_PRODUCT = 2 * constants.SILU - 1

OF_FUNCTION = {
    "tanh": Interval(0.0, 1.0),
    "sigmoid": Interval(0.0, constants.SIGMOID),
    "erf": Interval(0.0, constants.ERF),
    "softplus": Interval(0.0, 1.0),
    "atan": Interval(0.0, 1.0),
    "sin": Interval(-1.0, 1.0),
    "cos": Interval(-1.0, 1.0),
    "abs": Interval(-1.0, 1.0),
    "clamp": Interval(0.0, 1.0),
}
"""Where g'(t) lies, for all t."""

OF_PRODUCT = {
    "sigmoid": Interval(1 - constants.SILU, constants.SILU),
    "tanh": Interval(-_TANH_PRODUCT, _TANH_PRODUCT),
    "erf": Interval(-up(_ERF_PRODUCT), up(_ERF_PRODUCT)),
}
"""Where (t g(t))' = g + t g' lies.

With sigmoid, s(-t) = 1 - s(t) makes the slopes at t and -t add up to 1: they lie in [1 - m, m], m = SiLU's constant.
tanh(t) = 2 s(2 t) - 1 makes t tanh(t) = 2 t s(2 t) - t; erf(t) = 2 Phi(t sqrt 2) - 1 likewise with GELU's.
"""

_TANH_CUBIC_RATIO = 0.044715 * math.pi / 2
_TANH_CUBIC = 2 * constants.GELU_TANH - 1


def of_product(name: str, shift: Fraction) -> Interval | None:
    """Return where the slope of ``x g(c x + d)`` lies, whatever c; None if it is not known.

    With t = c x + d it is ``g + (t - d) g'``: that of ``t g(t)``, less ``d g'``. For d = 0 the ends are attained.
    """
    if name not in OF_PRODUCT:
        return None
    return OF_PRODUCT[name] - exactly(shift) * OF_FUNCTION[name]


def of_clamped_product(low: float, high: float, shift: Fraction) -> Interval | None:
    """Return where the slope of ``x min(max(t, l), u)``, t = c x + d, lies, *exact*; None if l or u is infinite.

    It is l or u outside, and ``t + c x = 2 t - d`` for t in (l, u).
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        return None
    inside = exactly(2.0) * Interval(low, high) - exactly(shift)
    return inside | Interval(low, high)


def of_tanh_cubic_product(linear: Fraction, cubic: Fraction) -> Interval | None:
    """Return where the slope of ``x tanh(a x + b x^3)`` lies, for the ratio b / a^3 of GELU's approximation.

    In y = a x and k = b / a^3 it is ``tanh p + (y + 3 k y^3) / cosh^2 p``, p = y + k y^3: GELU's, doubled, less 1, at
    GELU's k. Its derivative in k is at most ``y^3 (4 + 2 y (1 + 3 k y^2)) / cosh^2 y <= 8`` for 0 <= k <= .1.
    """
    if linear == 0:
        return None
    away = abs(float(cubic / linear**3) - _TANH_CUBIC_RATIO)
    if not away < 1e-3:
        return None
    end = up(_TANH_CUBIC + 8 * (away + 1e-16))
    return Interval(-end, end)


def of_mish() -> Interval:
    """Return where the slope of ``x tanh(log(1 + e^x))`` lies."""
    return Interval(MISH_LOWEST, constants.MISH)


def _magnitude(value: float) -> Interval:
    value = value * (1 + 1e-14)
    return Interval(-value, value)


def of_exponential(quadratic: Fraction, linear: Fraction, constant: Fraction) -> Interval | None:
    """Return where the slope of ``e^(a x^2 + b x + c)`` lies, a < 0: *exact*; None for another a.

    It is ``e^(c - b^2 / 4 a)`` times a Gaussian ``e^(a z^2)``, whose slope is largest at 2 a z^2 = -1:
    ``sqrt(-2 a / e)``.
    """
    if quadratic >= 0:
        return None
    top = exp_up(up(float(constant - linear**2 / (4 * quadratic))))
    return _magnitude(math.sqrt(-2 * float(quadratic) / math.e) * top)


def of_exponential_product(quadratic: Fraction, constant: Fraction) -> Interval | None:
    """Return where the slope of ``x e^(a x^2 + c)`` lies, a < 0: *exact*; None for another a.

    With t^2 = -a x^2 it is ``(1 - 2 t^2) e^(-t^2)``, from ``-2 e^(-3/2)`` at t^2 = 3/2 to 1 at 0.
    """
    if quadratic >= 0:
        return None
    return Interval(-0.44626032029685970, 1.0) * Interval(0.0, exp_up(up(float(constant))))


def of_laplace(rate: Fraction, constant: Fraction) -> Interval | None:
    """Return where the slope of ``e^(a |x| + c)`` lies, a <= 0: *exact*, ``|a| e^c`` at 0; None for another a."""
    return None if rate > 0 else _magnitude(-float(rate) * exp_up(up(float(constant))))


def of_reciprocal(constant: Fraction, magnitude: Fraction, square: Fraction) -> Interval | None:
    """Return where the slope of ``1 / (c + a |x| + b x^2)`` lies, c > 0, for a > 0 = b or b > 0 = a: *exact*.

    It is ``a / c^2`` at 0; or, with u^2 = x^2 b / c, ``2 u / (1 + u^2)^2 sqrt(b / c) / c``, at 3 u^2 = 1.
    """
    if constant <= 0 or magnitude < 0 or square < 0 or (magnitude > 0) == (square > 0):
        return None
    if magnitude > 0:
        return _magnitude(float(magnitude / constant**2))
    return _magnitude(0.6495190528383290 * math.sqrt(float(square / constant)) / float(constant))


def of_softsign(constant: Fraction, magnitude: Fraction) -> Interval | None:
    """Return where the slope of ``x / (c + a |x|)`` lies, c > 0, a >= 0: ``c / (c + a |x|)^2``, *exact*."""
    return None if constant <= 0 or magnitude < 0 else Interval(0.0, _magnitude(float(1 / constant)).high)


def of_root(square: Fraction, constant: Fraction) -> Interval | None:
    """Return where the slope of ``sqrt(a x^2 + b)`` lies, a, b >= 0: within ``sqrt a``, approached far out."""
    return None if square < 0 or constant < 0 else _magnitude(sqrt_up(float(square)))


def of_inverse_root(square: Fraction, constant: Fraction) -> Interval | None:
    """Return where the slope of ``1 / sqrt(a x^2 + b)`` lies, a >= 0, b > 0: *exact*.

    With u^2 = x^2 a / b it is ``u / (1 + u^2)^(3/2) sqrt(a) / b``, largest at 2 u^2 = 1: 2 / (3 sqrt 3).
    """
    if square < 0 or constant <= 0:
        return None
    return _magnitude(0.3849001794597506 * math.sqrt(float(square)) / float(constant))


def of_inverse_root_product(square: Fraction, constant: Fraction) -> Interval | None:
    """Return where the slope of ``x / sqrt(a x^2 + b)`` lies, a >= 0, b > 0: ``b / (..)^(3/2)``, *exact*."""
    if square < 0 or constant <= 0:
        return None
    return Interval(0.0, _magnitude(1 / math.sqrt(float(constant))).high)
