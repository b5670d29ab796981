"""Rules of the operations with weights: linear layers, convolutions, batch normalisation, products with a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.constants.modules import batch_norm_scale, leaky_relu
from lightning_lip.constants.pooling import per_dimension
from lightning_lip.graph.builder import (
    Builder,
    Dependent,
    Independent,
    RefusedError,
    SampleAxisError,
    broadcast,
    only_input,
    rule,
    shape_of,
)
from lightning_lip.graph.tracing import module_path, module_paths
from lightning_lip.models.modules import keeps_forward
from lightning_lip.operators.base import LinearOperator, MatrixOperator
from lightning_lip.operators.composed import (
    ComputedMatrixOperator,
    DiagonalOperator,
    ScaledOperator,
    TracedParametrizationOperator,
    computed_source,
)
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator, KernelOperator
from lightning_lip.operators.convolutions.paddings import padding_pairs
from lightning_lip.operators.convolutions.symbol import symbol_at
from lightning_lip.operators.known import operator_of
from lightning_lip.rigorous.evaluation import evaluated
from lightning_lip.rigorous.rounding import divide_up

BATCH_NORMS = {"batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm"}

_CONVOLUTIONS: dict[tuple[int, bool], type[Any]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def matrix_operator(builder: Builder, node: torch.fx.Node, weight: Any) -> tuple[Hashable, LinearOperator]:
    """Return the operator of a matrix that multiplies a value, and the key of its identity."""
    if not isinstance(weight, Independent):
        raise RefusedError("a product of two activations has no finite Lipschitz constant")
    if len(weight.shape) != 2:
        raise RefusedError(f"a weight of shape {weight.shape} is not a matrix")
    if weight.owner is not None:
        module, name, key = weight.owner
        if key not in module._parameters:
            buffer = f"{name}.{key}" if name else key
            return (id(module), key), ComputedMatrixOperator(buffer, module, lambda: _dense(weight.compute()), ())
        if key == "weight" and keeps_forward(module, nn.Linear):
            return id(module._parameters[key]), operator_of(module, name)
        full = name if key == "weight" else f"{name}.{key}" if name else key
        return id(module._parameters[key]), MatrixOperator(full, module, key)
    name, module = builder.module_of(node)
    if isinstance(module, nn.Linear) and _is_parametrized(builder, node, weight, module):
        return ("computed", weight.identity), TracedParametrizationOperator(name, module, weight.compute)
    computed = ComputedMatrixOperator(name, module, weight.compute, weight.parameters)
    return ("computed", weight.identity), computed


def _dense(matrix: Tensor) -> Tensor:
    """Return a matrix that may be sparse, as a graph's adjacency is."""
    return matrix if matrix.layout == torch.strided else matrix.to_dense()


def _is_parametrized(builder: Builder, node: torch.fx.Node, weight: Independent, module: nn.Module) -> bool:
    """Whether a computed weight is what the parametrization of the node's module returns, not a hook's own tensor."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    source = next(argument for argument in node.all_input_nodes if builder.values.get(argument) is weight)
    of_module = {id(p) for p in module.parametrizations["weight"].parameters()}  # type: ignore[union-attr, index]
    path = f"{module_path(node)}.parametrizations.weight".lstrip(".")
    return path in module_paths(source) and {id(p) for p in weight.parameters} <= of_module


def _feeds_batch_norm(builder: Builder, node: torch.fx.Node) -> bool:
    """Whether a node's only use is a batch normalisation, so that both are one operator."""
    users = [user for user in node.users if user in builder.live_nodes]
    if len(users) != 1 or users[0].op != "call_function" or users[0].args[0] is not node:
        return False
    return _base_name(users[0]) in BATCH_NORMS


