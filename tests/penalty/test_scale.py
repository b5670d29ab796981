"""The norms of the two gradients, and what is said of them."""

import math
import re

import pytest
import torch
from torch import nn

from lightning_lip import LipschitzRegularizer
from lightning_lip.penalty.scale import gradient_norms, out_of_scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norms_are_those_of_what_was_there_and_what_came(dtype):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (5,), (2, 2), (1,))]
    parameters[0].grad, parameters[1].grad = torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)
    first, second = parameters[0].grad.clone(), parameters[1].grad.clone()

    def add():
        parameters[0].grad += 2.0
        parameters[2].grad = torch.full((2, 2), 3.0, dtype=dtype)

    loss, penalty = gradient_norms(parameters, add)
    assert loss == pytest.approx(math.hypot(*first.tolist()[0], *first[1:].flatten().tolist(), *second.tolist()))
    assert penalty == pytest.approx(math.sqrt(12 * 4 + 4 * 9), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(parameters[0].grad, first + 2.0)  # the gradient itself is as without
    assert parameters[3].grad is None


def test_gradients_that_overflow_their_squares():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    parameter.grad = torch.tensor([3e4, 4e4], dtype=torch.float16)
    assert gradient_norms([parameter], lambda: None)[0] == pytest.approx(5e4, rel=1e-3)


def test_the_penalty_of_a_regulariser():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    regularizer = LipschitzRegularizer(model, 0.5, "layer_sum", n_iterations=50)
    model(torch.ones(2, 3).double()).square().sum().backward()
    assert gradient_norms(list(model.parameters()), regularizer.add_grad_)[1] == pytest.approx(0.5 * math.sqrt(2))


@pytest.mark.parametrize(
    ("loss", "penalty", "said"),
    [
        (1.0, 0.0, None),
        (1.0, 0.19, None),
        (2.0, 1.1, r"is 0\.55 times the loss's .* Try coefficient=0\.0005,"),
        (1e-3, 1e3, r"is 1e\+06 times the loss's .* Try coefficient=3e-10,"),
    ],
)
def test_what_is_said(loss, penalty, said):
    found = out_of_scale(loss, penalty, 0.01)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(said, found), found


def test_the_coefficient_to_try_is_in_scale():
    assert out_of_scale(1.0, 700.0, 0.01) is not None
    tried = 4e-7
    assert f"coefficient={tried:g}" in out_of_scale(1.0, 700.0, 0.01)
    assert out_of_scale(1.0, 700.0 * tried / 0.01, tried) is None
