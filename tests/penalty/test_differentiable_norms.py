"""The log bound of an output and of a module's input, with its gradient."""

import copy

import pytest
import torch
from support.networks import Residual, mlp, randomised_batch_norm
from torch import nn

from lightning_lip import LipschitzRegularizer


def norm(matrix):
    return torch.linalg.svdvals(matrix)[0]


def regularizer(net, *shape, **options):
    settings = {"block_size": 4, "n_iterations": 200, **options}
    example = torch.zeros(1, *shape, dtype=torch.float64) if shape else None
    return LipschitzRegularizer(net, 1.0, example_input=example, **settings)


def test_it_has_the_gradient_of_every_spectral_norm_and_none_under_no_grad():
    net = Residual().double()
    found = regularizer(net, 8)
    truth = norm(net.out.weight).log() + (1 + norm(net.back.weight) * norm(net.inner.weight)).log()
    weights = [net.inner.weight, net.back.weight, net.out.weight]
    bound = found.log_bound()
    assert bound.item() == pytest.approx(truth.item(), rel=1e-9)
    for a, b in zip(torch.autograd.grad(bound, weights), torch.autograd.grad(truth, weights), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert not found.log_bound().requires_grad
        assert found.log_bound().item() == pytest.approx(truth.item(), rel=1e-9)


def test_the_bound_of_a_product_has_it_too():
    net = mlp(5, 6, 3, dtype=torch.float64)
    regularizer(net).bound().backward()
    truth = norm(net[0].weight) * norm(net[2].weight)
    (expected,) = torch.autograd.grad(truth, [net[0].weight])
    assert torch.allclose(net[0].weight.grad, expected, rtol=1e-6, atol=1e-8)


def test_until_a_module_it_is_the_bound_of_its_input():
    net = Residual().double()
    found = regularizer(net, 8)
    before_out = (1 + norm(net.back.weight) * norm(net.inner.weight)).log()
    assert found.log_bound(until=net.out).item() == pytest.approx(before_out.item(), rel=1e-9)
    assert found.log_bound(until=net.back).item() == pytest.approx(norm(net.inner.weight).log().item(), rel=1e-9)
    assert found.log_bound(until=net.inner).item() == 0
    found.log_bound(until=net.out).backward()
    assert net.inner.weight.grad.norm() > 0
    assert not net.out.weight.grad.any()


def test_until_a_container_and_behind_a_wrapper():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))).double()
    found = regularizer(net, 4)
    assert found.log_bound(until=net[2]).item() == pytest.approx(norm(net[0].weight).log().item(), rel=1e-9)
    assert found.log_bound(until=net[2][1]).item() == pytest.approx(
        (norm(net[0].weight) * norm(net[2][0].weight)).log().item(), rel=1e-9
    )


def test_what_has_not_one_input_of_its_own_is_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), randomised_batch_norm(nn.BatchNorm2d(2)), nn.Flatten()).double()
    with pytest.raises(ValueError, match="one operator with the layer before it"):
        regularizer(net, 1, 4, 4).log_bound(until=net[1])
    shared = nn.Linear(3, 3).double()
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(ValueError, match="one input"):
        regularizer(twice, 3).log_bound(until=shared)
    with pytest.raises(ValueError, match="a module of the model"):
        regularizer(twice, 3).log_bound(until=nn.Linear(3, 3))
    with pytest.raises(ValueError, match="example_input"):
        regularizer(twice).log_bound(until=shared)


def test_the_penalty_and_the_bounds_share_one_iteration_a_state_of_the_weights():
    net = mlp(6, 9, 4, dtype=torch.float64)
    found = regularizer(net, 6, block_size=1, n_iterations=1)
    found.value()
    before = copy.deepcopy(found.state_dict()["vectors"])
    found.log_bound()
    found.log_bound(until=net[2])
    assert all(torch.equal(v, before[k]) for k, v in found.state_dict()["vectors"].items())
    with torch.no_grad():
        net[0].weight.mul_(torch.linspace(0.5, 1, 6, dtype=torch.float64))
    found.log_bound(until=net[2])
    assert not torch.equal(found.state_dict()["vectors"]["0"], before["0"])


def test_compiled_it_gives_the_eager_gradient():
    net = mlp(6, 9, 4, dtype=torch.float64)
    found = regularizer(net, 6)
    (expected,) = torch.autograd.grad(found.log_bound(), [net[0].weight])
    compiled = torch.compile(lambda: found.log_bound(), backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(), [net[0].weight])
    assert torch.allclose(gradient, expected, rtol=1e-9)
