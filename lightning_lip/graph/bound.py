"""NetworkBound: the Lipschitz bound of a network as a function of its spectral norms, by rules over its graph."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lightning_lip.graph.rules  # noqa: F401  (it registers every rule)
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import (
    RULES,
    Builder,
    Dependent,
    GraphNode,
    Independent,
    Refused,
    RefusedError,
    SampleAxisError,
    arguments_of,
    shape_of,
)
from lightning_lip.graph.checks import UNREADABLE, check_arguments, check_real, check_whole_module, only_floating
from lightning_lip.graph.program import BoundProgram, log_up
from lightning_lip.graph.refusals import REASONS, UNKNOWN, Refusal, listed
from lightning_lip.graph.rules.fourier import has_complex_rule, is_complex
from lightning_lip.graph.rules.written_out import written_out
from lightning_lip.graph.tracing import WHOLE_MODULE, TracedModel, operation_name, trace
from lightning_lip.operators.base import LinearOperator
from lightning_lip.rigorous.rounding import sum_up

__all__ = ["GraphNode", "NetworkBound"]

_UNSET = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
"""Operations whose values are what the memory holds."""

_SHAPES_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}


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
    def trace(cls, model: nn.Module, example_input: object) -> NetworkBound:
        """Trace a model and build its bound.

        Mode, buffers and random number generators are left as they were. Batch normalisation uses its running
        statistics, read again at each evaluation; where it directly follows a layer whose output has no other use,
        both are one operator ``diag(gamma / sqrt(var + eps)) W``, otherwise it is an operator of its own.

        Args:
            model: The model; its ``forward`` is traced.
            example_input: A tensor, a tuple of positional arguments or a dict of keyword arguments, each tensor with
                the batch along its first dimension.

        Raises:
            UnsupportedLayerError: If an operation on the way from input to output has no known finite constant, or the
                forward pass cannot be traced. All such operations are named with the path of their module.
            ValueError: If `example_input` has no batch dimension, the forward pass fails on it, or no output depends on
                it.
        """
        traced = trace(model, example_input)
        builder = Builder(traced)
        outputs = _walk_graph(builder, traced)
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


def _walk_graph(builder: Builder, traced: TracedModel) -> list[Any]:
    """Give every operation that the output needs a value; return the outputs' values."""
    builder.live_nodes = _live_nodes(traced.graph)
    numbers = itertools.count()
    returned: list[Any] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            number = None if node.name in traced.stored else next(numbers)
            builder.values[node] = _placeholder(builder, node, number)
        elif node.op == "output":
            leaves = [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, torch.fx.Node)]
            returned = [_real(builder, leaf) for leaf in leaves if leaf.name in traced.outputs]
        elif node in builder.live_nodes:
            builder.values[node] = _evaluate(builder, node)
    return returned


def _real(builder: Builder, node: torch.fx.Node) -> Any:
    value = builder.values[node]
    if isinstance(value, Dependent) and is_complex(node):
        return builder.refuse(node, "a complex output: bounds are for real numbers, such as view_as_real returns")
    return value