def _base_name(node: torch.fx.Node) -> str:
    """Return the operation's name in aten; with its namespace for others."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _apply(
    builder: Builder,
    node: torch.fx.Node,
    value: Dependent,
    key: Hashable,
    operator: LinearOperator,
    channels_at_one: bool,
) -> Dependent:
    if channels_at_one and _feeds_batch_norm(builder, node):
        builder.note(node, "fused with the batch normalisation that follows")
        return Dependent(shape_of(node), value.axis, value.term, value.inputs, pending=(key, operator))
    return builder.chain(node, value, operator=builder.operator(key, operator))


@rule("linear", "addmm", "mm", "_sparse_mm")
def linear(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Return the product of a value and a matrix, on either side."""
    if "mat1" in a or "mat2" in a:
        left, right = a.get("mat1", a.get("self")), a["mat2"]
        factor = max(1.0, abs(float(a.get("alpha", 1)))) if "mat1" in a else 1.0
        if isinstance(a.get("self"), Dependent) and "mat1" in a:
            raise RefusedError("the bias depends on the network's input")
    elif "input" in a:
        left, right, factor = a["input"], a["weight"], 1.0
        if isinstance(a.get("bias"), Dependent):
            raise RefusedError("the bias depends on the network's input")
    elif "sparse" in a:
        left, right, factor = a["sparse"], a["dense"], 1.0
    else:
        left, right, factor = a["self"], a["other"], 1.0
    value, weight = (left, right) if isinstance(left, Dependent) else (right, left)
    key, operator = matrix_operator(builder, node, weight)
    rank = len(value.shape)
    # x W contracts the last dimension of x, W x the one before it (the last of a vector, which holds the batch).
    contracted = rank - 1 if value is left else max(rank - 2, 0)
    if value.axis == contracted:
        raise SampleAxisError
    if factor != 1.0:
        return builder.chain(node, value, factor, operator=builder.operator(key, operator))
    # Only F.linear's matrix has its outputs for rows, which a normalisation scales: that of x W has them for columns.
    return _apply(builder, node, value, key, operator, channels_at_one="input" in a and rank == 2 and value is left)


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def _convolution(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    value = only_input(a)
    weight = a["weight"]
    if not isinstance(weight, Independent):
        raise RefusedError("its kernel depends on the network's input")
    rank = len(weight.shape) - 2
    # Without a batch its inputs may be of shape (channels, ...), and a first dimension before that is no matter.
    is_unbatched = value.axis is None and len(value.shape) == rank + 1
    if not value.has_batch_first or not (is_unbatched or len(value.shape) == rank + 2):
        raise SampleAxisError("it takes the batch for channels or places: give inputs of shape (batch, channels, ...)")
    transposed = bool(a.get("transposed", "transpose" in str(node.target)))
    padding = a["padding"] if isinstance(a["padding"], str) else per_dimension(a["padding"], rank)
    geometry = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": per_dimension(a["stride"], rank),
        "padding": padding,
        "dilation": per_dimension(a["dilation"], rank),
        "groups": int(a["groups"]),
        "output_padding": per_dimension(a.get("output_padding"), rank, 0),
        "transposed": transposed,
    }
    (name, module), key = builder.module_of(node), "weight"
    is_parameter = False
    if weight.owner is not None:
        owner, _, owned = weight.owner
        is_parameter = owned in owner._parameters
        # Of the convolutions that share a kernel, the one that runs here knows its padding.
        if not is_parameter or module._parameters.get("weight") is not owner._parameters[owned]:
            module, name, key = weight.owner
    kind = _CONVOLUTIONS[rank, transposed]
    # A kernel that the forward pass computes (a standardised one) is none of the module's own.
    is_parametrized = weight.owner is None and _is_parametrized(builder, node, weight, module)
    own = (is_parameter or is_parametrized) and keeps_forward(module, kind) and key == "weight"
    own = own and all(getattr(module, k) == v for k, v in geometry.items() if k != "padding")
    if own and module.padding_mode != "zeros":
        # The module pads by itself, then convolves without padding: one operator at the size before the padding.
        unpadded = _before_padding(builder, node, module) if padding in ("valid", (0,) * rank) else None
        own = unpadded is not None
        value = unpadded or value
    elif own:
        own = module.padding == padding
    convolution = module if own else _shell(kind, geometry, weight)
    if is_parameter and not own:
        # The owner's own dictionary where it serves: a weight that is assigned later is seen.
        convolution._parameters = module._parameters if key == "weight" else {"weight": module._parameters[key]}
    domain = value.shape if is_unbatched else value.shape[1:]
    full = name if key == "weight" else f"{name}.{key}" if name else key
    identity: Hashable = id(module._parameters[key]) if is_parameter else ("computed", weight.identity)
    source = (
        None if is_parameter else computed_source(full, convolution, weight.compute, None if own else weight.parameters)
    )
    operator: KernelOperator
    if builder.convolutions == "symbol":
        operator = symbol_at(full, convolution, domain[1:], source)
    else:
        operator = ConvolutionOperator(full, convolution, domain, source)
    padded = (str(convolution.padding), convolution.padding_mode)
    details = (identity, operator.place, padded, tuple(sorted((k, str(v)) for k, v in geometry.items())))
    return _apply(builder, node, value, details, operator, channels_at_one=not is_unbatched)


