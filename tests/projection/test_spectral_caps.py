"""NormCaps: what a step does to weights; in training, and on ranks, in tests/callbacks/test_spectral_caps.py."""

import math

import pytest
import torch
from support.truth import norm
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip import UnsupportedLayerError
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.base import MatrixOperator
from lightning_lip.projection.spectral_caps import NormCaps, scale_

TOLERANCE = 1e-3
"""How far a norm may lie from the radius, relative; in fp32 the margin is some 1e-4 where an estimate has converged."""


def test_the_direction_stays_and_a_weight_within_the_radius_too():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[1].weight.data.mul_(0.01)
    before = [layer.weight.detach().clone() for layer in model]
    assert NormCaps(model, 0.25).step().tolist() == [True, False]
    assert norm(model[0]) == pytest.approx(0.25, rel=TOLERANCE)
    torch.testing.assert_close(model[0].weight.detach(), before[0] * (0.25 / norm(before[0])), rtol=TOLERANCE, atol=0)
    assert torch.equal(model[1].weight, before[1])


def moving(n_vectors, change, cap):
    """Return how far above 1 a norm is at most, relative, in 20 steps of a random walk with orthogonal updates.

    Random square matrices have their singular values close together at the top.
    """
    torch.manual_seed(0)
    layer = nn.Linear(120, 120, bias=False)
    nn.init.normal_(layer.weight, std=0.06)
    step = cap(layer, n_vectors)
    worst = -1.0
    for _ in range(20):
        with torch.no_grad():
            layer.weight.add_(torch.linalg.qr(torch.randn(120, 120)).Q, alpha=change)
        step()
        worst = max(worst, norm(layer) - 1)
    return worst


def by_the_estimate_alone(layer, n_vectors):
    norms = SpectralNorms([MatrixOperator("", layer)], block_size=n_vectors)

    def step():
        sigma = float(norms.step().sigma)
        layer.weight.data.mul_(min(1.0, 1 / sigma))

    return step


def test_the_margin_covers_what_an_estimate_lacks():
    assert moving(8, 0.05, by_the_estimate_alone) > TOLERANCE
    assert moving(8, 0.05, lambda layer, r: NormCaps(layer, 1.0, block_size=r).step) <= TOLERANCE


def test_the_first_step_starts_from_vectors_that_have_settled():
    layer = nn.Linear(400, 400, bias=False)
    nn.init.normal_(layer.weight)
    # Fifteen iterations, with which vectors start elsewhere, leave a hundredth with so few.
    caps = NormCaps(layer, 1.0, block_size=4)
    caps.step()
    assert norm(layer) <= 1 + TOLERANCE
    assert caps.state_dict()["is_settled"]


def test_a_weight_is_scaled_through_the_first_parameter_that_it_scales_with():
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    magnitude, direction = (p.detach().clone() for p in layer.parametrizations.weight.parameters())
    assert NormCaps(layer, 0.1).step().all()
    assert norm(layer) == pytest.approx(0.1, rel=TOLERANCE)
    now = list(layer.parametrizations.weight.parameters())
    assert torch.equal(now[1], direction)
    assert bool((now[0].detach().abs() < magnitude.abs()).all())


def test_a_model_without_a_layer_that_can_be_held_is_refused():
    with pytest.raises(UnsupportedLayerError, match="scales with none of the parameters"):
        NormCaps(parametrizations.orthogonal(nn.Linear(3, 3)), 1.0)


def test_a_parameter_that_was_replaced_is_followed():
    layer = nn.Linear(4, 4)
    caps = NormCaps(layer, 0.1)
    caps.step()
    layer.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)}, assign=True)
    assert caps.step().all()
    assert norm(layer) == pytest.approx(0.1, rel=TOLERANCE)


def test_a_factor_is_not_rounded_to_the_weights_dtype():
    # bf16 has 0.99609375 for 0.9975, which would lower 1.5 by one of its steps; the factor itself does not.
    weight = nn.Parameter(torch.tensor([1.0, 1.9921875, 1.5]).bfloat16())
    as_number, as_tensor = (nn.Parameter(weight.detach().clone()) for _ in range(2))
    with torch.no_grad():
        scale_(as_number, 0.9975)
        scale_(as_tensor, torch.tensor(0.9975, dtype=torch.float64))
    wanted = (weight.detach().double() * 0.9975).bfloat16()
    assert not torch.equal(wanted, weight.detach() * torch.tensor(0.9975).bfloat16())
    assert not torch.equal(wanted, weight)
    assert torch.equal(as_number, wanted)
    assert torch.equal(as_tensor, wanted)


def test_zero_and_not_finite_weights_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    model[1].weight.data[0, 0] = math.nan
    model[2].weight.data[0, 0] = math.inf
    before = [layer.weight.detach().clone() for layer in model]
    assert not NormCaps(model, 0.1).step().any()
    for layer, weight in zip(model, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    layer = nn.Linear(30, 20, dtype=dtype)
    caps = NormCaps(layer, 0.3)
    for _ in range(3):
        caps.step()
    # bf16 holds 8 bits.
    assert 0.29 < float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) < 0.3 * (1 + 2**-8)
