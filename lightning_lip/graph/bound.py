"""NetworkBound: the Lipschitz bound of a network as a function of its spectral norms, by rules over its graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    GraphNode,
    Refused,
)
from lightning_lip.graph.program import BoundProgram, log_up
from lightning_lip.graph.refusals import Refusal, listed
from lightning_lip.graph.tracing import TracedModel, trace
from lightning_lip.graph.walk import walk_graph
from lightning_lip.models.inputs import BatchDim
from lightning_lip.operators.base import LinearOperator
from lightning_lip.rigorous.rounding import sum_up

__all__ = ["GraphNode", "NetworkBound"]


class NetworkBound:
    """An upper bound of a network's Lipschitz constant, as a function of its operators' spectral norms.

    The bound holds for the map from all inputs of a sample together to all outputs together, in the Euclidean norm, in
    eval mode, over all of input space, at the traced input size; the rounding errors of the network's own arithmetic
    are not part of it. It is made of proven rules: chains multiply, sums add,
    branches side by side of one input add in squares. With upper bounds of the norms it is an upper bound (evaluated in
    fp64, up to relative rounding errors of about 1e-15 a node); with estimates it is an estimate.

    Build it with :meth:`trace`.

    Attributes:
        operators: The L operators, each distinct weight once, in forward order; ``multiplicity`` is its number of uses.
        traced: The graph that the bound was derived from.
        selected_ids: The ids of the parameters that belong to selected layers; of all parameters, unless it is set.
    """

    kind: ClassVar[Literal["bound"]] = "bound"

    def __init__(
        self,
        traced: TracedModel,
        operators: Sequence[LinearOperator],
        program: BoundProgram,
        nodes: Sequence[GraphNode],
    ) -> None:
        self.traced = traced
        self.operators = list(operators)
        self.selected_ids = {id(p) for op in self.operators for p in op.parameters}
        self._program = program
        self._nodes = list(nodes)
        owners = [(module._parameters, key) for module, _, key in traced.owners.values()]
        self._slots = [(slots, key, slots[key]) for slots, key in owners if slots.get(key) is not None]
        """Where the model keeps its parameters, and those that it kept there at the last look."""

    @classmethod
    def trace(cls, model: nn.Module, example_input: object, batch_dim: BatchDim = 0) -> NetworkBound:
        """Trace a model and build its bound.

        Mode, buffers and random number generators are left as they were. Batch normalisation uses its running
        statistics, read again at each evaluation; where it directly follows a layer whose output has no other use,
        both are one operator ``diag(gamma / sqrt(var + eps)) W``, otherwise it is an operator of its own.

        Args:
            model: The model; its ``forward`` is traced.
            example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments, each tensor with
                the batch along its first dimension.
            batch_dim: None says that there is no batch: the whole input is one sample, as a graph's nodes are, and the
                norms are over all elements of each tensor.

        Raises:
            UnsupportedLayerError: If an operation on the way from input to output has no known finite constant, or the
                forward pass cannot be traced. All such operations are named with the path of their module.
            ValueError: If `example_input` has no batch dimension, the forward pass fails on it, or no output depends on
                it.
        """
        traced = trace(model, example_input, batch_dim)
        builder = Builder(traced)
        outputs = walk_graph(builder, traced)
        refusals: dict[Refusal, None] = {}
        dependent = []
        for output in outputs:
            if isinstance(output, Refused):
                refusals.update(dict.fromkeys(output.refusals))
            elif isinstance(output, Dependent):
                dependent.append(output)
        if refusals:
            raise UnsupportedLayerError(
                "The network has no known Lipschitz bound, and an unknown constant is never counted as 1:\n  - "
                + listed(list(refusals))
                + "\nBound the part of the network without them, or state a module's constant with register_constant."
            )
        if not dependent:
            raise ValueError("No output of the model depends on a floating-point tensor in `example_input`.")
        builder.program.result = builder.combine("norm", dependent)
        return cls(traced, builder.operators, builder.program, list(builder.report.values()))

    def selected(self, op: LinearOperator) -> list[nn.Parameter]:
        """Return the parameters of an operator that belong to selected layers."""
        return [p for p in op.parameters if id(p) in self.selected_ids]

    def follow_replaced(self) -> None:
        """Take the parameters that the model holds now, which ``load_state_dict(assign=True)`` exchanges, for one."""
        replaced: dict[int, nn.Parameter] = {}
        for index, (slots, key, known) in enumerate(self._slots):
            now = slots.get(key)
            if now is not known and now is not None:
                replaced[id(known)] = now
                self._slots[index] = slots, key, now
        if replaced:
            self.selected_ids = {id(replaced[i]) if i in replaced else i for i in self.selected_ids}
            for op in self.operators:
                op.replace_parameters(replaced)

    def log_bound(self, log_sigma: Tensor) -> Tensor:
        """Return the logarithm of the bound, shape (), differentiable in `log_sigma`.

        Constants that depend on parameters or buffers outside the operators (PReLU's slopes, registered rules) are
        read anew; no gradient flows to them.

        Args:
            log_sigma: Logarithms of the spectral norms in the order of :attr:`operators`, shape (L,); -inf for a zero
                weight. In its dtype and on its device; fp64 for a certificate.

        Raises:
            ValueError: If the shape is not (L,).
        """
        if log_sigma.shape != (len(self.operators),):
            raise ValueError(
                f"Expected `log_sigma` of shape ({len(self.operators)},), one for each operator, got "
                f"{tuple(log_sigma.shape)}."
            )
        return self._program.evaluate(log_sigma)

    def log_bound_and_slopes(self, log_sigma: Tensor) -> tuple[float, Tensor]:
        """Return the logarithm of the bound and its gradient in `log_sigma`, shape (L,).

        The gradient is zero where the bound is, and NaN where the bound is not finite.

        Args:
            log_sigma: As in :meth:`log_bound`.
        """
        with torch.enable_grad():
            log_sigma = log_sigma.detach().requires_grad_()
            log_bound = self.log_bound(log_sigma)
            slopes = torch.zeros_like(log_sigma)
            if log_bound.requires_grad and bool(log_bound.isfinite()):
                (slopes,) = torch.autograd.grad(log_bound, log_sigma)
        value = float(log_bound.detach())
        return value, slopes if value < math.inf else slopes + math.nan

    def log_bound_up(self, norms: Sequence[float]) -> float:
        """Return an upper bound of the logarithm of the bound for L norms, rounding included.

        Its constants are rounded up.

        Raises:
            ValueError: If the bound is NaN.
        """
        logs = [log_up(norm) for norm in norms]
        if math.inf in logs:
            return math.inf
        value = float(self.log_bound(torch.tensor(logs, dtype=torch.float64, device="cpu")))
        if math.isnan(value):
            raise ValueError(
                "The bound is NaN: a parameter that the network's constants are read from (PReLU's) has become it."
            )
        if not math.isfinite(value):
            return value
        return sum_up([value, self._program.rounding(logs)])

    def explain(self) -> list[GraphNode]:
        """Return the graph's operations in forward order, each with its rule, its constant and its operator's name."""
        return list(self._nodes)
