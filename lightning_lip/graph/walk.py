"""The walk over a traced graph: each operation gets its value by its rule, or is refused with a reason."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lightning_lip.graph.rules  # noqa: F401  (it registers every rule)
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import (
    RULES,
    Builder,
    Dependent,
    Independent,
    Refused,
    RefusedError,
    SampleAxisError,
    arguments_of,
    shape_of,
)
from lightning_lip.graph.checks import UNREADABLE, check_arguments, check_real, check_whole_module, only_floating
from lightning_lip.graph.refusals import REASONS, UNKNOWN, Refusal
from lightning_lip.graph.rules.fourier import has_complex_rule, is_complex
from lightning_lip.graph.rules.written_out import written_out
from lightning_lip.graph.tracing import TracedModel, extreme_of_two, operation_name
from lightning_lip.graph.whole_modules import WHOLE_MODULE

_UNSET = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
"""Operations whose values are what the memory holds."""

_SHAPES_ONLY = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_SHAPED_BY_OTHER = {"expand_as", "view_as", "reshape_as"}


def walk_graph(builder: Builder, traced: TracedModel) -> list[Any]:
    """Give every operation that the output needs a value; return the outputs' values."""
    builder.live_nodes = _live_nodes(traced.graph)
    numbers = itertools.count()
    returned: list[Any] = []
    for node in traced.graph.nodes:
        builder.sizes.note(node)
        if node.op == "placeholder":
            number = None if node.name in traced.stored else next(numbers)
            builder.values[node] = _placeholder(builder, node, number)
        elif node.op == "output":
            leaves = [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, torch.fx.Node)]
            returned = [_real(builder, leaf) for leaf in leaves if leaf.name in traced.outputs]
        elif node in builder.live_nodes:
            try:
                builder.values[node] = _evaluate(builder, node)
            except RefusedError as error:
                builder.values[node] = builder.refuse(node, str(error))
            # A size that a stored tensor's values decide is known only now.
            builder.sizes.note(node)
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
    return Dependent(tuple(example.shape), traced.batch_dim, builder.program.result, frozenset({number}))


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
    if isinstance(node.meta.get("val"), torch.SymInt):
        size = builder.sizes.number(node.meta["val"])
        return builder.refuse(node, "it is a size that depends on values") if size is None else size
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return builder.refuse(node, "a region with its own autocast or grad mode, or a control-flow operator, no rule")
    # Another library's operation keeps its namespace: by its name alone it could be taken for one of torch.
    name = schema.name.removeprefix("aten::")
    arguments = arguments_of(node, lambda leaf: _value(builder, leaf))
    extreme = extreme_of_two(node) if name == "where" else None
    if extreme is not None:  # what decides between them has no part in it
        name, arguments = (
            extreme[0],
            {key: _value(builder, n) for key, n in zip(("self", "other"), extreme[1], strict=True)},
        )
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
    if name in _SHAPED_BY_OTHER and isinstance(arguments["self"], Independent):
        # Only its shape matters, by which a tensor of no values is told apart.
        shaped_by = torch.empty(arguments["other"].shape, device="meta")
        return _independent(builder, node, arguments | {"other": shaped_by})
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
    result = only_floating(node, RULES[name](builder, node, arguments))
    if isinstance(result, Dependent):
        builder.sizes.learn(node.meta["val"], result.shape)
    return result


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
    described = tuple(leaf.identity if isinstance(leaf, Independent) else repr(leaf) for leaf in leaves)
    identity = builder.identity((str(target), str(spec), described))
    value = Independent((), operation, identity, sources, parameters, any(v.live for v in sources))
    if not isinstance(example, Tensor):
        return value
    if builder.sizes.of(example) is None:
        builder.sizes.learn(example, value.compute().shape)
    return replace(value, shape=builder.known_sizes(example))


def _filled(builder: Builder, node: torch.fx.Node, arguments: dict[str, Any]) -> Independent:
    """Return the value of an operation that takes only the shape of its argument."""
    first, *rest = arguments.items()
    # A refused argument has a shape as well.
    given, made = node.all_input_nodes[0], node.meta["val"]
    stand_in = torch.empty(shape_of(given), dtype=made.dtype, device=made.device)
    target: Any = node.target
    own = {key: v for key, v in rest if not _is_value(v)}
    return Independent(shape_of(node), lambda: target(**{first[0]: stand_in}, **own), builder.identity(node))
