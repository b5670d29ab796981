"""By how much the logits can move against each other: the distances of the head's rows, times the bound before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lip.kernels.tensors import in_double

N_DIRECT = 25
"""Rows up to which ``torch.cdist`` takes differences. Of more it forms a Gram matrix, of which fp64 keeps half of its
digits where rows are nearly equal."""


def pairwise_bounds(log_bound: Tensor, weight: Tensor, eps: float, classes: Tensor) -> Tensor:
    """Return ``eps e^S ||w_y - w_j||`` for each class y of `classes` and all j, shape (B, C), as one node of autograd.

    The slope is 0 where rows are equal.

    Args:
        log_bound: S, shape (), the logarithm of a Lipschitz bound of the head's input.
        weight: The head's weight with rows w, (C, d).
        eps: The radius.
        classes: (B,), from 0 to C - 1.
    """
    apply: Callable[..., Tensor] = _PairwiseBounds.apply  # typed from torch 2.14 on, not before
    return apply(log_bound, weight, eps, classes)


class _PairwiseBounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_bound: Tensor, weight: Tensor, eps: float, classes: Tensor) -> Tensor:
        parts = _parts(log_bound, weight, eps)
        ctx.eps, ctx.parts = eps, parts
        ctx.save_for_backward(log_bound, weight, classes)
        factor, _, distances = parts
        return distances.index_select(0, classes) * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_bound, weight, classes = ctx.saved_tensors
        # For second derivatives they are computed again, as functions of the saved inputs.
        factor, rows, distances = _parts(log_bound, weight, ctx.eps) if torch.is_grad_enabled() else ctx.parts
        pulled = torch.zeros_like(distances).index_add(0, classes, grads[0] * factor)
        of_log, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_log = (pulled * distances).sum().to(log_bound)
        if ctx.needs_input_grad[1]:
            pulled = (pulled + pulled.mT) / distances.masked_fill(distances == 0, torch.inf)
            of_weight = torch.addmm(pulled.sum(1, keepdim=True) * rows, pulled, rows, alpha=-1).to(weight.dtype)
        return of_log, of_weight, None, None


def _parts(log_bound: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor of the distances, the rows, and the distances (C, C)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = in_double(weight) if len(weight) > N_DIRECT else weight.to(dtype)
    return log_bound.exp().to(rows) * eps, rows, torch.cdist(rows, rows)
