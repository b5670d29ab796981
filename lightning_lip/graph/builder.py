"""What the rules over a traced graph use: values, how they combine, and refusals that name the operation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_lip.graph.program import BoundProgram, Combination, Term
from lightning_lip.graph.refusals import Refusal
from lightning_lip.graph.tracing import Sizes, TracedModel, module_path
from lightning_lip.graph.whole_modules import WHOLE_MODULE
from lightning_lip.models.inputs import BATCH
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.symbol import Convolutions
from lightning_lip.rigorous.rounding import Interval, sqrt_up


@dataclass(frozen=True)
class Dependent:
    """A tensor that depends on the network's input.

    Attributes:
        shape: Its shape, with the batch of two.
        axis: The dimension that holds the samples, one after the other; its size is a multiple of two. None where the
            whole input is one sample: then nothing can mix samples.
        term: The logarithm of its Lipschitz constant with respect to the network's input: Euclidean norms over all
            elements of a sample, of all inputs together.
        inputs: Indices of the network's inputs that it depends on.
        pending: An operator that the next node will take over (a layer before its batch normalisation).
    """

    shape: tuple[int, ...]
    axis: int | None
    term: Term
    inputs: frozenset[int]
    pending: tuple[Hashable, LinearOperator] | None = None

    @property
    def has_batch_first(self) -> bool:
        """Whether the samples, if there are several, lie along the first dimension."""
        return self.axis in (0, None)

    def axis_after(self, places: int) -> int | None:
        """Return the dimension of the samples once it has moved by so many places."""
        return None if self.axis is None else self.axis + places


@dataclass(frozen=True)
class Independent:
    """A tensor that does not depend on the network's input: a parameter, a buffer, or computed from those.

    Attributes:
        shape: Its shape; () if it is no tensor.
        operation: Reads it, or computes it from the values of `sources`, differentiable in the parameters.
        identity: The same number for every value of the same operations on the same stored tensors.
        sources: What it is computed from.
        parameters: The parameters it is computed from.
        live: Whether its value can change: False if no parameter or buffer enters.
        owner: For a stored tensor: its module, the module's name, the key.
    """

    shape: tuple[int, ...]
    operation: Callable[..., Any]
    identity: int
    sources: tuple[Independent, ...] = ()
    parameters: tuple[nn.Parameter, ...] = ()
    live: bool = False
    owner: tuple[nn.Module, str, str] | None = None

    def compute(self) -> Any:
        """Return the present value, by the graph's own operations, each done once."""
        known: dict[int, Any] = {}
        waiting = [self]
        while waiting:
            value = waiting[-1]
            unknown = [source for source in value.sources if id(source) not in known]
            waiting.extend(unknown)
            if not unknown:
                known[id(waiting.pop())] = value.operation(*(known[id(source)] for source in value.sources))
        return known[id(self)]


@dataclass(frozen=True)
class Refused:
    """A value behind a refused operation; it matters only if the output depends on it.

    Attributes:
        refusals: The operations without a known constant that it depends on.
        like: A value that it was computed from, for where the samples may lie: what follows is looked at too.
    """

    refusals: tuple[Refusal, ...]
    like: Dependent | None = None

    def stand_in(self, example: object) -> Dependent | None:
        """Return what stands for this value of an example's shape where later operations are looked at, if known."""
        if self.like is None or not is_real(example):
            return None
        shape, axis = tuple(example.shape), self.like.axis
        if axis is not None and (axis >= len(shape) or shape[axis] != self.like.shape[axis]):
            return None
        return Dependent(shape, axis, self.like.term, self.like.inputs)


