"""Penalties against their closed forms in float64, value and slope, in every branch."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from support.truth import PENALTIES

from lightning_lip.penalty.penalties import (
    KNEE,
    LARGEST_KNEE,
    PenaltyName,
    get_penalty,
    hinge_log,
    product,
    softplus_log,
)

FLOAT64 = {"rel": 1e-12, "abs": 1e-300}
NAMES = get_args(PenaltyName)


def with_slopes(penalty, sigma):
    (slopes,) = torch.autograd.grad(value := penalty(sigma), sigma)
    return value.item(), slopes.tolist()


def evaluate(penalty, sigma, dtype=torch.float64):
    """Return a penalty of spectral norms, and its slopes in them."""

    def of_sigma(sigma):
        value = penalty(sigma.log(), sigma.log().sum())
        assert (value.shape, value.dtype) == ((), dtype)
        return value

    return with_slopes(of_sigma, torch.tensor(sigma, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("sigma", [[0.3], [2.0, 0.7, 1.9], [1e-3, 1e-4], [40.0, 30.0, 9.0], [1.0, 1.0]], ids=str)
def test_value_and_slope_are_the_closed_form(name, target, sigma):
    value, slope = evaluate(get_penalty(name, target, knee=None), sigma)
    sigma = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    expected_value, expected_slope = with_slopes(lambda sigma: PENALTIES[name](sigma, target), sigma)
    # S - log M cancels where the product is about M: absolute, not relative.
    assert value == pytest.approx(expected_value, rel=1e-12, abs=1e-14)
    assert slope == pytest.approx(expected_slope, rel=1e-12, abs=1e-14)


def test_the_names():
    assert list(NAMES) == list(PENALTIES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("sigma", "dtype"), [(3.0, torch.float32), (3.0, torch.float64), (0.01, torch.float32)])
def test_many_layers_neither_overflow_nor_underflow_to_nan(name, sigma, dtype):
    # 3^120 = 1.8e57 does not fit fp32.
    value, slopes = evaluate(get_penalty(name), [sigma] * 120, dtype)
    assert math.isfinite(value)
    assert all(math.isfinite(slope) and (slope > 0 or sigma < 1) for slope in slopes)


def slope_in_log_bound(penalty, s):
    return with_slopes(lambda s: penalty(s[None], s), torch.tensor(s, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("distance", [-1.0, -1e-9, 0.0, 1e-9, 1.0, 50.0, 1e4])
@pytest.mark.parametrize(
    ("knee", "where"), [(0.5, 0.5), (100, 100.0), (1e20, LARGEST_KNEE), (None, LARGEST_KNEE), (math.inf, LARGEST_KNEE)]
)
def test_product_is_continued_linearly_beyond_its_knee(knee, where, distance):
    s = math.log(where) + distance
    value, slope = slope_in_log_bound(get_penalty("product", knee=knee), s)
    if distance <= 0:
        assert value == pytest.approx(math.exp(s), **FLOAT64)
        assert slope == pytest.approx(math.exp(s), **FLOAT64)
    else:
        assert value == pytest.approx(where * (1 + distance), **FLOAT64)
        assert slope == pytest.approx(where, **FLOAT64)


def test_product_is_plain_as_a_function_and_has_its_knee_by_name():
    assert slope_in_log_bound(product, math.log(1e6))[1] == pytest.approx(1e6)
    assert slope_in_log_bound(get_penalty("product"), math.log(1e6))[1] == pytest.approx(KNEE)


@pytest.mark.parametrize("knee", [0.0, -1.0, math.nan, -math.inf, "1", True])
def test_knee_must_be_a_positive_number_or_none(knee):
    with pytest.raises(ValueError, match="`knee` to be a positive number, or None for the plain product, got"):
        get_penalty("product", knee=knee)


def test_softplus_log_has_a_slope_of_at_most_one():
    value, slope = slope_in_log_bound(softplus_log, 1e4)
    assert value == 1e4
    assert slope == 1.0
    value, slope = slope_in_log_bound(partial(softplus_log, target=math.e), 25.0)
    assert value == pytest.approx(24 + math.log1p(math.exp(-24)), **FLOAT64)
    assert slope == pytest.approx(1 / (1 + math.exp(-24)), **FLOAT64)


@pytest.mark.parametrize("s", [-50.0, 0.0, math.log(2.0)])
def test_hinge_log_is_nothing_up_to_its_target(s):
    assert slope_in_log_bound(partial(hinge_log, target=2.0), s) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("product", 0.0, [0.0, 0.0]),
        ("softplus_log", 0.0, [0.0, 0.0]),
        ("hinge_log", 0.0, [0.0, 0.0]),
        ("log", -math.inf, [1.0, 1.0]),
        ("layer_sum", 2.5, [0.5, 2.0]),
        ("layer_sum_squares", 4.25, [0.5, 8.0]),
    ],
)
def test_a_zero_layer_gives_the_others_a_finite_right_slope(name, value, slope):
    log_sigma = torch.tensor([-math.inf, math.log(0.5), math.log(2.0)], dtype=torch.float64, requires_grad=True)
    got = get_penalty(name)(log_sigma, log_sigma.sum())
    (grad,) = torch.autograd.grad(got, log_sigma)
    assert got.item() == pytest.approx(value, **FLOAT64)
    # In log sigma; the sums' slopes are sigma and 2 sigma^2, those of functions of S are alike in all layers.
    assert grad[1:].tolist() == pytest.approx(slope, **FLOAT64)
    assert not grad.isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_not_hidden_and_makes_no_slope_up(name):
    log_sigma = torch.tensor([math.nan, 0.0], requires_grad=True)
    value = get_penalty(name)(log_sigma, log_sigma.sum())
    assert value.isnan()
    # NaN, zero, or for uncoupled penalties the other layer's own slope; not the slope of some branch.
    slope = torch.autograd.grad(value, log_sigma)[0][1].item()
    assert math.isnan(slope) or slope in (0.0, {"log": 1.0, "layer_sum": 1.0, "layer_sum_squares": 2.0}.get(name, 0.0))


def test_a_callable_is_returned_as_it_is():
    def own(log_sigma, log_bound):
        return log_bound

    assert get_penalty(own) is own


def test_unknown_name():
    with pytest.raises(ValueError, match=r"Unknown penalty 'prod': expected one of 'product', .*'layer_sum_squares'"):
        get_penalty("prod")


@pytest.mark.parametrize("penalty", [None, 3, ["product"]])
def test_neither_name_nor_callable(penalty):
    with pytest.raises(TypeError, match=f"a name or a callable, got a {type(penalty).__name__}"):
        get_penalty(penalty)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, "1", None])
@pytest.mark.parametrize("name", ["hinge_log", "product"])
def test_target_must_be_positive_and_finite(name, target):
    with pytest.raises(ValueError, match="`target` to be a positive finite number, got"):
        get_penalty(name, target)
