"""What holds for every operation on the network's input, whatever its rule: real, floating-point, finite values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_lip.graph.builder import Dependent, Independent, Refused, RefusedError
from lightning_lip.graph.tracing import TracedModel

UNREADABLE = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError)
"""What a rule raises where an argument is of another kind than it reads: a tensor for a number, say."""

TAKE_INFINITY = frozenset(
    {"add", "sub", "subtract", "rsub", "where", "masked_fill", "maximum", "minimum", "clamp", "clamp_min", "clamp_max"}
    | {"clip", "max", "min"}
)
"""Operations that an infinite tensor may enter, such as an attention mask: the others would make it NaN."""


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Check the numbers and the stored or computed tensors among an operation's arguments.

    Raises:
        RefusedError: If one is complex, NaN, or infinite where that has no place.
    """
    for key, argument in arguments.items():
        for leaf in pytree.tree_leaves(argument, is_leaf=lambda v: isinstance(v, (Dependent, Independent, Refused))):
            if isinstance(leaf, complex):
                raise RefusedError(f"its argument `{key}` is complex: bounds are for real numbers")
            # A rule that compares would miss it: max(1, NaN) is 1.
            if isinstance(leaf, float) and math.isnan(leaf):
                raise RefusedError(f"its argument `{key}` is NaN")
            # A layer's own weight is looked at whenever its norm is certified; a running training may lose it.
            if isinstance(leaf, Independent) and not (key == "weight" and name.startswith(("linear", "conv"))):
                _check_tensor(name, key, leaf)


def _check_tensor(name: str, key: str, argument: Independent) -> None:
    tensor = argument.compute()
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return
    of = "" if argument.owner is None else f", {'.'.join(filter(None, argument.owner[1:]))},"
    if tensor.is_complex():
        raise RefusedError(f"its argument `{key}`{of} is complex: bounds are for real numbers")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return
    if name not in TAKE_INFINITY or bool(tensor.isnan().any()):
        raise RefusedError(f"its argument `{key}`{of} is not finite: it holds NaN or an infinity")


def check_real(node: torch.fx.Node) -> None:
    """Refuse an operation on the network's input with a complex result.

    Raises:
        RefusedError: If a result is complex.
    """
    for value in pytree.tree_leaves(node.meta["val"]):
        if isinstance(value, Tensor) and value.is_complex():
            raise RefusedError("its value is complex: bounds are for real numbers")


def check_whole_module(node: torch.fx.Node, traced: TracedModel) -> None:
    """Check that a module traced as one node is a map of what it is given: its constant is stated for that.

    Raises:
        RefusedError: If it writes into its arguments, or reads a value of the network's input that is none of them.
    """
    output, inputs, _, index = node.args
    if traced.modules[int(str(index))].writes:
        raise RefusedError("a module with a stated constant writes into its input: let it work on a copy")
    waiting, seen = [output], set(inputs)  # type: ignore[arg-type]
    while waiting:
        source = waiting.pop()
        if source in seen or not isinstance(source, torch.fx.Node):
            continue
        seen.add(source)
        if source.op == "placeholder" and source.name in traced.inputs:
            raise RefusedError(
                "a module with a stated constant reads a value of the network's input that it is not given as an "
                "argument"
            )
        waiting.extend(source.all_input_nodes)


def only_floating(node: torch.fx.Node, result: Any) -> Any:
    """Return a rule's result, if all of it that depends on the network's input is floating point.

    Raises:
        RefusedError: If a tensor of integers or booleans does: it jumps.
    """
    values, examples = (r if isinstance(r, (tuple, list)) else (r,) for r in (result, node.meta["val"]))
    # Some operations return statistics that a rule leaves out.
    for value, example in zip(values, examples, strict=False):
        if isinstance(value, Dependent) and isinstance(example, Tensor) and not example.is_floating_point():
            raise RefusedError(f"a conversion to {example.dtype} is a step function")
    return result
