"""Certified norms of operators, on top of the bounds for matrices and convolutions.

An operator does not know its certificate: a new kind is one function here.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import torch

from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import DiagonalOperator, ScaledOperator
from lightning_lip.operators.convolutions.convolution import KernelOperator
from lightning_lip.rigorous.convolution import certified_convolution_norm
from lightning_lip.rigorous.evaluation import Evaluation, evaluated
from lightning_lip.rigorous.matrix import SMALLEST_NORMAL, certified_matrix_norm
from lightning_lip.rigorous.rounding import UNIT_ROUNDOFF, multiply_up, sum_up


@singledispatch
@torch.no_grad()
def certified_norm(operator: LinearOperator, weight: Evaluation | None = None) -> float:
    """Return a *certified upper bound* of an operator's norm.

    What its weight is computed from counts as it is stored: see :func:`~lightning_lip.rigorous.evaluation.evaluated`.

    Args:
        operator: The operator.
        weight: A weight of the same shape to bound in place of the operator's own.

    Raises:
        ValueError: If the weight holds NaN or an infinity, or cannot be computed in fp64.
    """
    weight = evaluated(operator.weight) if weight is None else weight
    return sum_up([certified_matrix_norm(weight.value), weight.error_norm()])


@certified_norm.register
@torch.no_grad()
def _(operator: KernelOperator, weight: Evaluation | None = None) -> float:
    weight = evaluated(operator.weight) if weight is None else weight
    module = operator.convolution
    names = ("stride", "dilation", "padding", "padding_mode", "transposed")
    settings: dict[str, Any] = {name: getattr(module, name) for name in names}
    bound = certified_convolution_norm(
        weight.value,
        groups=module.groups,
        spatial=operator.spatial,
        output_padding=module.output_padding if module.transposed else None,
        **settings,
    )
    if weight.error is None:
        return bound
    # The error's blocks from channel to channel have at most the norms of their largest entry times a kernel of ones
    # (padding and strides have no signs), and the root of the sum of their squares bounds the whole. That kernel's norm
    # need not be tight.
    ones = torch.ones(1, 1, *weight.value.shape[2:], dtype=torch.float64, device="cpu")
    return sum_up([bound, multiply_up(weight.error_norm(), certified_convolution_norm(ones, **settings))])


@certified_norm.register
@torch.no_grad()
def _(operator: DiagonalOperator, weight: Evaluation | None = None) -> float:
    weight = evaluated(operator.weight) if weight is None else weight
    largest = float(weight.magnitudes().max())
    if not math.isfinite(largest):
        raise ValueError(f"Expected finite entries in the scale of {operator.name!r}, got NaN or an infinity.")
    return largest


@certified_norm.register
@torch.no_grad()
def _(operator: ScaledOperator) -> float:
    # s is rounded up to fp32, so that its product with stored fp32 weights is exact in fp64. With fp64 weights, also
    # those computed in fp64, the product is rounded once.
    scale = evaluated(operator.scale).magnitudes()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"Expected a finite scale in {operator.name!r}, got NaN or an infinity.")
    raised = scale.float()
    # The conversion rounds to nearest: one step up is at least the value.
    raised = torch.nextafter(raised, torch.full_like(raised, math.inf)).double()
    base = evaluated(operator.base.weight)
    weight = operator.scaled(base.value, raised)
    if not bool(weight.isfinite().all()):
        return multiply_up(float(raised.max()), certified_norm(operator.base, base))
    if base.error is None and operator.base.weight().dtype != torch.float64:
        return certified_norm(operator.base, Evaluation(weight, None))
    # Where the product underflows, it may vanish.
    error = UNIT_ROUNDOFF * weight.abs() + SMALLEST_NORMAL * (base.value != 0)
    if base.error is not None:
        error += operator.scaled(base.error, raised)
    return certified_norm(operator.base, Evaluation(weight, error * (1 + 8 * UNIT_ROUNDOFF)))
