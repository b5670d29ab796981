"""A convolution and the batch normalisation behind it as one operator: its gradients in closed form."""

import math

import pytest
import torch
from torch import nn

from lightning_lip.operators.composed import ScaledOperator
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator


@pytest.mark.parametrize(
    ("layer", "frozen"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), ()),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), ()),
        (nn.Conv2d(4, 6, 3, dilation=2), ("gamma",)),
        (nn.Conv2d(4, 6, (1, 3)), ("kernel",)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), ()),
    ],
    ids=str,
)
def test_gradients_of_a_scaled_convolution_are_those_of_autograd(layer, frozen):
    gamma, mean_square = nn.Parameter(torch.rand(6) + 0.5), torch.rand(6) + 0.5
    op = ScaledOperator(ConvolutionOperator("layer", layer, (4, 7, 7)), "both", lambda: gamma / mean_square, (gamma,))
    left, right = (torch.randn(math.prod(shape)) for shape in (op.codomain_shape, op.domain_shape))
    parameters = [p for name, p in (("kernel", layer.weight), ("gamma", gamma)) if name not in frozen]
    op.add_norm_gradients_(0.5, left, right, parameters)
    expected = torch.autograd.grad(0.5 * op.norm(left, right), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in (layer.weight, gamma) if all(p is not q for q in parameters))
    if not frozen:
        op.add_norm_gradients_(0.0, left, torch.full_like(right, math.nan), parameters)
        torch.testing.assert_close(gamma.grad, expected[1], rtol=1e-4, atol=1e-4)
