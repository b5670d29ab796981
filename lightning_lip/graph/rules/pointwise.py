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
    SampleAxisError,
    arguments_of,
    broadcast,
    dimensions,
    only_input,
    rule,
    shape_of,
    size_along,
)
from lightning_lip.graph.rules.fourier import real_of
from lightning_lip.graph.rules.linear import batch_normalised, diagonal, scale
from lightning_lip.graph.rules.ranges import range_of, reciprocal_range
from lightning_lip.graph.tracing import operation_name
from lightning_lip.models.inputs import BATCH
from lightning_lip.rigorous.rounding import Interval, divide_up, exactly, exp_up, multiply_up, sqrt_up, up

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
        raise SampleAxisError("it takes the batch for channels")
    elif "HxW" in a and (a["N"] % BATCH or a["N"] * a["C"] * a["HxW"] != math.prod(value.shape)):
        # It takes the elements, of which each sample's lie one after the other, for N samples.
        raise SampleAxisError("it takes the samples of a batch for one")
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
    return builder.join(node, "sum", [v for v, _ in branches], scales, [axis for _, axis in placed])


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
    return builder.join(node, "norm", branches, scales, [axis for _, axis in placed])


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
    joined = values[0] if len(values) == 1 else builder.join(node, "norm", values, [1.0] * len(values), axes)
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
    divides = "div" in str(node.target)
    if isinstance(a["other"], Dependent) and (divides or isinstance(a["self"], Dependent)):
        return _bounded_product(builder, node, a, divides)
    return scale(builder, node, {**a, "self": real_of(builder, a["self"]), "other": real_of(builder, a["other"])})


def _bounded_product(builder: Builder, node: torch.fx.Node, a: dict[str, Any], divides: bool) -> Dependent:
    """Return the value of f g, or of f / g, for bounded factors.

    ``|f g - f' g'| <= sup|g| |f - f'| + sup|f| |g - g'|``, elementwise; a quotient is the product of f and 1 / g, whose
    slope is at most ``1 / g^2``.

    Raises:
        RefusedError: If a factor that matters is not bounded.
    """
    arguments = arguments_of(node, lambda leaf: leaf)
    first, second = (range_of(builder, arguments[key]) for key in ("self", "other"))
    what, slope = "product", 1.0
    if divides:
        if a.get("rounding_mode") is not None:
            raise RefusedError("a rounded quotient of two activations is a step function")
        what, second = "quotient", reciprocal_range(second)
        slope = multiply_up(second.magnitude, second.magnitude)
    factors = [(a["self"], second.magnitude), (a["other"], multiply_up(first.magnitude, slope))]
    branches = [(v, factor) for v, factor in factors if isinstance(v, Dependent)]
    unbounded = [i for i, bound in enumerate((first, second)) if not math.isfinite(bound.magnitude)]
    if len(branches) == 1 and 1 in unbounded:
        raise RefusedError("a reciprocal has no finite Lipschitz constant, unless its argument keeps away from 0")
    if len(branches) == 1 and unbounded:
        raise RefusedError("a reciprocal times a tensor that can change has no rule")
    if unbounded:
        which = "neither" if len(unbounded) == 2 else f"not the {('first', 'second')[unbounded[0]]}"
        away = " (a divisor must keep away from 0)" if divides and 1 in unbounded else ""
        raise RefusedError(f"a {what} of two activations, {which} known to be bounded{away}, has no known constant")
    placed = [broadcast(node, v) for v, _ in branches]
    scales = [multiply_up(factor, copies) for (_, factor), (copies, _) in zip(branches, placed, strict=True)]
    return builder.join(node, "sum", [v for v, _ in branches], scales, [axis for _, axis in placed])


def _slope_of_power(x: Interval, exponent: Any) -> float:
    """Return the largest ``|p x^(p-1)|`` on a range: at an end of it, where it is finite at all."""
    if not isinstance(exponent, (int, float)) or not (float(exponent).is_integer() or x.low >= 0):
        raise RefusedError("a power of what may be negative")
    if exponent == 0:
        return 0.0
    if x.high < 0:
        x = -x
    if exponent < 1 and x.low <= 0:
        kind = "reciprocal" if exponent == -1 else "power below 1"
        raise RefusedError(f"a {kind} has no finite Lipschitz constant, unless its argument keeps away from 0")
    if exponent > 1 and not math.isfinite(x.magnitude):
        raise RefusedError("a power has no finite Lipschitz constant, unless its argument is bounded")
    base = x.magnitude if exponent >= 1 else x.low
    return abs(exponent) * math.pow(base, exponent - 1) * (1 + 1e-14)


def _slope_of_exponential(x: Interval, rate: float = 1.0) -> float:
    if x.high == math.inf:
        raise RefusedError("it has no finite Lipschitz constant, unless its argument is bounded from above")
    return rate * exp_up(up(rate * x.high)) * (1 + 1e-15)


def _slope_of_logarithm(x: Interval, shift: float = 0.0, rate: float = 1.0) -> float:
    low = math.nextafter(x.low + shift, -math.inf) if shift and x.low else x.low + shift
    if not low > 0:
        raise RefusedError("it has no finite Lipschitz constant, unless its argument keeps away from where it ends")
    return divide_up(rate, low)