def _live_nodes(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the nodes that the output needs; what a module traced as one node computes inside is not needed."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    live: set[torch.fx.Node] = set()
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node in live:
            continue
        live.add(node)
        sources = node.args[1] if node.target is WHOLE_MODULE else (node.args, node.kwargs)
        waiting.extend(leaf for leaf in pytree.tree_leaves(sources) if isinstance(leaf, torch.fx.Node))
    return live


def _placeholder(builder: Builder, node: torch.fx.Node, number: int | None) -> Any:
    traced = builder.traced
    if number is None:
        read, owner = traced.stored[node.name], traced.owners.get(node.name)
        if node.name in traced.written and node in builder.live_nodes:
            reason = f"the forward pass changes the buffer {traced.written[node.name]!r}, and the output depends on it"
            return Refused(
                (Refusal("", type(traced.model).__name__, node.name, f"{reason}: it is another map each time"),)
            )
        tensor = read()
        parameters = (tensor,) if isinstance(tensor, nn.Parameter) else ()
        identity = builder.identity(node.name if owner is None else (id(owner[0]), owner[2]))
        return Independent(tuple(tensor.shape), read, identity, (), parameters, owner is not None, owner)
    example = node.meta.get("val")
    if not isinstance(example, Tensor):
        return example
    if not example.is_floating_point():
        return Refused((Refusal("", type(traced.model).__name__, node.name, f"an input of {example.dtype}"),))
    return Dependent(tuple(int(n) for n in example.shape), 0, builder.program.result, frozenset({number}))


def _value(builder: Builder, leaf: Any) -> Any:
    return builder.values[leaf] if isinstance(leaf, torch.fx.Node) else leaf


def _evaluate(builder: Builder, node: torch.fx.Node) -> Any:
    if node.target is operator.getitem:
        source, index = _value(builder, node.args[0]), node.args[1]
        if isinstance(source, Refused):
            return source
        part: Any = _independent(builder, node, {"0": source, "1": index})
        if isinstance(source, tuple):
            part = source[int(str(index))]
        return part if part is not None else builder.refuse(node, "an index jumps")
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return builder.refuse(node, "a region with its own autocast or grad mode, or a control-flow operator, no rule")
    # Another library's operation keeps its namespace: by its name alone it could be taken for one of torch.
    name = schema.name.removeprefix("aten::")
    arguments = arguments_of(node, lambda leaf: _value(builder, leaf))
    leaves = [leaf for leaf in pytree.tree_leaves(arguments, is_leaf=_is_value) if _is_value(leaf)]
    refused = [leaf for leaf in leaves if isinstance(leaf, Refused)]
    if name in ("embedding", "embedding_bag") and refused:
        return builder.refuse(node, REASONS[name])
    if name in _SHAPES_ONLY:
        return _filled(builder, node, arguments)
    dependent = [leaf for leaf in leaves if isinstance(leaf, Dependent)]
    if refused or len(dependent) > 1:
        written = _as_written(builder, node, next(iter(dependent), None))
        if written is not None:
            return written
    if refused:
        return _behind(builder, node, name, refused)
    if not dependent:
        if node.target is WHOLE_MODULE:
            return _inside(builder, node)
        if _is_random(node, arguments):
            return builder.refuse(node, "its value is random")
        return _independent(builder, node, arguments)
    like = dependent[0]
    try:
        return _by_rule(builder, node, name, arguments)
    except (RefusedError, UnsupportedLayerError) as error:
        reason = str(error)
    except UNREADABLE as error:
        reason = f"its arguments are not those that its rule reads: {type(error).__name__}: {error}"
        return builder.refuse(node, reason, like)
    return _as_written(builder, node, like) or builder.refuse(node, reason, like)


def _is_random(node: torch.fx.Node, arguments: dict[str, Any]) -> bool:
    """Whether an operation draws numbers: dropout, inside attention too, and rrelu do so in training only."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    is_off = arguments.get("train") is False or arguments.get("training") is False
    return not (is_off or arguments.get("dropout_p") == 0 or arguments.get("p") == 0)


def _as_written(builder: Builder, node: torch.fx.Node, like: Dependent | None) -> Dependent | Refused | None:
    """Return the value of a known function of one variable that is written out, refused if it is discontinuous."""
    try:
        return written_out(builder, node)
    except RefusedError as error:
        return builder.refuse(node, str(error), like)


def _by_rule(builder: Builder, node: torch.fx.Node, name: str, arguments: dict[str, Any]) -> Any:
    if name not in RULES:
        raise RefusedError(REASONS.get(name, UNKNOWN))
    if has_complex_rule(name, node, builder.values):
        known = {
            key: [leaf for leaf in pytree.tree_leaves(argument, is_leaf=_is_value) if not _is_complex(leaf)]
            for key, argument in arguments.items()
        }
        check_arguments(name, known)
        result = RULES[name](builder, node, arguments)
        return result if is_complex(node) else only_floating(node, result)
    check_arguments(name, arguments)
    check_real(node)
    if node.target is WHOLE_MODULE:
        check_whole_module(node, builder.traced)
    return only_floating(node, RULES[name](builder, node, arguments))


def _is_complex(leaf: Any) -> bool:
    return isinstance(leaf, Independent) and torch.as_tensor(leaf.compute()).is_complex()


def _behind(builder: Builder, node: torch.fx.Node, name: str, refused: Sequence[Refused]) -> Refused:
    """Return the value of an operation behind refused ones; if it would be refused by itself, that is told as well."""
    refusals = dict.fromkeys(refusal for value in refused for refusal in value.refusals)
    like = next((value.like for value in refused if value.like is not None), None)

    def stand_in(leaf: Any) -> Any:
        value = _value(builder, leaf)
        if not isinstance(value, Refused):
            return value
        known = value.stand_in(leaf.meta.get("val"))
        if known is None:
            # Where the samples lie behind a refused operation is a guess: what rests on it is not told.
            raise SampleAxisError
        return known

    with contextlib.suppress(SampleAxisError, *UNREADABLE):
        try:
            _by_rule(builder.scratch(), node, name, arguments_of(node, stand_in))
        except SampleAxisError:
            raise
        except (RefusedError, UnsupportedLayerError) as error:
            refusals.update(dict.fromkeys(builder.refuse(node, str(error)).refusals))
    return Refused(tuple(refusals), like)


def _inside(builder: Builder, node: torch.fx.Node) -> Any:
    """Return the output of a module traced as one node by its own operations: of one that thresholds a weight, say."""
    known = builder.values
    output = node.args[0]
    wanted, waiting = set(), [output]
    while waiting:
        source = waiting.pop()
        if isinstance(source, torch.fx.Node) and source not in wanted:
            wanted.add(source)
            waiting.extend(source.all_input_nodes)
    if any(source.name in builder.traced.written for source in wanted):
        return builder.refuse(node, "the forward pass changes a buffer that it reads")
    builder.live_nodes |= wanted
    for source in builder.traced.graph.nodes:
        if source in wanted and source not in known:
            known[source] = _evaluate(builder, source)
    return known[output]  # type: ignore[index]


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, (Dependent, Independent, Refused))


def _independent(builder: Builder, node: torch.fx.Node, arguments: dict[str, Any]) -> Any:
    """Return the value of an operation on tensors that do not depend on the input, computed anew when asked for."""
    leaves, spec = pytree.tree_flatten(arguments, is_leaf=_is_value)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Independent)]
    sources = tuple(leaves[i] for i in at)
    target: Any = node.target

    def operation(*present: Any) -> Any:
        filled = list(leaves)
        for i, value in zip(at, present, strict=True):
            filled[i] = value
        given = pytree.tree_unflatten(filled, spec)
        return target(*given.values()) if target is operator.getitem else target(**given)

    parameters = tuple({id(p): p for v in sources for p in v.parameters}.values())
    example = node.meta["val"]
    if operation_name(node) in _UNSET:
        if not example.is_floating_point():
            return builder.refuse(node, "its values are what the memory holds")
        # What is read of it shows: a sum, a scale or a weight that is NaN is refused.
        sources, operation = (
            (),
            partial(torch.full, example.shape, math.nan, dtype=example.dtype, device=example.device),
        )
    shape = tuple(int(n) for n in example.shape) if isinstance(example, Tensor) else ()
    described = tuple(leaf.identity if isinstance(leaf, Independent) else repr(leaf) for leaf in leaves)
    identity = builder.identity((str(target), str(spec), described))
    return Independent(shape, operation, identity, sources, parameters, any(v.live for v in sources))


def _filled(builder: Builder, node: torch.fx.Node, arguments: dict[str, Any]) -> Independent:
    """Return the value of an operation that takes only the shape of its argument."""
    first, *rest = arguments.items()
    # A refused argument has a shape as well.
    stand_in = torch.empty(
        shape_of(node.all_input_nodes[0]), dtype=node.meta["val"].dtype, device=node.meta["val"].device
    )
    target: Any = node.target
    own = {key: v for key, v in rest if not _is_value(v)}
    shape = tuple(int(n) for n in node.meta["val"].shape)
    return Independent(shape, lambda: target(**{first[0]: stand_in}, **own), builder.identity(node))
