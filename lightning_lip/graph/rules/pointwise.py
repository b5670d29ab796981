"""Rules of activations, normalisations, softmax, sums and the modules that are traced as one node."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lightning_lip.constants import modules as constants
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    Independent,
    RefusedError,
    broadcast,
    dimensions,
    only_input,
    rule,
    shape_of,
    size_along,
)
from lightning_lip.graph.rules.linear import batch_normalised, diagonal, scale
from lightning_lip.rigorous.rounding import sqrt_up

# The overloads themselves: a name alone would take log_sigmoid for a sigmoid, and a rounded quotient for a quotient.
_PRODUCTS = {torch.ops.aten.mul.Tensor, torch.ops.aten.multiply.Tensor}
_QUOTIENTS = {torch.ops.aten.div.Tensor, torch.ops.aten.divide.Tensor, torch.ops.aten.true_divide.Tensor}
_DIFFERENCES = {torch.ops.aten.sub.Tensor, torch.ops.aten.subtract.Tensor, torch.ops.aten.rsub.Tensor}

_CONSTANTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "sigmoid": lambda a: constants.SIGMOID,
    "hardsigmoid": lambda a: constants.HARDSIGMOID,
    "hardswish": lambda a: constants.HARDSWISH,
    "silu": lambda a: constants.SILU,
    "mish": lambda a: constants.MISH,
    "selu": lambda a: constants.SELU,
    "gelu": lambda a: constants.GELU if a["approximate"] == "none" else constants.GELU_TANH,
    "erf": lambda a: constants.ERF,
    "elu": lambda a: constants.elu(a["alpha"], a["scale"], a["input_scale"]),
    "celu": lambda a: constants.celu(a["alpha"]),
    "leaky_relu": lambda a: constants.leaky_relu(a["negative_slope"]),
    "rrelu": lambda a: _rrelu(a),
    "softplus": lambda a: constants.softplus(a["threshold"]),
    "softshrink": lambda a: constants.shrink(a["lambd"]),
    "threshold": lambda a: constants.threshold(a["threshold"], a["value"]),
}
for _name in (
    "relu", "relu6", "tanh", "log_sigmoid", "log_sigmoid_forward", "hardtanh", "abs", "neg", "sin", "cos",
    "atan", "arctan", "asinh", "arcsinh", "clamp", "clamp_min", "clamp_max", "clip", "positive",
):  # fmt: skip
    _CONSTANTS[_name] = lambda a: 1.0


def _rrelu(a: dict[str, Any]) -> float:
    if a["training"]:
        raise RefusedError("rrelu stays in training in eval mode: the network is then random")
    return constants.leaky_relu((a["lower"] + a["upper"]) / 2)


@rule(*_CONSTANTS)
def _pointwise(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    name = node.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
    if name == "log_sigmoid_forward":
        return (builder.chain(node, value, shape=value.shape), None)
    copies, axis = broadcast(node, value)
    return builder.chain(node, value, _CONSTANTS[name](a) * copies, axis=axis)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
def _dropout(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    if a["train"]:
        raise RefusedError("dropout stays on in eval mode: the network is then random")
    return builder.chain(node, only_input(a))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    value = only_input(a)
    size = size_along(value, dimensions(value, a["dim"]))
    logarithm = "log" in str(node.target)
    return builder.chain(node, value, constants.log_softmax(size) if logarithm else constants.SOFTMAX)


@rule("layer_norm", "rms_norm", "group_norm", "instance_norm", "native_layer_norm", "native_group_norm")
def _normalise(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    rank = len(value.shape)
    eps = a["eps"]
    if "normalized_shape" in a:
        dimensions(value, list(range(rank - len(a["normalized_shape"]), rank)))
        eps = constants.rms_eps(eps, node.meta["val"].dtype) if eps is None else eps
    elif "use_input_stats" in a and not a["use_input_stats"]:
        return batch_normalised(builder, node, value, a["weight"], a["running_var"], eps)
    elif not value.has_batch_first:
        raise RefusedError("it takes the batch for channels")
    elif "HxW" in a and (a["N"], a["C"], a["HxW"]) != (*value.shape[:2], math.prod(value.shape[2:])):
        raise RefusedError("it takes the samples of a batch for one")
    weight = a.get("weight")
    constant = constants.normalisation(eps)
    tensor = node.meta["val"]
    shape = value.shape
    if isinstance(weight, Independent):
        result = diagonal(builder, node, value, lambda: weight.compute().double(), weight, constant=constant)
    else:
        result = builder.chain(node, value, constant, shape=shape)
    return result if isinstance(tensor, torch.Tensor) else (result, None, None)


@rule("add", "sub", "rsub", "subtract")
def _add(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    first, second, alpha = a["self"], a["other"], float(a.get("alpha", 1))
    factors = (abs(alpha), 1.0) if "rsub" in str(node.target) else (1.0, abs(alpha))
    branches = [(v, f) for v, f in zip((first, second), factors, strict=True) if isinstance(v, Dependent)]
    placed = [broadcast(node, v) for v, _ in branches]
    scales = [f * copies for (_, f), (copies, _) in zip(branches, placed, strict=True)]
    if len(branches) == 1:
        return builder.chain(node, branches[0][0], scales[0], axis=placed[0][1])
    recognised = _tanhshrink(node)
    if recognised is not None and alpha == 1 and isinstance(builder.values.get(recognised), Dependent):
        return builder.chain(node, builder.values[recognised])
    return _joined(builder, node, "sum", [v for v, _ in branches], scales, [axis for _, axis in placed])


def _tanhshrink(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return x if the node is x - tanh(x), whose slope lies in [0, 1), or its negative; `alpha` is not looked at."""
    x, other = node.args[:2]
    if node.target in _DIFFERENCES and isinstance(x, torch.fx.Node) and isinstance(other, torch.fx.Node):
        return x if other.target is torch.ops.aten.tanh.default and other.args[0] is x else None
    return None