def _before_padding(builder: Builder, node: torch.fx.Node, module: Any) -> Dependent | None:
    """Return the value that is padded as the module pads before it convolves, or None if it is padded otherwise."""
    before = node.args[0]
    if not isinstance(before, torch.fx.Node) or before.target is not torch.ops.aten.pad.default:
        return None
    source, amounts, mode = [*before.args, "constant"][:3]
    pairs = padding_pairs(module.padding, module.kernel_size, module.dilation)
    # F.pad begins with the last dimension.
    if mode != module.padding_mode or amounts != [n for pair in reversed(pairs) for n in pair]:
        return None
    value = builder.values.get(source) if isinstance(source, torch.fx.Node) else None
    if not isinstance(value, Dependent) or not value.has_batch_first:
        return None
    builder.report.pop(before, None)
    return value


def _shell(kind: type[Any], geometry: dict[str, Any], weight: Independent) -> nn.Module:
    """Return a module with the geometry of a functional convolution; its weight is a placeholder."""
    settings = {k: v for k, v in geometry.items() if k not in ("transposed", "kernel_size", "output_padding")}
    channels = [weight.shape[1] * geometry["groups"], weight.shape[0]]
    if geometry["transposed"]:
        settings["output_padding"] = geometry["output_padding"]
        channels = [weight.shape[0], weight.shape[1] * geometry["groups"]]
    shell: nn.Module = kind(*channels, geometry["kernel_size"], bias=False, device="meta", **settings)
    return shell


