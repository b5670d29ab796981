"""Recognise a plain chain of matrices and elementwise activations in a traced graph, for the tighter bounds on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_lip.constants.modules import (
    GELU,
    GELU_TANH,
    HARDSIGMOID,
    HARDSWISH,
    MISH,
    SELU,
    SIGMOID,
    SILU,
    SOFTMAX,
    SOFTPLUS_THRESHOLD,
    elu,
)
from lightning_lip.graph.tracing import RESHAPES, TracedModel, operation_name
from lightning_lip.rigorous.chain import Slopes


@dataclass(frozen=True)
class Chain:
    """``outer W_n R_{n-1} W_{n-1} ... R_1 W_1``.

    Attributes:
        weights: The matrices, in the order in which they are applied, n >= 2.
        slopes: The slopes of the n - 1 activations between them.
        outer: The Lipschitz constant of all that stands before the first and after the last matrix.
    """

    weights: tuple[Tensor, ...]
    slopes: tuple[Slopes, ...]
    outer: float


def chain_of(traced: TracedModel) -> Chain | None:
    """Return the chain that a traced model is, or None if it is anything else.

    Linear layers, activations with known slopes, dropout (the identity in eval mode) and reshapes that keep each
    sample's elements in their order make a chain; convolutions, normalisation, sums and branches do not.
    """
    nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
    if len(traced.inputs) != 1:
        return None
    current = next(node for node in traced.graph.nodes if node.name == traced.inputs[0])
    weights: list[Tensor] = []
    between: list[Slopes] = []
    inner: Slopes = (1.0, 1.0)
    outer = 1.0
    reshaped, token_wise = False, False
    for node in nodes:
        if len(current.users) != 1 or not node.args or node.args[0] is not current:
            return None
        name = operation_name(node)
        if name == "linear":
            weight = traced.tensor(node.args[1])
            if weight is None or weight.dim() != 2:
                return None
            if weights:
                between.append(inner)
            else:
                outer = max(abs(inner[0]), abs(inner[1]))
            weights.append(weight.detach())
            token_wise |= node.meta["val"].dim() != 2
            inner = (1.0, 1.0)
        elif name in RESHAPES:
            # The batch stays in front, so each sample keeps its elements, in their order.
            if node.meta["val"].shape[0] != current.meta["val"].shape[0]:
                return None
            reshaped |= bool(weights) and node.meta["val"].shape != current.meta["val"].shape
        else:
            slopes = _slopes(name, node, traced)
            if slopes is None:
                return None
            inner = _composed(inner, slopes)
        current = node
    # A matrix applied to each token is a chain of its own only as long as tokens stay apart.
    if len(weights) < 2 or (reshaped and token_wise) or not _is_output(traced, current):
        return None
    return Chain(tuple(weights), tuple(between), math.nextafter(outer * max(abs(inner[0]), abs(inner[1])), math.inf))


_FIXED: dict[str, Slopes] = {
    "clone": (1.0, 1.0),
    "alias": (1.0, 1.0),
    "relu": (0.0, 1.0),
    "relu6": (0.0, 1.0),
    "hardtanh": (0.0, 1.0),
    "tanh": (0.0, 1.0),
    "log_sigmoid": (0.0, 1.0),
    "celu": (0.0, 1.0),
    "sigmoid": (0.0, SIGMOID),
    "hardsigmoid": (0.0, HARDSIGMOID),
    "selu": (0.0, SELU),
    # f(x) - f(-x) = x, so that f'(x) + f'(-x) = 1; the difference is exact in floating point.
    "silu": (1 - SILU, SILU),
    "hardswish": (1 - HARDSWISH, HARDSWISH),
    "mish": (-MISH, MISH),
}


def _slopes(name: str, node: torch.fx.Node, traced: TracedModel) -> Slopes | None:
    """Return the slopes of an activation as it is called, or None if they are not known."""
    arguments: Sequence[Any] = node.args[1:]
    if name == "celu":
        return _FIXED[name] if (arguments[0] if arguments else 1.0) > 0 else None
    if name in _FIXED:
        return _FIXED[name]
    if name == "dropout":
        return None if arguments[1] else (1.0, 1.0)
    if name == "gelu":
        largest = GELU if node.kwargs.get("approximate", "none") == "none" else GELU_TANH
        return (1 - largest, largest)
    if name == "leaky_relu":
        slope = float(arguments[0]) if arguments else 0.01
        return (min(1.0, slope), max(1.0, slope))
    if name == "prelu":
        weight = traced.tensor(arguments[0])
        if weight is None or not bool(weight.isfinite().all()):
            return None
        return (min(1.0, weight.min().item()), max(1.0, weight.max().item()))
    if name == "elu":
        alpha, scale, input_scale = [*arguments, *[1.0] * 3][:3]
        known = alpha >= 0 and scale >= 0 and input_scale > 0
        return (0.0, elu(alpha, scale, input_scale)) if known else None
    if name == "softplus":
        threshold = arguments[1] if len(arguments) > 1 else 20.0
        return (0.0, 1.0) if threshold >= SOFTPLUS_THRESHOLD else None
    if name == "threshold":
        return (0.0, 1.0) if arguments[0] == arguments[1] else None
    if name == "softmax":
        # Not elementwise, but c = 0 then: any map of this constant may stand in the chain.
        return (-SOFTMAX, SOFTMAX)
    return None


def _composed(first: Slopes, second: Slopes) -> Slopes:
    """Return the slopes of two activations in a row, rounded outwards."""
    if first == (1.0, 1.0) or second == (1.0, 1.0):
        return second if first == (1.0, 1.0) else first
    products = [a * b for a, b in product(first, second)]
    # 0 stays 0: ECLipsE-Fast needs to know that no slope is negative.
    low, high = min(products), max(products)
    return (math.nextafter(low, -math.inf) if low else 0.0, math.nextafter(high, math.inf) if high else 0.0)


def _is_output(traced: TracedModel, node: torch.fx.Node) -> bool:
    """Whether the node is the model's only output, a single tensor."""
    output = next(n for n in traced.graph.nodes if n.op == "output")
    return len(node.users) == 1 and list(output.args[0]) == [node]
