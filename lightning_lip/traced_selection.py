"""A traced graph of which some layers are selected: the bound over all of it, the gradient for the selected ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.bound import NetworkBound
from lightning_lip.kernels.reference import without_autocast
from lightning_lip.operators import LinearOperator
from lightning_lip.selection import Selected, Selection, select


def trace_selected(
    model: nn.Module, example_input: Any, layers: Selection | None, exclude: Selection | None
) -> tuple[NetworkBound | None, set[int] | None]:
    """Return the bound over the graph that an example input shows, and the ids of the selected parameters in it.

    A LightningModule's own ``example_input_array`` serves if no input is given. It was not set for this purpose, so a
    graph without a known bound is then no error: a warning says why, and the product of the layers remains.
    """
    if example_input is not None:
        network = NetworkBound.trace(model, example_input)
        return network, _chosen(network.operators, select(model, layers, exclude), must_cover=layers is not None)
    example_input = getattr(model, "example_input_array", None)
    if example_input is None:
        return None, None
    try:
        network = NetworkBound.trace(model, example_input)
        return network, _chosen(network.operators, select(model, layers, exclude), must_cover=layers is not None)
    except ValueError as error:  # UnsupportedLayerError is one
        warnings.warn(
            f"The bound over the graph of the module's example_input_array cannot serve; the product of the layers "
            f"does instead. {error}",
            stacklevel=3,
        )
        return None, None


def _chosen(operators: Sequence[LinearOperator], selected: Sequence[Selected], must_cover: bool) -> set[int]:
    """Return the ids of the selected layers' parameters in a traced graph's operators.

    Raises:
        ValueError: If there is none; or, where `must_cover`, if a selected layer is not in the graph.
    """
    in_graph = {id(p) for op in operators for p in op.parameters}
    chosen: set[int] = set()
    absent = []
    for layer in selected:
        module = layer.found.module
        # Its own parameters, and those of its parametrizations; a layer inside it is selected for itself.
        computed = module._modules.get("parametrizations") if parametrize.is_parametrized(module) else None
        own = [*module._parameters.values(), *(computed.parameters() if computed is not None else ())]
        ids = {id(p) for p in own if p is not None}
        chosen |= ids & in_graph
        if ids and not ids & in_graph:
            absent.append(layer.found.name)
    if absent and must_cover:
        names = absent[0] if len(absent) == 1 else absent
        raise ValueError(
            f"The selected layers {absent} do not act on the output for `example_input`: leave them out with "
            f"exclude={names!r}, or give an input that reaches them."
        )
    if not chosen:
        raise ValueError(
            f"No selected layer acts on the output for `example_input`: {[s.found.name for s in selected]}."
        )
    return chosen


def partial_norm(op: LinearOperator, chosen: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
    """Return an operator's :meth:`~.LinearOperator.norm`, shape (), differentiable in some of its parameters only."""
    apply: Callable[..., Tensor] = _PartialNorm.apply  # typed from torch 2.14 on, not before
    return apply(op, tuple(chosen), left, right, *chosen)


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