@rule(*BATCH_NORMS)
def _batch_norm(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Any:
    value = only_input(a)
    mean, variance, weight = a.get("running_mean"), a.get("running_var"), a.get("weight")
    if a.get("training") or variance is None or mean is None:
        raise RefusedError("without running statistics it mixes the samples of a batch")
    if value.axis == 1:
        raise SampleAxisError("it takes the batch for channels")
    result = batch_normalised(builder, node, value, weight, variance, a["eps"])
    # The decomposed form returns statistics beside the output.
    return result if isinstance(node.meta["val"], Tensor) else (result, None, None, None, None)


def batch_normalised(
    builder: Builder,
    node: torch.fx.Node,
    value: Dependent,
    weight: Independent | None,
    variance: Independent,
    eps: float,
) -> Dependent:
    """Return the value times gamma / sqrt(var + eps), from the present parameters and running statistics, in fp64."""

    def scale() -> Tensor:
        gamma = None if weight is None else weight.compute().double()
        return batch_norm_scale(gamma, variance.compute().double(), eps)

    # The variance first, for the operator's name: gamma may be another normalisation's.
    return diagonal(builder, node, value, scale, variance, weight, kind=("batch_norm", eps))


def diagonal(
    builder: Builder,
    node: torch.fx.Node,
    value: Dependent,
    compute: Callable[[], Tensor],
    *sources: Independent | None,
    constant: float = 1.0,
    axis: int | None = None,
    kind: Hashable = "scale",
) -> Dependent:
    """Return the value after a scale of its channels: its own operator, or one with the layer before it.

    `kind` and the `sources` tell all that the scale is computed from: where they are the same, so is the operator.
    """
    parameters = tuple(p for source in sources if source is not None for p in source.parameters)
    named = next((s.owner for s in sources if s is not None and s.owner is not None), None)
    if named is None:
        name, module = builder.module_of(node)
    else:
        module, name, _ = named
    shape = shape_of(node)
    key = (kind, *(_identity(source, node) for source in sources))
    if value.pending is not None:
        base_key, base = value.pending
        has_gain = kind != "scale" and len(parameters) == 1 and all(s is None or s.owner is not None for s in sources)
        fused = ScaledOperator(base, f"{base.name}+{name}", compute, parameters, has_gain)
        index = builder.operator((base_key, key), fused)
        plain = Dependent(value.shape, value.axis, value.term, value.inputs)
        return builder.chain(node, plain, operator=index, shape=shape)
    if named is not None and named[2] not in ("weight", "running_var"):
        name = f"{name}.{named[2]}" if name else named[2]
    operator = DiagonalOperator(name, module, compute, parameters)
    return builder.chain(node, value, constant, operator=builder.operator(key, operator), shape=shape, axis=axis)


def _identity(source: Independent | None, node: torch.fx.Node) -> Hashable:
    """Return what tells a tensor from all others: its place in the model; for a computed one the node that uses it."""
    if source is None:
        return None
    return str(node) if source.owner is None else (id(source.owner[0]), source.owner[2])


def scale(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    """Return the value of a product or quotient of which one side does not depend on the input."""
    first, second = a["self"], a["other"]
    divides = "div" in _base_name(node)
    value, factor = (first, second) if isinstance(first, Dependent) else (second, first)
    if divides and a.get("rounding_mode") is not None:
        raise RefusedError("a rounded quotient has no finite Lipschitz constant")
    copies, axis = broadcast(node, value)
    if isinstance(factor, (int, float)):
        if not math.isfinite(factor) or (divides and factor == 0):
            raise RefusedError(f"its factor is {factor}")
        number = divide_up(1.0, abs(factor)) if divides else abs(float(factor))
        return builder.chain(node, value, number * copies, axis=axis)
    if not isinstance(factor, Independent):
        raise RefusedError(f"its factor is a {type(factor).__name__}")
    tensor = factor

    def scale() -> Tensor:
        entries: Tensor = tensor.compute().double()
        return 1 / entries if divides else entries

    if factor.parameters:
        kind = "divisor" if divides else "scale"
        return diagonal(builder, node, value, scale, factor, constant=copies, axis=axis, kind=kind)

    def largest() -> float:
        return float(magnitudes(tensor, scale).max()) * (1 + 1e-15)

    if not math.isfinite(largest()):
        raise RefusedError("its factor is not finite")
    if tensor.live:
        return builder.chain(node, value, copies, live=largest, axis=axis)
    return builder.chain(node, value, largest() * copies, axis=axis)


def magnitudes(source: Independent, compute: Callable[[], Tensor]) -> Tensor:
    """Return upper bounds of the magnitudes of what is computed from `source`, but for a rounding in fp64."""
    # Read at each step of a training: a stored tensor is exact as it is.
    return compute().detach().abs() if source.owner is not None else evaluated(compute).magnitudes()


@rule("prelu", "_prelu_kernel")
def _prelu(builder: Builder, node: torch.fx.Node, a: dict[str, Any]) -> Dependent:
    value, weight = only_input(a), a["weight"]

    def slope() -> float:
        return leaky_relu(magnitudes(weight, weight.compute))

    if value.axis == 1 and math.prod(weight.shape) > 1:
        raise SampleAxisError("it takes the batch for channels")
    return builder.chain(node, value, live=slope)
