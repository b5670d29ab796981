"""Rescale the hidden units of a positively homogeneous network: the same function, a smaller product of norms.

With ``f(d h) = d f(h)`` for d > 0, as ReLU has it, ``W_l -> D_l W_l D_{l-1}^-1``, ``b_l -> D_l b_l`` leaves the
function unchanged for all positive diagonal matrices D_l of the hidden units, D_0 = D_n = I; the product of the
spectral norms does change. :mod:`lightning_lip.rebalancing.least_product` finds the factors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lip.checks import check_flag, check_model, check_type
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.builder import Builder
from lightning_lip.graph.tracing import RESHAPES, TracedModel, operation_name, trace
from lightning_lip.kernels.tensors import without_modes
from lightning_lip.metrics.certified_accuracy import row_norms
from lightning_lip.models.sharding import refuse_sharded
from lightning_lip.rebalancing.least_product import evened, least_product
from lightning_lip.rigorous.chain import product_bound
from lightning_lip.rigorous.matrix import certified_matrix_norm
from lightning_lip.rigorous.rounding import multiply_up

__all__ = ["Rebalanced", "RebalancedLayer", "rebalance"]

SMALLEST_GAIN = 1e-3
"""For less, the weights are not rounded anew."""

_HOMOGENEOUS = {"relu", "leaky_relu", "prelu", "dropout", "clone", "alias"}


@dataclass(frozen=True)
class RebalancedLayer:
    """One layer's part: its weight is ``diag(scale) W diag(scale of the layer before)^-1``, its bias ``scale * b``.

    Attributes:
        name: The layer's name in the model.
        norm_before: *Certified upper bound* of its spectral norm before.
        norm_after: The same after.
        scale: The factors of its outputs, shape (m,), fp64 on the CPU; ones for the last layer.
    """

    name: str
    norm_before: float
    norm_after: float
    scale: Tensor


@dataclass(frozen=True)
class Rebalanced:
    """What :func:`rebalance` did.

    Attributes:
        product_before: *Certified upper bound* of the product of the layers' spectral norms before; with a head, of the
            largest distance of its rows times the norms of the layers before it.
        product_after: The same for the weights as they are stored now; never larger.
        changed: Whether weights were written.
        layers: The layers in the order in which they are applied.
    """

    product_before: float
    product_after: float
    changed: bool
    layers: tuple[RebalancedLayer, ...]


@dataclass(frozen=True)
class _Layer:
    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None


@without_modes()
def rebalance(
    model: nn.Module, example_input: object = None, *, per_unit: bool = True, head: nn.Module | None = None
) -> Rebalanced:
    """Rescale a network's hidden units in place: the same function, with a smaller certified product of norms.

    The network must be a chain of two or more linear layers with ReLU, LeakyReLU, PReLU, dropout, identities and
    reshapes that keep the last dimension between them; operations without parameters may stand before the first and
    after the last layer (flatten, softmax). Anything else is refused by name, and no weight is written then.

    The function is the same in exact arithmetic. Each weight and bias is rounded once, so that in fp32 outputs move by
    about 1e-7 of their size. Guaranteed: the product, certified before and after, is not larger. The bounds of
    :func:`~lightning_lip.certify` are then those of the rescaled network as it is stored; Combettes-Pesquet and
    ECLipsE-Fast mostly fall with the product, but need not. The product is minimised numerically, in fp64 on the CPU by
    L-BFGS (*heuristic*: close to the least product, with no proof of how close). The time goes into some 250
    eigenvalue decompositions of each layer: a second at 128 units, minutes at 1,024.

    Call it after training. An optimiser's state, and averaged or saved copies of the weights, belong to the old
    scaling: make the optimiser anew if training goes on. Hidden activations are rescaled too, by up to 2^32 for units
    that nothing depends on: code that reads them outside of the traced forward pass will see other numbers.

    Args:
        model: The network, a LightningModule as well. fp32 or fp64 weights, trainable, not shared or parametrised.
        example_input: An input, as for :func:`~lightning_lip.certify`. None takes the module's `example_input_array`,
            or for an ``nn.Sequential`` that starts with a linear layer, what that layer takes.
        per_unit: False only evens the layers' norms, by one power of two for each layer: outputs and the product
            then stay the same, bit for bit.
        head: The last layer of a classifier, to minimise what pairwise certificates use: the distance of two of its
            rows times the norms before it. The guarantee is then that this is larger than before for no pair, so that
            no sample loses the certificate that follows from it; all fall in about the same ratio.

    Returns:
        The certified product before and after, and each layer's norms and factors. Where less than 0.1% is to be
        gained the network is left as it was.

    Raises:
        TypeError: If the model is no module.
        UnsupportedLayerError: If the network is not such a chain, with the reasons by name.
        ValueError: If there is no input to trace it with, a weight or bias is not finite, or would not fit into its
            dtype any more; if the head is not the last of the layers.

    Example:
        >>> import torch
        >>> from lightning_lip import rebalance
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        >>> result = rebalance(model)
        >>> result.product_after < 0.9 * result.product_before
        True
    """
    check_model(model, "rebalance")
    check_flag("per_unit", per_unit)
    if head is not None:
        check_type("head", head, nn.Module, "a module of the model")
    refuse_sharded(model, "rebalance", "Rebalance a whole checkpoint in one process.")
    layers = _layers(trace(model, _example_input(model) if example_input is None else example_input))
    weights = [_finite(layer.weight, f"{layer.name}'s weight") for layer in layers]
    if head is not None and not any(parameter is layers[-1].weight for parameter in head._parameters.values()):
        raise ValueError(f"Expected `head` to be the last layer, {layers[-1].name}, got {type(head).__name__}.")
    norms, product = _certified(weights)
    pairs = None if head is None else _pairs(weights)
    if pairs is not None:
        product = float(pairs.max())
    scales = [torch.ones(len(weight), dtype=torch.float64, device="cpu") for weight in weights]
    unchanged = Rebalanced(product, product, False, _parts(layers, norms, norms, scales))
    if product == 0:
        return unchanged
    if per_unit:
        scales[:-1] = [log.exp() for log in evened(weights, least_product(weights, of_pairs=head is not None))]
    else:
        logs = evened(weights, [scale.log() for scale in scales[:-1]])
        scales[:-1] = [torch.exp2((log / math.log(2)).round()) for log in logs]
    new_weights, new_values = [], []
    before = torch.ones(weights[0].shape[1], dtype=torch.float64, device="cpu")
    for layer, weight, scale in zip(layers, weights, scales, strict=True):
        new_weights.append(_rounded(scale[:, None] * weight / before, layer.weight, f"{layer.name}'s weight"))
        new_values.append((layer.weight, new_weights[-1]))
        if layer.bias is not None:
            bias = _finite(layer.bias, f"{layer.name}'s bias")
            new_values.append((layer.bias, _rounded(scale * bias, layer.bias, f"{layer.name}'s bias")))
        before = scale
    new_norms, new_product = _certified(new_weights)
    if pairs is not None:
        new_pairs = _pairs(new_weights)
        new_product = float(new_pairs.max())
        if bool((new_pairs > pairs * (1 - SMALLEST_GAIN if per_unit else 1)).any()):
            return unchanged
    if new_product > (product * (1 - SMALLEST_GAIN) if per_unit else product):
        return unchanged
    for parameter, values in new_values:
        parameter.copy_(values)
    return Rebalanced(product, new_product, True, _parts(layers, norms, new_norms, scales))


def _example_input(model: nn.Module) -> object:
    """Return an input where the model itself tells what it takes."""
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return example
    first = next((m for m in model.modules() if m._parameters), None)
    if isinstance(model, nn.Sequential) and isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, device=first.weight.device)
    raise ValueError(
        f"Expected `example_input` for a {type(model).__name__}: its forward pass is traced to know the order of the "
        "layers. Pass an input with the batch along its first dimension."
    )


def _layers(traced: TracedModel) -> list[_Layer]:
    """Return the layers of a chain in order.

    Raises:
        UnsupportedLayerError: If the network is no chain, a layer cannot be rescaled, or there is none.
    """
    builder = Builder(traced)
    nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
    linear = [node for node in nodes if operation_name(node) == "linear"]
    refused: dict[torch.fx.Node, str] = {}
    chain, inner = linear[:1], set(linear[:1])
    current = linear[0] if linear else None
    while current is not None and current is not linear[-1]:
        users = list(current.users)
        if len(users) != 1:
            found = (builder.module_of(user) for user in users)
            names = dict.fromkeys(f"{name or '(the model itself)'} ({type(module).__name__})" for name, module in found)
            refused[current] = f"its output is used {len(users)} times, as in a residual network, by {', '.join(names)}"
            break
        node = users[0]
        if node.op != "call_function":
            refused[current] = "it is an output of the network, but not the last layer's"
            break
        reason = _inner_refusal(node, current, traced)
        if reason is not None:
            refused[node] = reason
            if node.args[:1] != (current,):
                break
        if operation_name(node) == "linear":
            chain.append(node)
        inner.add(node)
        current = node
    holders = Counter(id(p) for m in traced.model.modules() for p in m._parameters.values() if p is not None)
    layers: list[_Layer] = []
    addresses: set[int] = set()
    for node in chain:
        layer = _layer(node, traced, holders)
        if isinstance(layer, str):
            refused.setdefault(node, layer)
            continue
        own = {p.data_ptr() for p in (layer.weight, layer.bias) if p is not None and p.numel()}
        if own & addresses:
            refused[node] = "its weight or bias lies in another layer's memory"
        addresses |= own
        layers.append(layer)
    for node in nodes if not refused else ():
        stored = map(traced.tensor, node.all_input_nodes)
        if node not in inner and any(isinstance(tensor, nn.Parameter) for tensor in stored):
            refused[node] = "it has parameters, but stands before, behind or beside the chain"
    if refused:
        raise UnsupportedLayerError(
            "Only chains of linear layers and positively homogeneous activations can be rescaled:\n  - "
            + "\n  - ".join(str(builder.refuse(node, reason).refusals[0]) for node, reason in refused.items())
            + "\nPass a part of the model that is such a chain. No weight was changed."
        )
    if not layers:
        raise UnsupportedLayerError(f"{type(traced.model).__name__} has no linear layer that could be rescaled.")
    return layers


def _inner_refusal(node: torch.fx.Node, current: torch.fx.Node, traced: TracedModel) -> str | None:
    """Return why an operation behind `current` may not stand between two layers, or None."""
    operation = operation_name(node)
    if operation == "linear" and node.args[:1] == (current,):
        # Its weight and bias are looked at with those of the first layer.
        return None
    if any(argument is not current and argument.name not in traced.stored for argument in node.all_input_nodes):
        return "it also takes another value, as a residual or a branch does"
    if operation in _HOMOGENEOUS and node.args[:1] == (current,):
        return None
    if operation in RESHAPES:
        kept = node.meta["val"].shape[-1:] == current.meta["val"].shape[-1:]
        return None if kept else "it reshapes the dimension of the hidden units"
    if "batch_norm" in operation:
        return "fuse it into the layer before it: torch.nn.utils.fuse_linear_bn_eval"
    return "it is not known to be positively homogeneous unit by unit, f(d x) = d f(x) for d > 0"


def _layer(node: torch.fx.Node, traced: TracedModel, holders: Counter[int]) -> _Layer | str:
    """Return a layer with its live parameters, or why they may not be written."""
    found: list[nn.Parameter] = []
    arguments = [argument for argument in node.args[1:] if isinstance(argument, torch.fx.Node)]
    for what, argument in zip(("weight", "bias"), arguments, strict=False):
        parameter = traced.tensor(argument)
        if not isinstance(parameter, nn.Parameter):
            return f"its {what} is computed, or no parameter: remove parametrizations and pruning first"
        plain = type(parameter.data) is Tensor and parameter.layout == torch.strided and not parameter.is_meta
        if not plain or parameter.dtype not in (torch.float32, torch.float64):
            return (
                f"its {what} is a {type(parameter.data).__name__} of {parameter.dtype} on {parameter.device}: only "
                "dense fp32 and fp64 are rescaled, since rounding to fewer bits would change the function"
            )
        if len(argument.users) != 1 or holders[id(parameter)] != 1:
            return f"its {what} is shared with another layer, or used more than once"
        if not parameter.requires_grad:
            return f"its {what} is frozen and would be changed: call requires_grad_(True) on it if it may be"
        found.append(parameter)
    weight = found[0]
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}, not (m, n)"
    bias = found[1] if len(found) > 1 else None
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"its bias has shape {tuple(bias.shape)}, not ({len(weight)},)"
    _, name, key = traced.owners[arguments[0].name]
    full = name if key == "weight" else f"{name}.{key}" if name else key
    return _Layer(full, weight, bias)


def _finite(parameter: nn.Parameter, name: str) -> Tensor:
    """Return the parameter in fp64 on the CPU."""
    values = parameter.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError(f"Expected finite numbers in {name}, got NaN or an infinity.")
    return values


def _certified(weights: Sequence[Tensor]) -> tuple[list[float], float]:
    """Return the certified norms and their product."""
    product = product_bound(weights, [(1.0, 1.0)] * (len(weights) - 1))
    return [certified_matrix_norm(weight) for weight in weights], product


def _pairs(weights: Sequence[Tensor]) -> Tensor:
    """Return upper bounds of the distance of each two rows of the last layer times the norms before it, (C, C)."""
    *inner, last = weights
    features = product_bound(inner, [(1.0, 1.0)] * (len(inner) - 1)) if inner else 1.0
    return torch.stack([row_norms(last - row) for row in last]) * multiply_up(
        features, 1 + 2.0**-52 * (last.shape[1] + 16)
    )


def _parts(
    layers: Sequence[_Layer], before: Sequence[float], after: Sequence[float], scales: Sequence[Tensor]
) -> tuple[RebalancedLayer, ...]:
    names = [layer.name for layer in layers]
    return tuple(RebalancedLayer(*part) for part in zip(names, before, after, scales, strict=True))


def _rounded(exact: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    """Return `exact` in the parameter's dtype."""
    rounded = exact.to(parameter.dtype)
    error = (rounded.double() - exact).abs()
    # Also where all entries underflow. NaN, of infinity less infinity, is no error that could be accepted.
    if exact.numel() and not bool((error <= torch.finfo(parameter.dtype).eps * exact.abs().max()).all()):
        raise ValueError(
            f"{name} would not fit into {parameter.dtype} after rescaling: its layer's scale differs too much from the "
            "others'. No weight was changed; convert the model to fp64 first."
        )
    return rounded
