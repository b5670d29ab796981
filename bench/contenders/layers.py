"""Layers as linear maps, without the package's own operators: for the peers' loops, and as the truth in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from lightning_lip.kernels.symbol import started, symbol_step
from lightning_lip.kernels.waves import MAX_CELLS, Geometry
from lightning_lip.reporting.extras import extra

Layer = nn.Linear | nn.Conv2d

CONVERGED = 60
"""Steps of all cells of a symbol that are taken for the truth."""

TOLERANCE = 1e-4
"""ARPACK's relative tolerance for a convolution's norm in fp64, far below the peers' errors there."""


def input_shapes(network: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of one input of each named layer, as a forward pass on `inputs` shows it.

    A linear layer's is (n,), however many tokens it maps at a time; a convolution's is (c_in, h, w).
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, layer: nn.Module, given: Any) -> None:
        shapes[name] = (layer.in_features,) if isinstance(layer, nn.Linear) else tuple(given[0].shape[1:])

    hooks = [network.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in names]
    # Batch normalisation must not see this batch.
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(inputs)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return shapes


def apply(layer: Layer, weight: Tensor, inputs: Tensor) -> Tensor:
    """Map inputs (k, *input_shape) by a weight in the place of the layer's own, without the bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(inputs, weight)
    return F.conv2d(inputs, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def adjoint(layer: Layer, weight: Tensor, outputs: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Map outputs (k, *output_shape) back to (k, *input_shape); the adjoint of :func:`apply`."""
    if isinstance(layer, nn.Linear):
        return F.linear(outputs, weight.mT)
    size = (len(outputs), *input_shape)
    return conv2d_input(  # type: ignore[no-untyped-call, no-any-return]
        size, weight, outputs, layer.stride, layer.padding, layer.dilation, layer.groups
    )


@torch.no_grad()
def exact_norm(layer: Layer, input_shape: Sequence[int]) -> float:
    """Return the spectral norm of a layer's present weight, in fp64.

    *Exact* up to rounding for a matrix (and a 1 x 1 convolution of stride 1), by a dense eigenvalue solver; for other
    convolutions an *estimate from below*, by ARPACK's Lanczos iteration on the true operator for inputs of
    `input_shape`, to a relative accuracy of 1e-4.

    Raises:
        MissingExtraError: If scipy is not installed.
    """
    weight = layer.weight.detach().double().cpu()
    if isinstance(layer, nn.Linear) or (weight.shape[2:] == (1, 1) and layer.stride == (1, 1)):
        return float(torch.linalg.eigvalsh(_gram(weight.flatten(1)))[-1].clamp(min=0).sqrt())
    sparse = extra("scipy.sparse.linalg", "bench")
    n = math.prod(input_shape)

    def normal(vector: Any) -> Any:
        row = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64)).view(1, *input_shape)
        return adjoint(layer, weight, apply(layer, weight, row), input_shape).flatten().numpy()

    start = np.random.default_rng(0).standard_normal(n)
    operator = sparse.LinearOperator((n, n), matvec=normal, dtype=np.float64)
    (value,) = sparse.eigsh(operator, k=1, v0=start, tol=TOLERANCE, return_eigenvectors=False)
    return math.sqrt(max(0.0, float(value)))


@torch.no_grad()
def exact_symbol_norm(layer: Layer) -> float:
    """Return the norm of a layer on the infinite grid, in fp64: for a convolution all cells iterated to convergence."""
    if isinstance(layer, nn.Linear):
        return exact_norm(layer, (layer.in_features,))
    kernel = layer.weight.detach().double().cpu()
    rows, columns, *size = kernel.shape
    settings = tuple(size), tuple(layer.stride), tuple(layer.dilation)
    geometry = Geometry(rows // layer.groups, columns, layer.groups, *settings)
    state = started(kernel, geometry, torch.Generator().manual_seed(0))
    return float(symbol_step(kernel, state, geometry, MAX_CELLS, CONVERGED).sigma)


def _gram(matrix: Tensor) -> Tensor:
    """Return the smaller of W W^T and W^T W: its largest eigenvalue keeps the digits that a norm needs."""
    return matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
