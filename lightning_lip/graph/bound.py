"""What spectral norms bound: the whole network, by rules over its graph, or the product of the selected layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import Builder, Dependent, GraphNode, Independent, Refused
from lightning_lip.graph.program import BoundProgram, ProductBound, Term, log_up
from lightning_lip.graph.refusals import Refusal, listed
from lightning_lip.graph.tracing import TracedModel, entry_nodes, head_node, module_path, trace
from lightning_lip.graph.walk import walk_graph
from lightning_lip.models.inputs import BatchDim, check_batch_dim
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.recorded import recorded
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.operators.coverage import Coverage, share_of
from lightning_lip.operators.selection import Provider, Selection, Unknown, cover, known_by_type, parameter_ids, select
from lightning_lip.rigorous.rounding import sum_up
from lightning_lip.usage.observation import Observation

__all__ = ["Bound", "GraphNode", "Head", "NetworkBound", "bound_of", "observed_product"]


@dataclass(frozen=True)
class Head:
    """The last linear layer of a classifier: its outputs are the logits, the bound of its inputs is that of the rest.

    Attributes:
        name: The name of the module whose forward holds it.
        matrix: Its weight, (C, d), read or computed anew by ``matrix.compute()``, differentiable in the parameters.
        features: The term of its input, (B, d).
    """

    name: str
    matrix: Independent
    features: Term


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
        values: Mapping[torch.fx.Node, Any],
    ) -> None:
        self.traced = traced
        self.operators = list(operators)
        self.selected_ids = {id(p) for op in self.operators for p in op.parameters}
        self._program = program
        self._nodes = list(nodes)
        self._values = values
        owners = [(module._parameters, key) for module, _, key in traced.owners.values()]
        self._slots = [(slots, key, slots[key]) for slots, key in owners if slots.get(key) is not None]
        """Where the model keeps its parameters, and those that it kept there at the last look."""

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_input: object,
        batch_dim: BatchDim = 0,
        convolutions: Convolutions = "spatial",
    ) -> NetworkBound:
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
            convolutions: Whether the norms of convolutions are those of the operators at the traced sizes, or those of
                their symbols, which lie above (but for circular padding, where they are the same).

        Raises:
            UnsupportedLayerError: If an operation on the way from input to output has no known finite constant, or the
                forward pass cannot be traced. All such operations are named with the path of their module.
            ValueError: If `example_input` has no batch dimension, the forward pass fails on it, or no output depends on
                it.
        """
        traced = trace(model, example_input, batch_dim)
        builder = Builder(traced, convolutions)
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
        return cls(traced, builder.operators, builder.program, list(builder.report.values()), builder.values)

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

    def head(self, module: nn.Module | None = None) -> Head | None:
        """Return the linear layer whose outputs are the logits: the last operation, or a log-softmax before it.

        Args:
            module: The layer, where something else follows it; the logits are then its outputs.

        Returns:
            The head; None where none is named and the network does not end in one on features of shape (B, d).

        Raises:
            ValueError: If the module is not such a layer of the network.
        """
        node = head_node(self.traced, module)
        if node is not None:
            value, matrix = (self._values.get(source) for source in node.all_input_nodes[:2])
            if (
                isinstance(value, Dependent)
                and isinstance(matrix, Independent)
                and (len(value.shape), value.axis) == (2, 0)
            ):
                return Head(module_path(node), matrix, value.term)
        if module is not None:
            raise ValueError("Expected `head` to act on features of shape (B, d), which depend on the model's input.")
        return None

    def input_of(self, module: nn.Module) -> Term:
        """Return the term of a module's input, for the bound of all that comes before the module.

        Raises:
            ValueError: If it is not in the graph, has several inputs, or is one operator with the layer before it.
        """
        entries = [self._values.get(node) for node in entry_nodes(self.traced, module)]
        values = [value for value in entries if isinstance(value, Dependent)]
        if len(values) != 1:
            raise ValueError(
                f"Expected `until` to have one input that depends on the model's, got a {type(module).__name__} with "
                f"{len(values)} in the traced forward pass."
            )
        if values[0].pending is not None:
            raise ValueError(
                f"The {type(module).__name__} is one operator with the layer before it, and its input has no bound of "
                "its own: name that layer, or the module that follows."
            )
        return values[0].term

    def log_bound(self, log_sigma: Tensor, result: Term | None = None) -> Tensor:
        """Return the logarithm of the bound, shape (), differentiable in `log_sigma`.

        Constants that depend on parameters or buffers outside the operators (PReLU's slopes, registered rules) are
        read anew; no gradient flows to them.

        Args:
            log_sigma: Logarithms of the spectral norms in the order of :attr:`operators`, shape (L,); -inf for a zero
                weight. In its dtype and on its device; fp64 for a certificate.
            result: The term of an earlier value, to bound that one; None for the output.

        Raises:
            ValueError: If the shape is not (L,).
        """
        if log_sigma.shape != (len(self.operators),):
            raise ValueError(
                f"Expected `log_sigma` of shape ({len(self.operators)},), one for each operator, got "
                f"{tuple(log_sigma.shape)}."
            )
        return self._program.evaluate(log_sigma, result)

    def affine(self, result: Term | None = None) -> tuple[float, list[int]] | None:
        """Return c and the operators i of ``c + sum_i log sigma_i``, where :meth:`log_bound` is that: in a chain."""
        return self._program.affine(result)

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

    def log_bound_up(self, norms: Sequence[float], result: Term | None = None) -> float:
        """Return an upper bound of the logarithm of the bound for L norms, rounding included.

        Its constants are rounded up.

        Args:
            norms: Upper bounds of the operators' norms.
            result: The term of an earlier value, to bound that one; None for the output.

        Raises:
            ValueError: If the bound is NaN.
        """
        logs = [log_up(norm) for norm in norms]
        if math.inf in logs:
            return math.inf
        value = float(self.log_bound(torch.tensor(logs, dtype=torch.float64, device="cpu"), result))
        if math.isnan(value):
            raise ValueError(
                "The bound is NaN: a parameter that the network's constants are read from (PReLU's) has become it."
            )
        if not math.isfinite(value):
            return value
        return sum_up([value, self._program.rounding(logs, result)])

    def explain(self) -> list[GraphNode]:
        """Return the graph's operations in forward order, each with its rule, its constant and its operator's name."""
        return list(self._nodes)


