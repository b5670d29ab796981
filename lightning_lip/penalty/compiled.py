"""The penalty as one custom operator, which torch.compile takes whole: no graph break, and the eager numbers.

The operator is handed the parameters, so that the compiler knows what the penalty depends on, and finds the
:class:`lightning_lip.LipschitzRegularizer` by its handle; what that computes is hidden from the compiler, singular
vectors that advance included. Value and gradient are formed together: the gradient is as large as the parameters and
lives until the backward pass. There is no second derivative. The compiler updates running statistics at the end of a
compiled call, so that a traced bound over batch normalisation reads those from before the call.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BY_HANDLE: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def register(regularizer: Any) -> int:
    """Return the handle by which the operator finds a regulariser, as long as it lives."""
    handle = next(_HANDLES)
    _BY_HANDLE[handle] = regularizer
    return handle


def penalty(parameters: Sequence[Tensor], trainable: Sequence[int], handle: int, number: int, advance: bool) -> Tensor:
    """Return a quantity of the norms behind `handle`, shape (), differentiable in their trainable parameters.

    Args:
        parameters: All that the regulariser computes it from, each once.
        trainable: Which of them get a gradient, by index.
        handle: What :func:`register` returned.
        number: Which quantity: the penalty or a log bound, as their ``evaluate`` numbers them.
        advance: Whether the singular vectors may advance.
    """
    value: Tensor = torch.ops.lightning_lip.penalty(list(parameters), list(trainable), handle, number, advance)[0]
    return value


@torch.library.custom_op(
    "lightning_lip::penalty",
    mutates_args=(),
    schema="(Tensor[] parameters, SymInt[] trainable, SymInt handle, SymInt number, bool advance)"
    " -> (Tensor, Tensor[])",
)
def _penalty(
    parameters: list[Tensor], trainable: list[int], handle: int, number: int, advance: bool
) -> tuple[Tensor, list[Tensor]]:
    regularizer = _BY_HANDLE.get(handle)
    if regularizer is None:
        raise RuntimeError("The LipschitzRegularizer of a compiled graph no longer exists: compile again.")
    live = regularizer.parameters()
    if [p.data_ptr() for p in live] != [p.data_ptr() for p in parameters]:
        raise RuntimeError(
            "The weights that the compiled graph holds are not the model's: where a compiled function changes weights, "
            "take the penalty before it does, or use add_grad_() or LipschitzPenalty outside of it."
        )
    chosen = [live[index] for index in trainable]
    # Custom operators run without autograd; this switches it on again.
    with torch.inference_mode(False), torch.enable_grad():
        value = regularizer.evaluate(number, advance)
        grads = torch.autograd.grad(value, chosen, allow_unused=True) if value.requires_grad else [None] * len(chosen)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]
    return value.detach().to(value_dtype(parameters)), [g.contiguous() for g in filled]


@_penalty.register_fake
def _(
    parameters: list[Tensor], trainable: list[int], handle: int, number: int, advance: bool
) -> tuple[Tensor, list[Tensor]]:
    grads = [torch.empty_like(parameters[i], memory_format=torch.contiguous_format) for i in trainable]
    return parameters[0].new_empty((), dtype=value_dtype(parameters)), grads


def value_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of a penalty's value: fp64 if a weight is fp64, fp32 otherwise."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.n_parameters, ctx.trainable = len(inputs[0]), inputs[1]
    ctx.save_for_backward(*output[1])


def _backward(ctx: Any, value: Tensor, grads: Any) -> tuple[list[Tensor | None], None, None, None, None]:
    spread: list[Tensor | None] = [None] * ctx.n_parameters
    for index, grad in zip(ctx.trainable, ctx.saved_tensors, strict=True):
        spread[index] = value.to(grad.dtype) * grad
    return spread, None, None, None, None


_penalty.register_autograd(_backward, setup_context=_save)