Rule = Callable[["Builder", torch.fx.Node, dict[str, Any]], Any]
"""``rule(builder, node, arguments by their schema's names) -> value``, or a tuple of values."""

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations, named without overload; those of aten without their namespace.

    Raises:
        ValueError: If an operation has a rule already: which of the two served would depend on the order of imports.
    """

    def register(function: Rule) -> Rule:
        twice = sorted(set(names) & set(RULES))
        if twice:
            raise ValueError(f"Expected one rule for each operation, got a second one for {twice}.")
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class RefusedError(Exception):
    """Raised by rules: this operation has no known constant; the message is the reason."""


class SampleAxisError(RefusedError):
    """Raised by rules: this operation takes the axis of the samples for something else."""

    def __init__(self, reason: str = "it mixes the samples of a batch") -> None:
        super().__init__(reason)


@dataclass(frozen=True)
class GraphNode:
    """One operation of the graph in the audit.

    Attributes:
        path: The path of the module whose forward holds it; empty for the model itself.
        operation: The operation's name.
        rule: How its constant combines with those before it.
        constant: The constant; for ``"operator"`` the fixed factor beside the operator's norm.
        operator: The name of the operator whose norm is a factor, or None.
    """

    path: str
    operation: str
    rule: str
    constant: float
    operator: str | None = None


class Builder:
    """Builds the program and the operators while the graph is walked."""

    def __init__(self, traced: TracedModel, convolutions: Convolutions = "spatial") -> None:
        self.traced = traced
        self.convolutions = convolutions
        self.program = BoundProgram()
        self.operators: list[LinearOperator] = []
        self.report: dict[torch.fx.Node, GraphNode] = {}
        self.values: dict[torch.fx.Node, Any] = {}
        self.ranges: dict[torch.fx.Node, Interval] = {}
        self.live_nodes: set[torch.fx.Node] = set()
        self._keys: dict[Hashable, int] = {}
        self._identities: dict[Hashable, int] = {}
        self.sizes = Sizes()

    def scratch(self) -> Builder:
        """Return a builder of the same values, whose operators and audit do not count."""
        other = Builder(self.traced, self.convolutions)
        other.values, other.live_nodes, other.ranges = self.values, self.live_nodes, self.ranges
        other.sizes = self.sizes
        return other

    def identity(self, what: Hashable) -> int:
        """Return the number that stands for what tells a value from all others."""
        return self._identities.setdefault(what, len(self._identities))

    def known_sizes(self, example: Tensor) -> tuple[int, ...]:
        """Return the shape of a traced tensor.

        Raises:
            RefusedError: If it is not known.
        """
        shape = self.sizes.of(example)
        if shape is None:
            raise RefusedError("the size of its result depends on the values of a tensor, which may be any")
        return shape

    def operator(self, key: Hashable, operator: LinearOperator) -> int:
        """Return the operator's index; a weight that is used again counts one more time."""
        if key in self._keys:
            index = self._keys[key]
            self.operators[index].multiplicity += 1
            return index
        names = {op.name for op in self.operators}
        # One weight at two input sizes, or scaled in two ways, is two operators, and names are keys of saved vectors.
        if operator.name in names:
            operator.name += "@" + "x".join(str(n) for n in operator.domain_shape)
        if operator.name in names:
            operator.name = next(name for i in itertools.count(2) if (name := f"{operator.name}#{i}") not in names)
        self._keys[key] = len(self.operators)
        self.operators.append(operator)
        return self._keys[key]

    def module_of(self, node: torch.fx.Node) -> tuple[str, nn.Module]:
        """Return the name and the module whose forward holds the operation."""
        path = module_path(node)
        module = self.traced.model
        for part in path.split(".") if path else []:
            child = module._modules.get(part)
            if child is None:
                break
            module = child
            # A wrapper inside the model does not show in paths.
            while "_orig_mod" in module._modules and isinstance(module._modules["_orig_mod"], nn.Module):
                module = module._modules["_orig_mod"]
        return self.traced.names.get(id(module), path), module

    def refuse(self, node: torch.fx.Node, reason: str, like: Dependent | None = None) -> Refused:
        """Return a refused value that names the operation and its module; `like` is one of the values it takes."""
        path, module = self.module_of(node)
        return Refused((Refusal(path, type(module).__name__, str(node.target), reason),), like)

    def note(self, node: torch.fx.Node, how: str, constant: float = 1.0, operator: str | None = None) -> None:
        """Enter a node in the audit."""
        self.report[node] = GraphNode(self.module_of(node)[0], str(node.target), how, constant, operator)

    def chain(
        self,
        node: torch.fx.Node,
        value: Dependent,
        constant: float = 1.0,
        *,
        how: str = "constant",
        operator: int | None = None,
        live: Callable[[], float] | None = None,
        shape: Sequence[int] | None = None,
        axis: int | None = None,
    ) -> Dependent:
        """Return the value of an operation with a constant, an operator or a live constant after `value`."""
        name = None if operator is None else self.operators[operator].name
        value_now = constant if live is None else constant * live()
        _check_finite(value_now)
        self.note(node, "operator" if name is not None else how, value_now, name)
        term = value.term.times(
            constant,
            () if operator is None else (operator,),
            () if live is None else (self.program.live(live),),
        )
        new_shape = shape_of(node) if shape is None else tuple(shape)
        new_axis = value.axis if axis is None else axis
        if value.axis is None:
            new_axis = None
        elif new_axis is None or new_axis >= len(new_shape) or new_shape[new_axis] % BATCH:
            raise SampleAxisError
        return Dependent(new_shape, new_axis, term, value.inputs)

    def combine(self, kind: Combination, values: Sequence[Dependent], constants: Sequence[float] = ()) -> Term:
        """Return the term of branches that are added ("sum") or placed side by side ("norm"), each times a constant.

        Branches of separate inputs are independent of each other: their sum is at most the root sum of squares
        (Cauchy-Schwarz), side by side the maximum counts. Branches are grouped by the inputs they share.
        """
        factors = constants or [1.0] * len(values)
        _check_finite(*factors)
        terms = [v.term.times(c) for v, c in zip(values, factors, strict=True)]
        groups: list[tuple[frozenset[int], list[Term]]] = []
        for v, term in zip(values, terms, strict=True):
            touching = [g for g in groups if g[0] & v.inputs]
            groups = [g for g in groups if not g[0] & v.inputs]
            joined = frozenset(v.inputs).union(*(g[0] for g in touching))
            groups.append((joined, [t for g in touching for t in g[1]] + [term]))
        within = [self.program.combine(kind, members) for _, members in groups]
        return self.program.combine("norm" if kind == "sum" else "max", within)

    def join(
        self,
        node: torch.fx.Node,
        kind: Combination,
        values: Sequence[Dependent],
        scales: Sequence[float],
        axes: Sequence[int | None],
    ) -> Dependent:
        """Return the value of an operation on several branches, whose samples lie along `axes` of its result."""
        if len(set(axes)) != 1 or len({v.shape[v.axis] for v in values if v.axis is not None}) > 1:
            raise SampleAxisError
        self.note(node, "sum of the branches" if kind == "sum" else "branches side by side")
        inputs = frozenset().union(*(v.inputs for v in values))
        return Dependent(shape_of(node), axes[0], self.combine(kind, values, scales), inputs)


