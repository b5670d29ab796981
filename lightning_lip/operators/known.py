"""Which modules have a linear operator, and why the others have none.

A selected module whose operator is not known is refused by name: its norm is never counted as 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.kernels.tensors import is_sharded
from lightning_lip.models.modules import eval_mode, is_lora, keeps_forward
from lightning_lip.operators.base import LinearOperator, MatrixOperator, ParametrizedMatrixOperator
from lightning_lip.operators.composed import ComputedMatrixOperator, LoraOperator
from lightning_lip.operators.convolutions.convolution import check_convolution
from lightning_lip.operators.convolutions.symbol import SymbolOperator


@singledispatch
def operator_of(module: nn.Module, name: str) -> LinearOperator:
    """Return the linear operator of a module that has weights.

    Args:
        module: The module.
        name: Its name in the model.

    Raises:
        UnsupportedLayerError: If the operator is not known; the message is the reason.
    """
    if _is_quantised(module):
        raise UnsupportedLayerError("its weight is quantised")
    if is_lora(module):
        return LoraOperator(name, module)
    own = [key for key, _ in module.named_parameters(recurse=False)]
    raise UnsupportedLayerError(f"what it computes from its parameters {own} is not known")


@operator_of.register
def _(module: nn.Linear, name: str) -> LinearOperator:
    if not keeps_forward(module, nn.Linear):
        raise UnsupportedLayerError("it has a forward of its own, so it is not known to compute x W^T + b")
    if parametrize.is_parametrized(module, "weight"):
        return _whole(ParametrizedMatrixOperator(name, module))
    weight = check_weight(module)
    if weight.dim() != 2 or weight.numel() == 0:
        raise UnsupportedLayerError(
            f"its weight has shape {tuple(weight.shape)} instead of (out_features, in_features), as FSDP1's shards do"
        )
    return MatrixOperator(name, module)


@operator_of.register
def _(module: nn.modules.conv._ConvNd, name: str) -> LinearOperator:
    check_convolution(module)
    if parametrize.is_parametrized(module, "weight"):
        return _whole(SymbolOperator(name, module))
    check_weight(module)
    return SymbolOperator(name, module)


def _whole(computed: LinearOperator) -> LinearOperator:
    if any(is_sharded(p) for p in computed.parameters):
        raise UnsupportedLayerError(
            "its parametrised weight is computed from DTensors (FSDP2, tensor parallel): keep it whole with "
            "fully_shard(..., ignored_params=...)"
        )
    return computed


def check_weight(module: nn.Module, key: str = "weight") -> nn.Parameter:
    """Return a layer's own weight, by its name in the module, if it is a tensor that can be worked with.

    Raises:
        UnsupportedLayerError: If it is computed by a hook, lazy, on the meta device, sparse or not floating; or
            sharded and no matrix.
    """
    weight = module._parameters.get(key)
    if weight is None:
        raise UnsupportedLayerError(
            "its weight is computed by a forward pre-hook (pruning, or the old weight_norm or spectral_norm): use "
            "torch.nn.utils.parametrizations, or make the pruning permanent with torch.nn.utils.prune.remove"
        )
    if is_lazy(weight):
        raise UnsupportedLayerError("its lazy weight has no shape yet: run one forward pass first")
    if weight.is_meta:
        raise UnsupportedLayerError("its weight is on the meta device: materialise the model first")
    if is_sharded(weight):
        _check_sharding(weight)
    kind = type(weight.data).__name__
    is_plain = (type(weight.data) is Tensor or is_sharded(weight)) and weight.layout == torch.strided
    if not is_plain or not weight.is_floating_point() or weight.element_size() < 2:
        raise UnsupportedLayerError(
            f"its weight is a {kind} of {weight.dtype}, {weight.layout}, not a dense fp64, fp32, fp16 or bf16 tensor"
        )
    return weight


def _check_sharding(weight: Tensor) -> None:
    """Refuse the DTensors whose singular vectors cannot be had from the shards and one whole side.

    Raises:
        UnsupportedLayerError: Saying what to do instead.
    """
    if weight.dim() != 2:
        raise UnsupportedLayerError(
            f"its weight of shape {tuple(weight.shape)} is a DTensor (FSDP2, tensor parallel), which is supported for "
            "linear layers only: keep it whole with fully_shard(..., ignored_params=...)"
        )
    placements = weight.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedLayerError(
            f"its weight is a DTensor placed {placements}, a sum that is still due: redistribute it first"
        )
    sharded = [placement for placement in placements if not placement.is_replicate()]
    columns = [placement for placement in sharded if placement.dim == 1]
    if len(columns) < len(sharded) and [type(p).__name__ for p in columns] not in ([], ["Shard"]):
        raise UnsupportedLayerError(
            f"its weight is a DTensor placed {placements}: of two sharded sides, the second may be so along one mesh "
            "dimension only. Shard it along one side"
        )


def _refuse(reason: str) -> Callable[[nn.Module, str], LinearOperator]:
    def refuse(module: nn.Module, name: str) -> LinearOperator:
        raise UnsupportedLayerError(reason)

    return refuse


for _types, _reason in (
    (
        (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm),
        "a normalisation is bounded in its place in the graph only: pass example_input=",
    ),
    ((nn.MultiheadAttention,), "dot-product attention has no finite Lipschitz constant"),
    ((nn.Embedding, nn.EmbeddingBag), "an embedding is a look-up, not a linear map: start at its output"),
    ((nn.Bilinear,), "a product of two inputs has no finite Lipschitz constant"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers are not supported"),
):
    for _type in _types:
        operator_of.register(_type)(_refuse(_reason))


def carries_weight(module: nn.Module) -> bool:
    """Whether a module must have an operator: it owns parameters, or its type is known to scale its input."""
    return (
        any(p is not None for p in module._parameters.values())
        or parametrize.is_parametrized(module)
        or operator_of.dispatch(type(module)) is not operator_of.dispatch(object)
        or _is_quantised(module)
        or is_lora(module)
    )


_REGISTERED: set[type[nn.Module]] = set()


def register_matrix(module_type: type[nn.Module], function: Callable[[Any], Tensor]) -> None:
    """Take what `function` returns for the matrix (m, n) of every module of a type, with all that is in the module."""

    def operator(module: nn.Module, name: str) -> LinearOperator:
        def compute() -> Tensor:
            with eval_mode(module):
                return _checked_matrix(function(module), module_type)

        compute()
        return ComputedMatrixOperator(name, module, compute, tuple(module.parameters()))

    operator_of.register(module_type)(operator)
    _REGISTERED.add(module_type)


def _checked_matrix(matrix: object, module_type: type[nn.Module]) -> Tensor:
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.is_floating_point() or matrix.numel() == 0:
        got = f"shape {tuple(matrix.shape)}, {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"Expected the function registered for {module_type.__name__} to return a floating-point matrix (m, n), "
            f"got {got}."
        )
    return matrix


def is_registered(module: nn.Module) -> bool:
    """Whether :func:`register_matrix` has told the matrix of a module."""
    return not _REGISTERED.isdisjoint(type(module).__mro__)


def _is_quantised(module: nn.Module) -> bool:
    """Whether the weight is a method, as in torch.ao.nn.quantized; a submodule may have that name too."""
    weight = getattr(module, "weight", None)
    return callable(weight) and not isinstance(weight, nn.Module)
