"""A function of spectral norms as one node: second derivatives, and what has no part in it."""

import pytest
import torch
from support.networks import Residual, mlp, randomised_batch_norm
from torch import nn

from lightning_lip import LipschitzRegularizer


def by_operations(regularizer):
    """The log bound, at the same vectors, by operations that autograd knows."""
    step = regularizer._norms.current().copied()
    rows = zip(regularizer.operators, step.left, step.right, strict=True)
    return regularizer.log_bound_of(torch.stack([op.norm(u, v) for op, u, v in rows]).log())


def batch_norm_net():
    return nn.Sequential(nn.Linear(8, 6, bias=False), randomised_batch_norm(nn.BatchNorm1d(6)), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("make", [lambda: mlp(8, 6, 3), Residual, batch_norm_net], ids=["chain", "residual", "fused"])
def test_its_derivatives_of_both_orders_are_autograds(make):
    torch.manual_seed(0)
    net = make().double()
    regularizer = LipschitzRegularizer(net, 1.0, example_input=torch.zeros(2, 8).double(), n_iterations=300)
    regularizer.iterate()
    weights = [p for p in net.parameters() if p.dim() == 2]
    directions = [torch.randn_like(w) for w in weights]
    found = []
    for value in (regularizer.log_bound(), by_operations(regularizer)):
        first = torch.autograd.grad(value, weights, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        found.append((value, *first, *torch.autograd.grad(product * value, weights)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_layer_of_norm_zero_gives_minus_infinity_and_no_gradient_to_itself():
    net = mlp(4, 5, 3, dtype=torch.float64)
    nn.init.zeros_(net[0].weight)
    value = LipschitzRegularizer(net, 1.0).log_bound()
    assert value == -torch.inf
    value.backward()
    assert not net[0].weight.grad.any()
    assert net[2].weight.grad.norm() > 0


def test_what_comes_after_a_module_gets_no_gradient():
    net = mlp(4, 5, 3, dtype=torch.float64)
    regularizer = LipschitzRegularizer(net, 1.0, example_input=torch.zeros(1, 4).double())
    regularizer.log_bound(until=net[2]).backward()
    assert net[0].weight.grad.norm() > 0
    assert net[2].weight.grad is None
