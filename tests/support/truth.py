"""What is true of matrices, operators and networks, by dense decompositions in fp64."""

import math

import pytest
import torch
from torch import nn

from lightning_lip.graph.bound import NetworkBound


def norm(matrix):
    """Return the spectral norm of a matrix, or of a module's weight, as a float."""
    matrix = matrix.weight if isinstance(matrix, nn.Module) else matrix
    return torch.linalg.matrix_norm(matrix.detach().double(), 2).item()


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def product(model):
    """Return the product of the spectral norms of a model's linear layers."""
    return math.prod(norm(layer) for layer in linears(model))


def dense(operator):
    """Return an operator's matrix, (codomain, domain), by its own map."""
    size = math.prod(operator.domain_shape)
    identity = torch.eye(size, dtype=operator.weight().dtype).view(size, *operator.domain_shape)
    return operator.apply(identity).flatten(1).mT


def operator_norms(operators):
    """Return the operators' norms, shape (L,), fp64, differentiable in their parameters."""
    norms = [torch.linalg.matrix_norm(dense(operator), 2).double() for operator in operators]
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


def jacobian_norm(model, *inputs):
    """Return the norm of the Jacobian at one sample (batch of one), for all outputs and all inputs together."""

    def flat(*parts):
        outputs = model(*parts)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.cat([o.flatten() for o in outputs])

    jacobians = torch.autograd.functional.jacobian(flat, inputs)
    return torch.linalg.matrix_norm(torch.cat([j.flatten(1) for j in jacobians], 1), 2).item()


def value_of(model, example):
    """Return the network's bound at its operators' true norms."""
    bound = NetworkBound.trace(model, example)
    with torch.no_grad():
        return bound.log_bound(operator_norms(bound.operators).log()).exp().item()


def check_bound(model, *shape, expected=None, attained=None, n=6, scale=1.0):
    """Trace a network, and compare its bound with a hand-derived value, and with sampled Jacobians from below."""
    model = model.double().eval()
    torch.manual_seed(0)
    value = value_of(model, torch.randn(2, *shape, dtype=torch.float64))
    worst = max(jacobian_norm(model, scale * torch.randn(1, *shape, dtype=torch.float64)) for _ in range(n))
    assert worst <= value * (1 + 1e-9)
    if expected is not None:
        assert value == pytest.approx(expected, rel=1e-9)
    if attained:
        assert worst >= value * (1 - 1e-6)
    return value, worst
