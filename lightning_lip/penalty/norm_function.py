"""A function of spectral norms as one node of autograd, whatever the number of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lip.kernels import PowerStep
from lightning_lip.kernels.tensors import in_double, without_autocast

Affine = tuple[float, list[int]]
"""c and the operators i of ``c + sum_i log sigma_i``, each as often as it counts."""


def norm_function(
    function: Callable[[Tensor], Tensor], affine: Affine | None, step: PowerStep, sources: Sequence[Tensor]
) -> Tensor:
    """Return a function of L spectral norms, shape (), differentiable in the weights; fp64 where the device has it.

    The singular vectors are constants of the gradient, which is exact for the exact ones. A norm of 0 gets no gradient;
    NaN stays NaN, to be seen. The weights are read for second derivatives only.

    Args:
        function: Maps the logarithms of the norms, shape (L,), to the value, shape ().
        affine: The same in closed form, if there is one. Where reading numbers waits for nothing (CPU), Python's then
            take a third of the time of tensors, which counts in a step of small layers.
        step: The singular triplets of the present weights, which nothing may overwrite.
        sources: What the L norms are of: a matrix ``W_l``, shape (m_l, n_l), with ``u_l^T W_l v_l`` the norm; or the
            norm itself, shape (), as a differentiable number.
    """
    apply: Callable[..., Tensor] = _Node.apply  # typed from torch 2.14 on, not before
    sigma = step.sigma
    if any(source.dim() == 0 for source in sources):
        # These are read anew, since they may depend on buffers: running statistics, which change between two steps.
        rows = zip(sigma.unbind(), sources, strict=True)
        sigma = torch.stack([source.detach().to(norm) if source.dim() == 0 else norm for norm, source in rows])
    given: list[Tensor | None] = list(sources)
    if affine is not None and sigma.device.type == "cpu":
        value, factors = _closed(affine, sigma)
        counted = set(affine[1])
        given = [source if index in counted else None for index, source in enumerate(given)]
    else:
        value, factors = _by_autograd(function, in_double(sigma))
    return apply(_Differentiated(function, step, value, factors), *given)


@dataclass(frozen=True)
class _Differentiated:
    """A function of the norms, its value, shape (), and its L derivatives in the norms, 0 where a norm is."""

    function: Callable[[Tensor], Tensor]
    step: PowerStep
    value: Tensor
    factors: Sequence[float] | Tensor

    def again(self, sources: Sequence[Tensor | None]) -> Tensor:
        """Return the value by operations that can be differentiated twice."""
        sigma = in_double(self.step.sigma)
        norms = list(sigma.unbind())
        for index, (left, source, right) in enumerate(zip(self.step.left, sources, self.step.right, strict=True)):
            if source is not None:
                norm = source if source.dim() == 0 else left @ (source.to(left.dtype) @ right)
                norms[index] = norm.to(sigma)
        stacked = torch.stack(norms)
        logs = torch.where(stacked == 0, 1.0, stacked).log()
        return self.function(torch.where(stacked == 0, -math.inf, logs))


def _closed(affine: Affine, sigma: Tensor) -> tuple[Tensor, Sequence[float] | Tensor]:
    value, operators = affine
    norms = sigma.tolist()
    factors = [0.0] * len(norms)
    for index in operators:
        norm = norms[index]
        if norm == 0:
            value -= math.inf
        else:
            value += math.log(norm) if norm > 0 else math.nan
            factors[index] += 1 / norm
    return torch.tensor(value, dtype=torch.float64, device="cpu"), factors


def _by_autograd(function: Callable[[Tensor], Tensor], sigma: Tensor) -> tuple[Tensor, Sequence[float] | Tensor]:
    with torch.enable_grad():
        log_sigma = sigma.log().requires_grad_()
        value = function(log_sigma)
        slopes = torch.autograd.grad(value, log_sigma)[0] if value.requires_grad else torch.zeros_like(sigma)
    factors = torch.where(sigma == 0, 0.0, slopes / sigma)
    return value.detach(), factors.tolist() if factors.device.type == "cpu" else factors


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: _Differentiated, *sources: Tensor | None) -> Tensor:
        ctx.whole, ctx.kinds = whole, [s if s is None else (s.dim(), s.dtype) for s in sources]
        ctx.save_for_backward(*sources)
        return whole.value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, needed = ctx.whole, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # for second derivatives
            return (None, *_twice(whole, ctx.saved_tensors, needed, grads[0]))
        factors: Any
        if isinstance(whole.factors, Tensor):
            factors = (grads[0] * whole.factors).unbind()
        else:
            slope = grads[0].item()
            factors = [slope * factor if factor else 0.0 for factor in whole.factors]
        found: list[Tensor | None] = []
        rows = zip(factors, whole.step.left, whole.step.right, ctx.kinds, needed, strict=True)
        for factor, left, right, kind, is_needed in rows:
            if not is_needed:
                found.append(None)
                continue
            n_dims, dtype = kind
            if n_dims:
                found.append(_outer(factor, left, right).to(dtype))
            else:
                found.append(torch.as_tensor(factor, dtype=dtype, device=left.device))
        return (None, *found)


def _outer(factor: float | Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``c u v^T``, shape (m, n); zeros for c = 0, also where the vectors are NaN."""
    if isinstance(factor, Tensor):
        factor = factor.to(left)
        return torch.where(factor == 0, 0.0, torch.outer(left * factor, right))
    return torch.outer(left * factor, right) if factor else left.new_zeros(len(left), len(right))


def _twice(
    whole: _Differentiated, sources: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients as functions of the sources and of `grad`."""
    chosen = [s for s, is_needed in zip(sources, needed, strict=True) if s is not None and is_needed]
    with without_autocast():
        pulled = iter(torch.autograd.grad(whole.again(sources), chosen, grad, create_graph=True, allow_unused=True))
    return [next(pulled) if is_needed else None for is_needed in needed]