Bound = ProductBound | NetworkBound


def bound_of(
    model: nn.Module,
    example_input: object,
    layers: Selection | None = None,
    exclude: Selection | None = None,
    unknown: Unknown = "refuse",
    batch_dim: BatchDim = 0,
    convolutions: Convolutions = "symbol",
    is_awaiting: bool = False,
) -> tuple[Bound, Coverage]:
    """Return the bound of the network over the graph that an example input shows, or the product of selected layers.

    In the graph every layer counts, and the selected ones' parameters are marked as such. A LightningModule's own
    ``example_input_array`` serves if no input is given. It was not set for this purpose, so a graph without a known
    bound is then no error: a warning says why, and the product of the layers remains.

    Args:
        model: The model.
        example_input: A tensor, a tuple of arguments, a dict of keyword arguments, or None.
        layers: What to select, as in :func:`~lightning_lip.operators.selection.select`.
        exclude: What to leave out.
        unknown: What becomes of the layers without a known norm in the product, as in
            :func:`~lightning_lip.operators.selection.cover`. In a graph they are always refused.
        batch_dim: None takes the whole example input as one sample, as :meth:`NetworkBound.trace` does.
        convolutions: Which norm convolutions have.
        is_awaiting: Whether the product is only until a forward pass shows more, for :func:`observed_product`: layers
            that are not known by their type then wait for that.

    Returns:
        The bound, and what the selection covers of the model.

    Raises:
        ValueError: If a selection matches nothing, or names layers that do not act on the output.
        UnsupportedLayerError: If the operator of a selected layer is not known, or an operation between
            `example_input` and the output has no known finite constant.
    """
    check_batch_dim(batch_dim)
    given = getattr(model, "example_input_array", None) if example_input is None else example_input
    if given is not None:
        try:
            network = NetworkBound.trace(model, given, batch_dim, convolutions)
            selected = select(model, layers, exclude)
            network.selected_ids = parameter_ids(network.operators, selected, must_cover=layers is not None)
            layers_of = {s.found.name: type(s.found.module).__name__ for s in selected}
            chosen = [op for op in network.operators if network.selected(op)]
            return network, Coverage(network.operators, layers_of, (), share_of(model, chosen))
        except (ValueError, TypeError, RuntimeError) as error:  # UnsupportedLayerError is a ValueError
            if example_input is not None:
                raise
            warnings.warn(
                f"The bound over the graph of the module's example_input_array cannot serve; the product of the layers "
                f"does instead. {error}",
                stacklevel=3,
            )
    providers: list[Provider] = [partial(known_by_type, convolutions=convolutions)]
    coverage = cover(model, layers, exclude, unknown, [*providers, _nothing_yet] if is_awaiting else providers)
    return ProductBound(coverage.operators), coverage


def _nothing_yet(module: nn.Module, name: str) -> Sequence[LinearOperator]:
    return ()


def observed_product(
    model: nn.Module,
    observation: Observation,
    present: Sequence[LinearOperator],
    layers: Selection | None = None,
    exclude: Selection | None = None,
    unknown: Unknown = "refuse",
    convolutions: Convolutions = "symbol",
    batch_statistics: bool = True,
) -> tuple[ProductBound, Coverage]:
    """Return the product of the selected layers' norms by what a forward pass showed, and what it covers.

    Layers that their types do not tell are covered where their weights multiply, and normalisations take their places,
    as :mod:`lightning_lip.usage.normalisation` says. A layer that `layers` selects stays, also where a normalisation
    undoes its scale.

    Args:
        model: The model.
        observation: What the forward pass showed.
        present: Operators that were made before, and go on.
        layers: What to select, as in :func:`~lightning_lip.operators.selection.select`.
        exclude: What to leave out.
        unknown: What becomes of the layers without a known norm.
        convolutions: Which norm convolutions have.
        batch_statistics: Whether the running statistics of batch normalisations may be read.

    Raises:
        ValueError: If a selection matches nothing.
        UnsupportedLayerError: If a layer is refused, or the operator of no selected layer is known.
    """
    made = {id(op.module): op for op in present}

    def known(module: nn.Module, name: str) -> Sequence[LinearOperator]:
        operators = [made[id(module)]] if id(module) in made else known_by_type(module, name, convolutions)
        for convolution in recorded(operators):
            shape = observation.input_shape_of(module)
            if shape is not None:
                convolution.saw(shape)
        return operators

    coverage = cover(
        model, layers, exclude, unknown, (known, partial(observation.operators_of, convolutions=convolutions))
    )
    chosen = {id(s.found.module) for s in select(model, layers, exclude)}
    placed = observation.place(coverage.operators, chosen, leave_out=layers is None, batch_statistics=batch_statistics)
    if not placed.operators:
        raise UnsupportedLayerError("Nothing is left: the selected layers are normalisations without parameters.")
    share = share_of(model, placed.operators)
    operators = placed.operators
    return ProductBound(operators), replace(coverage, operators=operators, share=share, normalisations=str(placed))