def _joined(
    builder: Builder,
    node: torch.fx.Node,
    kind: Any,
    values: list[Dependent],
    scales: list[float],
    axes: list[int | None],
) -> Dependent:
    shape = shape_of(node)
    if len(set(axes)) != 1 or len({v.shape[v.axis] for v in values if v.axis is not None}) > 1:
        raise RefusedError("it mixes the samples of a batch")
    builder.note(node, "sum of the branches" if kind == "sum" else "branches side by side")
    inputs = frozenset().union(*(v.inputs for v in values))
    return Dependent(shape, axes[0], builder.combine(kind, values, scales), inputs)


@rule("maximum", "minimum", "where", "masked_fill")
def _select(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    choice = a.get("condition", a.get("mask"))
    if choice is not None and not isinstance(choice, Independent):
        raise RefusedError("a choice that depends on the network's input may jump")
    candidates = [a[key] for key in ("self", "other", "value") if key in a]
    branches = [v for v in candidates if isinstance(v, Dependent)]
    placed = [broadcast(node, v) for v in branches]
    scales = [copies for copies, _ in placed]
    if len(branches) == 1:
        return builder.chain(node, branches[0], scales[0], axis=placed[0][1])
    return _joined(builder, node, "norm", branches, scales, [axis for _, axis in placed])


@rule("cat", "concat", "concatenate", "stack")
def _concatenate(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    shape = shape_of(node)
    dim = a["dim"] % len(shape)
    branches = [v for v in a["tensors"] if isinstance(v, Dependent)]
    stacked = "stack" in str(node.target)
    axes = [v.axis_after(1 if stacked and v.axis is not None and dim <= v.axis else 0) for v in branches]
    if not stacked and dim in axes:
        raise RefusedError("it mixes the samples of a batch")
    return _joined(builder, node, "norm", branches, [1.0] * len(branches), axes)


@rule("mean", "sum", "amax", "amin", "max", "min", "logsumexp", "linalg_vector_norm", "norm", "frobenius_norm")
def _reduce(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    name = node.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
    if isinstance(a.get("other"), (Dependent, Independent)):
        return _select(builder, node, a)
    value = only_input(a)
    dims = dimensions(value, a.get("dim"))
    size = size_along(value, dims)
    order = a.get("ord", a.get("p", 2))
    if "norm" in name and order not in (2, None, 1, math.inf) and not (isinstance(order, (int, float)) and order > 2):
        raise RefusedError(f"the norm of order {order} has no rule")
    constant = {"mean": 1 / sqrt_up(size) * (1 + 1e-15), "sum": sqrt_up(size) if size > 1 else 1.0}.get(name, 1.0)
    if "norm" in name and order == 1:
        constant = sqrt_up(size)
    keep = bool(a.get("keepdim", False))
    before = [d for d in dims if value.axis is not None and d < value.axis]
    axis = value.axis if keep else value.axis_after(-len(before))
    shape = [1 if d in dims else n for d, n in enumerate(value.shape)] if keep else None
    shape = shape or [n for d, n in enumerate(value.shape) if d not in dims]
    result = builder.chain(node, value, constant, shape=shape, axis=axis)
    return result if isinstance(node.meta["val"], torch.Tensor) else (result, None)


@rule("lightning_lip::whole_module")
def _module(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    whole = builder.traced.modules[a["index"]]
    name, module = builder.traced.names.get(id(whole.module), ""), whole.counting
    if whole.called.training:
        raise RefusedError(f"{name}: it is called in training mode")
    own = [*whole.module.parameters(), *whole.module.buffers()]
    given = [builder.traced.tensor(stored) for stored in a["stored"]]
    if len(own) != len(given) or any(x is not y for x, y in zip(own, given, strict=True)):
        raise RefusedError(f"{name}: it is called with other parameters or buffers than its own")
    values = [v for v in a["inputs"] if isinstance(v, Dependent)]
    if not all(v.has_batch_first for v in values):
        raise RefusedError("a module with a stated constant expects the batch along the first dimension")
    shape = shape_of(node)
    axes = [v.axis for v in values]
    joined = values[0] if len(values) == 1 else _joined(builder, node, "norm", values, [1.0] * len(values), axes)
    try:
        constants.lipschitz_constant(module)
    except UnsupportedLayerError as error:
        raise RefusedError(f"{name}: {error}") from error
    live = constants.registered_rule(module) is not None or any(True for _ in module.parameters())
    if live:
        return builder.chain(node, joined, live=lambda: constants.lipschitz_constant(module), shape=shape)
    return builder.chain(node, joined, constants.lipschitz_constant(module), shape=shape)


@rule("mul", "multiply", "div", "divide", "true_divide")
def _product(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    if isinstance(a["self"], Dependent) and isinstance(a["other"], Dependent):
        recognised = recognised_product(builder, node)
        if recognised is not None:
            value, constant = recognised
            return builder.chain(node, value, constant, how="x sigmoid(c x) or x / (1 + |x|), written out")
    return scale(builder, node, a)


def recognised_product(builder: Builder, node: torch.fx.Node) -> tuple[Dependent, float] | None:
    """Return the value and the constant of x sigmoid(c x) or x / (1 + |x|), written out; None for anything else."""
    multiplies = node.target in _PRODUCTS
    pairs = [tuple(node.args[:2])] + ([tuple(node.args[1::-1])] if multiplies else [])
    for x, other in pairs:
        value = builder.values.get(x) if isinstance(x, torch.fx.Node) else None
        if not isinstance(x, torch.fx.Node) or not isinstance(other, torch.fx.Node) or not isinstance(value, Dependent):
            continue
        if multiplies and other.target is torch.ops.aten.sigmoid.default:
            inner = other.args[0]
            if inner is x or _multiple_of(inner, x):
                return value, constants.SILU
        if node.target in _QUOTIENTS and _one_plus_magnitude(other, x):
            return value, 1.0
    return None


def _multiple_of(node: Any, x: torch.fx.Node) -> bool:
    if not isinstance(node, torch.fx.Node) or node.target not in _PRODUCTS:
        return False
    return any(a is x and isinstance(b, (int, float)) for a, b in (node.args[:2], node.args[1::-1]))


def _one_plus_magnitude(node: torch.fx.Node, x: torch.fx.Node) -> bool:
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return False
    return any(
        isinstance(a, torch.fx.Node) and a.target is torch.ops.aten.abs.default and a.args[0] is x and b == 1
        for a, b in (node.args[:2], node.args[1::-1])
    )
