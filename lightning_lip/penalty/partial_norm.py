"""The norm of an operator of which only some parameters are penalised: a layer fused with a normalisation, say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lip.kernels.tensors import without_autocast
from lightning_lip.operators.base import LinearOperator


def partial_norm(op: LinearOperator, chosen: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
    """Return an operator's :meth:`~.LinearOperator.norm`, shape (), differentiable in some of its parameters only."""
    return _PartialNorm.apply(op, tuple(chosen), left, right, *chosen)  # type: ignore[no-any-return]


class _PartialNorm(torch.autograd.Function):
    """The norm of an operator, with a gradient for some of its parameters only."""

    @staticmethod
    def forward(
        ctx: Any, op: LinearOperator, chosen: tuple[Tensor, ...], left: Tensor, right: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.op, ctx.chosen = op, chosen
        ctx.save_for_backward(left, right)
        return op.norm(left, right).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        needed = [p for p in ctx.chosen if p.requires_grad]
        with torch.enable_grad(), without_autocast():
            pulled = torch.autograd.grad(ctx.op.norm(left, right), needed, allow_unused=True) if needed else ()
        by_id = {id(p): g for p, g in zip(needed, pulled, strict=True)}
        found = (by_id.get(id(p)) for p in ctx.chosen)
        return (None, None, None, None, *(None if g is None else grads[0].to(g) * g for g in found))