_ON_RANGES: dict[str, Callable[[Interval, dict[str, Any]], float]] = {
    "pow": lambda x, a: _slope_of_power(x, a["exponent"]),
    "square": lambda x, a: _slope_of_power(x, 2),
    "sqrt": lambda x, a: _slope_of_power(x, 0.5),
    "rsqrt": lambda x, a: _slope_of_power(x, -0.5),
    "reciprocal": lambda x, a: _slope_of_power(x, -1),
    "exp": lambda x, a: _slope_of_exponential(x),
    "expm1": lambda x, a: _slope_of_exponential(x),
    "exp2": lambda x, a: _slope_of_exponential(x, up(math.log(2))),
    "log": lambda x, a: _slope_of_logarithm(x),
    "log2": lambda x, a: _slope_of_logarithm(x, rate=up(up(1 / math.log(2)))),
    "log10": lambda x, a: _slope_of_logarithm(x, rate=up(up(1 / math.log(10)))),
    "log1p": lambda x, a: _slope_of_logarithm(x, 1.0),
}


@rule(*_ON_RANGES)
def _on_range(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """A function that is Lipschitz where its argument lies: the largest slope on that range."""
    value = only_input(a)
    name = operation_name(node)
    found = range_of(builder, arguments_of(node, lambda leaf: leaf)["self"])
    return builder.chain(node, value, _ON_RANGES[name](found, a))


@rule("addcmul")
def _add_product(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """``self + value tensor1 tensor2``, where one factor does not depend on the input."""
    first, factors = a["self"], (a["tensor1"], a["tensor2"])
    if all(isinstance(factor, Dependent) for factor in factors):
        raise RefusedError("a product of two activations has no known constant: write it as a product and a sum")
    size = abs(float(a["value"]))
    branches, scales = [], []
    if isinstance(first, Dependent):
        branches, scales = [first], [1.0]
    if any(isinstance(factor, Dependent) for factor in factors):
        branches.append(scale(builder, node, {"self": factors[0], "other": factors[1]}))
        scales.append(size)
    placed = [broadcast(node, v) for v in branches]
    scales = [multiply_up(s, copies) for s, (copies, _) in zip(scales, placed, strict=True)]
    return builder.join(node, "sum", branches, scales, [axis for _, axis in placed])


@rule("lerp")
def _interpolate(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """``(1 - w) self + w end``: each branch times the largest factor."""
    weight = a["weight"]
    if isinstance(weight, Dependent):
        raise RefusedError("its weight depends on the network's input")
    if isinstance(weight, Independent) and weight.live:
        raise RefusedError("its weight can change: write it as a sum of products")
    w = range_of(builder, arguments_of(node, lambda leaf: leaf)["weight"])
    sizes = ((exactly(1.0) - w).magnitude, w.magnitude)
    branches = [(v, size) for v, size in zip((a["self"], a["end"]), sizes, strict=True) if isinstance(v, Dependent)]
    placed = [broadcast(node, v) for v, _ in branches]
    scales = [multiply_up(size, copies) for (_, size), (copies, _) in zip(branches, placed, strict=True)]
    return builder.join(node, "sum", [v for v, _ in branches], scales, [axis for _, axis in placed])


@rule("std")
def _deviation(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """``||x - mean x|| / sqrt(n - c)``, *exact*: 1 / sqrt(n - c), as the projection has norm 1."""
    value = only_input(a)
    dims = dimensions(value, a.get("dim"))
    correction = a.get("correction")
    correction = float(a.get("unbiased", True)) if correction is None else float(correction)
    left = size_along(value, dims) - correction
    if not left > 0:
        raise RefusedError(f"with a correction of {correction:g} its divisor is not positive")
    keep = bool(a.get("keepdim", False))
    before = [d for d in dims if value.axis is not None and d < value.axis]
    axis = value.axis if keep else value.axis_after(-len(before))
    return builder.chain(node, value, divide_up(1.0, math.nextafter(math.sqrt(left), 0.0)), axis=axis)


@rule("cdist")
def _distances(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """All distances ``|x_i - y_j|_p``: each is Lipschitz in x_i and in y_j, which stand in as many as the other has.

    The gradient of a p-norm has q-norm 1, 1 / p + 1 / q = 1: its Euclidean norm is at most 1 for p >= 2, and at most
    n^(1/p - 1/2) for p < 2 in n dimensions.
    """
    p, n_features = float(a["p"]), a["x1"].shape[-1]
    if not p >= 1:
        raise RefusedError(f"the distance of order {p:g} has no rule")
    slope = 1.0 if p >= 2 else math.pow(n_features, 1 / p - 0.5) * (1 + 1e-14)
    shape = shape_of(node)
    values, scales, axes = [], [], []
    for at, value in enumerate((a["x1"], a["x2"])):
        if not isinstance(value, Dependent):
            continue
        rank = len(value.shape)
        if value.axis == rank - 1:
            raise SampleAxisError
        # The points of the second are along the last dimension.
        axis = value.axis_after(len(shape) - rank + (1 if at and value.axis == rank - 2 else 0))
        if axis is not None and value.axis is not None and shape[axis] != value.shape[value.axis]:
            raise SampleAxisError
        values.append(value)
        scales.append(multiply_up(slope, sqrt_up(math.prod(shape) / max(1, math.prod(value.shape[:-1])))))
        axes.append(axis)
    return builder.join(node, "sum", values, scales, axes)