def _check_finite(*constants: float) -> None:
    """Refuse NaN, which no comparison finds, and infinity.

    Raises:
        RefusedError: If a constant is not finite.
    """
    for constant in constants:
        if not math.isfinite(constant):
            raise RefusedError(f"its constant is {constant}")


def arguments_of(node: torch.fx.Node, value: Callable[[Any], Any]) -> dict[str, Any]:
    """Return an operation's arguments by the names of its schema, each node replaced by its value."""
    arguments: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if position >= len(node.args) and argument.name not in node.kwargs:
            given = argument.default_value if argument.has_default_value() else None
        # What a module traced as one node computes inside has no values; of what it stores the rule wants the nodes.
        if node.target is WHOLE_MODULE and argument.name in ("output", "stored"):
            arguments[argument.name] = given
        else:
            arguments[argument.name] = pytree.tree_map(value, given)
    return arguments


def is_real(example: object) -> TypeGuard[Tensor]:
    """Whether an example is a tensor of floating-point numbers whose shape does not depend on values."""
    return is_sized(example) and example.is_floating_point()


def is_sized(example: object) -> TypeGuard[Tensor]:
    """Whether an example is a tensor whose shape does not depend on values."""
    return isinstance(example, Tensor) and all(isinstance(n, int) for n in example.shape)


def shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor, or of the first of its tensors.

    Raises:
        RefusedError: If it is not known.
    """
    shape: tuple[int, ...] | None = node.meta["sizes"]
    if shape is None:
        raise RefusedError("the size of its result depends on the values of a tensor, which may be any")
    return shape


def dimensions(value: Dependent, dims: Any) -> list[int]:
    """Return dimensions as non-negative numbers; None and an empty list mean all.

    Raises:
        RefusedError: If the samples of the batch lie along one of them.
    """
    rank = len(value.shape)
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        chosen = list(range(rank))
    else:
        chosen = [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    if value.axis in chosen:
        raise SampleAxisError
    return chosen


def size_along(value: Dependent, dims: Sequence[int]) -> int:
    """Return the number of elements along dimensions."""
    return math.prod(value.shape[d] for d in dims)


def only_input(arguments: dict[str, Any], *allowed: str) -> Dependent:
    """Return the first argument, a dependent tensor.

    Raises:
        RefusedError: If another argument (a weight, an index, a mask) depends on the network's input too.
    """
    names = list(arguments)
    first = arguments[names[0]]
    for name in names[1:]:
        if isinstance(arguments[name], Dependent) and name not in allowed:
            raise RefusedError(f"its argument `{name}` depends on the network's input")
    if not isinstance(first, Dependent):
        raise RefusedError("it is nonlinear in an argument that depends on the network's input")
    return first


def broadcast(node: torch.fx.Node, value: Dependent) -> tuple[float, int | None]:
    """Return the constant and the sample axis of `value` once it is broadcast to the shape of `node`."""
    shape = shape_of(node)
    axis = value.axis_after(len(shape) - len(value.shape))
    if axis is not None and value.axis is not None and shape[axis] != value.shape[value.axis]:
        raise SampleAxisError
    copies = math.prod(shape) // max(1, math.prod(value.shape))
    return (sqrt_up(copies) if copies > 1 else 1.0), axis
