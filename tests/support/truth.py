"""Truths in fp64: of matrices, operators and networks by dense decompositions; matrices whose spectrum is known."""

import math

import pytest
import torch
from torch import nn

from lightning_lip.graph.bound import NetworkBound
from lightning_lip.kernels.tensors import compute_dtype
from support.symbol_norms import norm_of_symbol


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


def forward_matrix(module, shape):
    """Return the matrix, (outputs, inputs), of an affine module at one input shape, by its own forward."""
    identity = torch.eye(math.prod(shape), dtype=next(module.parameters()).dtype).view(-1, *shape)
    return (module(identity) - module(torch.zeros_like(identity))).flatten(1).mT


def operator_norms(operators):
    """Return the operators' norms, shape (L,), fp64, differentiable in their parameters."""
    symbols = [norm_of_symbol(operator) for operator in operators]
    norms = [
        torch.linalg.matrix_norm(dense(operator), 2).double() if symbol is None else symbol
        for operator, symbol in zip(operators, symbols, strict=True)
    ]
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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal_columns(n, k, seed=0):
    """Return k random orthonormal columns, shape (n, k), fp64."""
    return torch.linalg.qr(torch.randn(n, k, generator=generator(seed), dtype=torch.float64)).Q


def geometric(k, ratio, top=1.0):
    """Return k singular values, of which the second lies `ratio` below the first, and so on."""
    return [top * ratio**i for i in range(k)]


def matrix_of(m, n, spectrum, seed=0):
    """Return an (m, n) matrix with the given singular values (those not given are zero), fp64."""
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    k = len(spectrum)
    return (orthonormal_columns(m, k, seed) * spectrum) @ orthonormal_columns(n, k, seed + 1).T


def nearly_dependent(distance, n, r):
    """Return unit rows (r, n), fp64, each of which after the first lies `distance` from the span of those before it."""
    first, *others = orthonormal_columns(n, r, 3).T
    return torch.stack([first, *((1 - distance**2) ** 0.5 * first + distance * row for row in others)])


def _among_nan(matrix):
    """Return the matrix in every second row, and from the ninth column on, of a larger one that else holds NaN."""
    m, n = matrix.shape
    return matrix.new_full((2 * m, n + 16), float("nan"))[::2, 8 : 8 + n].copy_(matrix)


LAYOUTS = {
    "contiguous": lambda w: w.clone(),
    "transposed": lambda w: w.T.clone(memory_format=torch.contiguous_format).T,
    "row_strided": _among_nan,
    "column_strided": lambda w: _among_nan(w.T).T,
}
"""Copies of a matrix in other layouts; gaps hold NaN, so that a wrong read shows."""


def blocks(weights, size, seed=0):
    """Return a random starting block of up to `size` orthonormal rows for each weight, in its compute dtype."""
    return [
        orthonormal_columns(min(w.shape), min(size, *w.shape), seed).T.contiguous().to(w.device, compute_dtype(w.dtype))
        for w in weights
    ]


def largest_singular_value(matrix):
    """Return the spectral norm of a matrix in fp64, as a tensor of shape ()."""
    return torch.linalg.matrix_norm(matrix.detach().double(), 2)


PENALTIES = {
    "product": lambda sigma, target: sigma.prod(),
    "softplus_log": lambda sigma, target: torch.log1p(sigma.prod() / target),
    "hinge_log": lambda sigma, target: (sigma.log().sum() - math.log(target)).clamp(min=0).square(),
    "log": lambda sigma, target: sigma.log().sum(),
    "layer_sum": lambda sigma, target: sigma.sum(),
    "layer_sum_squares": lambda sigma, target: sigma.square().sum(),
}
"""The penalties by name, of spectral norms (L,) and the target, as they are defined."""
