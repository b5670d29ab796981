"""What values lie between, whatever the input: a product of bounded functions is Lipschitz.

By interval arithmetic over the graph, rounded outwards. Parameters and buffers can change, so what they enter has no
range, but for functions that are bounded whatever their argument.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lightning_lip.graph.builder import Builder, Independent, arguments_of
from lightning_lip.graph.rules.fourier import is_complex
from lightning_lip.graph.rules.shape import MOVES, PADS, SAME
from lightning_lip.graph.tracing import operation_name
from lightning_lip.rigorous.evaluation import evaluated
from lightning_lip.rigorous.rounding import EVERYTHING, Interval, exactly, exp_up, up

DEPTH = 200
"""How many operations back a range is looked for."""

_UNIT = Interval(0.0, 1.0)
_SIGNED = Interval(-1.0, 1.0)
_QUARTER_TURN = up(math.pi / 2)

BOUNDED = {
    "sigmoid": _UNIT,
    "hardsigmoid": _UNIT,
    "softmax": _UNIT,
    "_softmax": _UNIT,
    "tanh": _SIGNED,
    "sin": _SIGNED,
    "cos": _SIGNED,
    "erf": _SIGNED,
    "relu6": Interval(0.0, 6.0),
    "atan": Interval(-_QUARTER_TURN, _QUARTER_TURN),
    "arctan": Interval(-_QUARTER_TURN, _QUARTER_TURN),
    "rnn_tanh_cell": _SIGNED,
    "log_sigmoid": Interval(-math.inf, 0.0),
    "log_softmax": Interval(-math.inf, 0.0),
    "_log_softmax": Interval(-math.inf, 0.0),
    "linalg_vector_norm": Interval(0.0, math.inf),
    "norm": Interval(0.0, math.inf),
    "frobenius_norm": Interval(0.0, math.inf),
    "cdist": Interval(0.0, math.inf),
    "std": Interval(0.0, math.inf),
}
"""Where the values of a function lie whatever its argument."""

_HULLS = {
    *SAME, *MOVES, "cat", "concat", "concatenate", "stack", "where", "maximum", "minimum", "max", "min", "amax",
    "amin", "mean", "dropout", "feature_dropout", "native_dropout", "sort", "msort", "topk", "median", "kthvalue",
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
}  # fmt: skip
"""Operations whose values are some of those of their tensors, zero, or between them."""


def range_of(builder: Builder, node: object, depth: int = 0) -> Interval:
    """Return an interval in which all values of a node lie, for all inputs; everything where none is known.

    Args:
        builder: Has the values of the nodes before it; it keeps what is found.
        node: A node, or a number.
        depth: How many operations back from the one that is asked for.
    """
    if isinstance(node, (bool, int, float)):
        return EVERYTHING if math.isnan(node) else exactly(node)
    if not isinstance(node, torch.fx.Node) or depth > DEPTH:
        return EVERYTHING
    if is_complex(node):
        return EVERYTHING
    if node not in builder.ranges:
        value = builder.values.get(node)
        builder.ranges[node] = _stored(value) if isinstance(value, Independent) else _read(builder, node, depth)
    return builder.ranges[node]


def _read(builder: Builder, node: torch.fx.Node, depth: int) -> Interval:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function":
        return EVERYTHING
    if schema is None:
        whole, index = node.args[:2]
        if not isinstance(whole, torch.fx.Node):
            return EVERYTHING
        if operation_name(whole) == "lstm_cell":
            return _lstm_state(builder, whole, index, depth)
        # A part of what an operation returns: of each the first is of its kind, and of those that split all are.
        is_part = node.target is operator.getitem and (index == 0 or operation_name(whole) in MOVES)
        return range_of(builder, whole, depth + 1) if is_part else EVERYTHING
    name = str(schema.name).removeprefix("aten::")
    a = arguments_of(node, lambda leaf: leaf)
    if name in _READ:
        return _READ[name](lambda key: range_of(builder, a[key], depth + 1), a)
    if name in BOUNDED:
        return BOUNDED[name]
    if name not in _HULLS and name not in PADS:
        return EVERYTHING
    keys = ("tensors",) if "tensors" in a else ("self", "other") if name in _PAIRS else ("self", "input")
    found = [
        range_of(builder, leaf, depth + 1)
        for leaf in pytree.tree_leaves([a[k] for k in keys if k in a])
        if leaf is not None
    ]
    if name in PADS or name in ("im2col", "tril", "triu"):
        found.append(range_of(builder, a.get("value") or 0.0))
    return functools.reduce(operator.or_, found)


def _lstm_state(builder: Builder, source: torch.fx.Node, index: object, depth: int) -> Interval:
    """Return where h lies, or c, which a step moves by at most 1."""
    if index == 0:
        return _SIGNED
    before = range_of(builder, arguments_of(source, lambda leaf: leaf)["hx"][1], depth + 1).magnitude
    return (Interval(-before, before) + _SIGNED) if math.isfinite(before) else EVERYTHING


_PAIRS = ("where", "maximum", "minimum", "max", "min")


def _stored(value: Independent) -> Interval:
    """Return the range of a tensor that does not change."""
    if value.live:
        return EVERYTHING
    entries = evaluated(lambda: torch.as_tensor(value.compute()))
    if entries.value.numel() == 0 or bool(entries.value.isnan().any()):
        return EVERYTHING
    error = 0.0 if entries.error is None else float(entries.error.max())
    return Interval(float(entries.value.min()), float(entries.value.max())) + Interval(-error, error)


Of = Callable[[str], Interval]


def _sum(of: Of, a: dict[str, Any]) -> Interval:
    return of("self") + of("other") * exactly(a.get("alpha", 1))


def _difference(of: Of, a: dict[str, Any]) -> Interval:
    return of("self") - of("other") * exactly(a.get("alpha", 1))


def _reversed_difference(of: Of, a: dict[str, Any]) -> Interval:
    return of("other") - of("self") * exactly(a.get("alpha", 1))


def reciprocal_range(interval: Interval) -> Interval:
    """Return where 1 / x lies for x in an interval; everything if that holds zero."""
    if interval.low <= 0 <= interval.high:
        return EVERYTHING
    ends = sorted(1 / end for end in (interval.low, interval.high))
    return Interval(math.nextafter(ends[0], -math.inf), math.nextafter(ends[1], math.inf))


def _quotient(of: Of, a: dict[str, Any]) -> Interval:
    return EVERYTHING if a.get("rounding_mode") is not None else of("self") * reciprocal_range(of("other"))


def _absolute(interval: Interval) -> Interval:
    low = max(interval.low, -interval.high, 0.0)
    return Interval(low, interval.magnitude)


def _clamp(of: Of, a: dict[str, Any]) -> Interval:
    lows = of("min") if a.get("min") is not None else Interval(-math.inf, -math.inf)
    highs = of("max") if a.get("max") is not None else Interval(math.inf, math.inf)
    x = of("self")
    low, high = (max(x.low, lows.low), max(x.high, lows.high))
    return Interval(min(low, highs.low), min(high, highs.high))


def _power(of: Of, a: dict[str, Any]) -> Interval:
    x = of("self")
    if a["exponent"] == 2:
        size = _absolute(x)
        low = max(0.0, math.nextafter(size.low * size.low, 0.0))
        return Interval(low, up(size.high * size.high))
    return EVERYTHING


def _exponential(of: Of, a: dict[str, Any]) -> Interval:
    x = of("self")
    low = exp_up(x.low) * (1 - 2e-15)
    return Interval(low if low > 1e-300 else 0.0, exp_up(x.high))


def _square_root(of: Of, a: dict[str, Any]) -> Interval:
    x = of("self")
    if x.low < 0:
        return Interval(0.0, math.inf)
    return Interval(max(0.0, math.nextafter(math.sqrt(x.low), 0.0)), up(math.sqrt(x.high)))


_READ: dict[str, Callable[[Of, dict[str, Any]], Interval]] = {
    "add": _sum,
    "sub": _difference,
    "subtract": _difference,
    "rsub": _reversed_difference,
    "mul": lambda of, a: of("self") * of("other"),
    "multiply": lambda of, a: of("self") * of("other"),
    "div": _quotient,
    "divide": _quotient,
    "true_divide": _quotient,
    "neg": lambda of, a: -of("self"),
    "abs": lambda of, a: _absolute(of("self")),
    "relu": lambda of, a: of("self").clamped(0.0, math.inf),
    "hardtanh": lambda of, a: of("self").clamped(a["min_val"], a["max_val"]),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "square": lambda of, a: _power(of, {"exponent": 2}),
    "pow": _power,
    "exp": _exponential,
    # log(1 + e^(beta x)) / beta.
    "softplus": lambda of, a: Interval(0.0, math.inf) if a["beta"] > 0 else Interval(-math.inf, 0.0),
    # A convex combination of the state and a tanh.
    "gru_cell": lambda of, a: of("hx") | _SIGNED,
    "sqrt": _square_root,
}
"""How each range follows from those of the arguments."""
