"""The slopes of functions that are written out, against dense grids."""

from fractions import Fraction

import pytest
import torch

from lightning_lip.constants import functions as fn
from lightning_lip.constants import slopes
from lightning_lip.errors import UnsupportedLayerError

X = torch.linspace(-30, 30, 300001, dtype=torch.float64)
NAMED = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "softplus": torch.nn.functional.softplus,
    "atan": torch.atan,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
}


def ends(function):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    return slope.min().item(), slope.max().item()


def assert_tight(interval, function, rel=1e-6):
    low, high = ends(function)
    size = max(abs(low), abs(high))
    assert interval.low - rel * size <= low * (1 - 1e-12 * (low < 0)) or low >= interval.low
    assert interval.low <= low + 1e-12
    assert high - 1e-12 <= interval.high
    assert low - interval.low <= rel * size + 1e-9
    assert interval.high - high <= rel * size + 1e-9


@pytest.mark.parametrize("name", NAMED)
def test_functions(name):
    assert_tight(slopes.OF_FUNCTION[name], NAMED[name], rel=2e-3)  # atan's slope is 1e-3 at 30


@pytest.mark.parametrize("name", slopes.OF_PRODUCT)
def test_products_with_x(name):
    assert_tight(slopes.of_product(name, Fraction(0)), lambda x: x * NAMED[name](x))
    for c, d in ((2, 3), (-0.7, -1.5), (0.3, 0.01)):
        low, high = ends(lambda x, c=c, d=d: x * NAMED[name](c * x + d))
        found = slopes.of_product(name, Fraction(d))
        assert found.low <= low
        assert high <= found.high
    assert slopes.of_product("sin", Fraction(0)) is None


def test_products_with_limits():
    for low, high, d in ((0.0, 6.0, 3), (-1.0, 2.0, 0), (-2.0, -1.0, 4)):
        found = slopes.of_clamped_product(low, high, Fraction(d))
        for c in (1.0, -0.3):
            least, most = ends(lambda x, c=c, low=low, high=high, d=d: x * (c * x + d).clamp(low, high))
            assert found.low <= least + 1e-12
            assert most - 1e-12 <= found.high
        assert found.high - most < 1e-2
    assert slopes.of_clamped_product(0.0, float("inf"), Fraction(0)) is None


def test_the_cubic_of_gelu():
    for a, k in ((0.7978845608, 0.044715), (0.79788456, 0.0447155), (-2.0, 0.044715 * 4 / 0.6366197724)):
        found = slopes.of_tanh_cubic_product(Fraction(a), Fraction(a * k))
        low, high = ends(lambda x, a=a, k=k: x * torch.tanh(a * (x + k * x**3)))
        assert found.low <= low
        assert high <= found.high <= high * (1 + 1e-4)
    assert slopes.of_tanh_cubic_product(Fraction(1), Fraction(1)) is None
    assert slopes.of_tanh_cubic_product(Fraction(0), Fraction(1)) is None


def test_the_others():
    half, two = Fraction(1, 2), Fraction(2)
    assert_tight(slopes.of_mish(), torch.nn.functional.mish)
    assert_tight(slopes.of_exponential(-two, half, Fraction(1)), lambda x: torch.exp(-2 * x * x + x / 2 + 1))
    assert_tight(slopes.of_exponential_product(-two, half), lambda x: x * torch.exp(-2 * x * x + 0.5))
    assert_tight(slopes.of_laplace(-two, half), lambda x: torch.exp(-2 * x.abs() + 0.5), rel=1e-3)
    assert_tight(slopes.of_reciprocal(half, two, Fraction(0)), lambda x: 1 / (0.5 + 2 * x.abs()), rel=3e-3)
    assert_tight(slopes.of_reciprocal(half, Fraction(0), two), lambda x: 1 / (0.5 + 2 * x * x), rel=1e-5)
    assert_tight(slopes.of_softsign(half, two), lambda x: x / (0.5 + 2 * x.abs()), rel=1e-3)
    assert_tight(slopes.of_root(two, half), lambda x: torch.sqrt(2 * x * x + 0.5), rel=1e-3)
    assert_tight(slopes.of_inverse_root(two, half), lambda x: torch.rsqrt(2 * x * x + 0.5), rel=1e-5)
    assert_tight(slopes.of_inverse_root_product(two, half), lambda x: x * torch.rsqrt(2 * x * x + 0.5), rel=1e-3)


def test_what_has_no_known_slope_is_none():
    zero, one = Fraction(0), Fraction(1)
    assert slopes.of_exponential(zero, one, one) is None
    assert slopes.of_exponential_product(zero, one) is None
    assert slopes.of_laplace(one, zero) is None
    assert slopes.of_reciprocal(zero, one, zero) is None
    assert slopes.of_reciprocal(one, one, one) is None
    assert slopes.of_softsign(-one, one) is None
    assert slopes.of_root(one, -one) is None
    assert slopes.of_inverse_root(one, zero) is None
    assert slopes.of_inverse_root_product(one, -one) is None


def test_one_function_is_one_polynomial_however_it_is_written():
    x, half = fn.VARIABLE, fn.constant(0.5)
    erf = fn.function("erf", fn.times(fn.constant(0.75), x))
    one = fn.times(fn.times(half, x), fn.plus(fn.constant(1), erf))
    other = fn.plus(fn.times(x, fn.times(erf, half)), fn.times(x, half))
    assert one == other
    assert fn.plus(one, other, -1) == {}
    assert fn.slopes_of({}).magnitude == 0


@pytest.mark.parametrize("at", [-1.5, 0.5, 3.0])
def test_a_step_joins_two_functions_that_agree(at):
    x = fn.VARIABLE
    step = fn.step(fn.plus(x, fn.constant(-at)))
    beyond = fn.times(fn.plus(x, fn.constant(-at)), fn.constant(-2))
    assert fn.slopes_of(fn.plus(x, fn.times(beyond, step))).magnitude == 1
    assert fn.slopes_of(fn.times(beyond, step)).magnitude == 2
    assert fn.times(step, step) == step
    with pytest.raises(UnsupportedLayerError, match="jumps by"):
        fn.slopes_of(fn.times(x, step))
    with pytest.raises(fn.UnknownFunctionError):
        fn.slopes_of(fn.times(step, fn.step(x)))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: fn.reciprocal(x),
        lambda x: fn.function("rsqrt", fn.times(x, x)),
        lambda x: fn.function("sqrt", fn.plus(fn.times(x, x), fn.constant(-1))),
        lambda x: fn.logarithm(x),
        lambda x: fn.power(x, 0.3),
        lambda x: fn.clamp(x, float("nan"), 1),
    ],
)
def test_what_is_not_defined_everywhere_is_unknown(make):
    with pytest.raises(fn.UnknownFunctionError):
        make(fn.VARIABLE)


@pytest.mark.parametrize("make", [lambda x: fn.times(x, x), lambda x: fn.function("exp", x), lambda x: fn.power(x, 4)])
def test_what_is_steep_has_no_slopes(make):
    with pytest.raises(fn.UnknownFunctionError):
        fn.slopes_of(make(fn.VARIABLE))
