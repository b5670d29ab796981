"""A module's weight as a linear operator.

What a layer cannot be is as important as what it is: a selected module whose operator is not known is refused by name.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_lip.kernels.tensors import is_sharded
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.models.modules import eval_mode, is_lora, keeps_forward


class LinearOperator(ABC):
    """A layer's weight as a linear map, with what an iteration and a penalty need of it.

    Attributes:
        name: The module's name in the model, without the prefixes that wrappers (DDP, torch.compile) add.
        module: The module that owns the weight.
        multiplicity: How often the operator stands in the network: a weight shared by k layers counts k times.
    """

    is_matrix = False
    """Whether :meth:`weight` is the operator's matrix (m, n), which the compiled kernels can serve."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.multiplicity = 1

    @property
    @abstractmethod
    def domain_shape(self) -> tuple[int, ...]:
        """Shape of one input of the operator."""

    @property
    @abstractmethod
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape of one output of the operator."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is, or is computed from."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the present weight, differentiable in :attr:`parameters`, computed with eval semantics."""

    @abstractmethod
    def apply(self, inputs: Tensor) -> Tensor:
        """Map a batch (r, *domain_shape) to (r, *codomain_shape)."""

    @abstractmethod
    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map a batch (r, *codomain_shape) to (r, *domain_shape)."""

    @property
    def block_shape(self) -> tuple[int, int]:
        """How long the vectors of a block are, and how many there can be: of the domain; a matrix's shorter side."""
        domain, codomain = math.prod(self.domain_shape), math.prod(self.codomain_shape)
        return domain, min(domain, codomain)

    def leading_vectors(self) -> tuple[Tensor, Tensor] | None:
        """Return the leading singular vectors u, v (flat) where a closed form gives them exactly; None otherwise."""
        return None

    @abstractmethod
    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, W v>``, shape (), differentiable in :attr:`parameters`.

        For the leading singular vectors it is the spectral norm and its gradient is the spectral norm's
        (``u v^T`` for a matrix); for any unit u, v the gradient is an epsilon-subgradient, epsilon = sigma_1 - u^T W v.

        Args:
            left: u, unit, flat, of as many elements as the codomain.
            right: v, unit, flat, of as many elements as the domain.
        """

    def norm_gradients(
        self, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of :meth:`norm` in some of the parameters; None where one has no part in it."""
        with torch.enable_grad():
            return torch.autograd.grad(self.norm(left, right), parameters, allow_unused=True)

    def add_norm_gradients_(
        self, factor: float | Tensor, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Add `factor` times the gradients of :meth:`norm` to the ``.grad`` of some parameters, made where missing.

        A zero adds zeros, also where the gradient is NaN.
        """
        # The norm is linear in u: with c u its gradient needs no scaling of its own.
        for parameter, gradient in zip(parameters, self.norm_gradients(factor * left, right, parameters), strict=True):
            if gradient is None:
                continue
            gradient = _unless_zero(factor, gradient)
            if parameter.grad is None:
                # Not the gradient itself, which autograd may return for two parameters, or expanded from less memory.
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient)

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """The parameter that *is* the matrix (m, n), if kernels may write its gradient in place; else None."""
        return None

    @property
    def trainable(self) -> bool:
        """Whether any of the parameters requires a gradient."""
        return any(p.requires_grad for p in self.parameters)


def _unless_zero(factor: float | Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with a factor in it: zeros where that is zero, not 0 * NaN of a weight gone bad."""
    if isinstance(factor, Tensor):
        return torch.where((factor == 0).to(gradient.device), 0.0, gradient)
    return gradient if factor != 0 else torch.zeros_like(gradient)  # no copy as large as the weight


class MatrixOperator(LinearOperator):
    """``x -> W x`` for a weight W of shape (m, n), as in ``nn.Linear``."""

    is_matrix = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        # A look-up in this dict costs 30 ns, through nn.Module.__getattr__ a microsecond; and unlike a reference to
        # the Parameter it survives `load_state_dict(assign=True)`.
        self._slots = module._parameters

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (n,)."""
        return (self.weight().shape[1],)

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (m,)."""
        return (self.weight().shape[0],)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight itself."""
        return (self._parameter,)

    @property
    def _parameter(self) -> nn.Parameter:
        parameter = self._slots.get("weight")
        if parameter is None:
            raise RuntimeError(
                f"The weight of layer {self.name!r} is no longer a parameter of its own (parametrised, pruned or "
                "removed after the layers were selected): select the layers again."
            )
        return parameter

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """The weight itself, shape (m, n)."""
        return self._parameter

    def weight(self) -> Tensor:
        """Return W, shape (m, n)."""
        return self._parameter

    @property
    def block_shape(self) -> tuple[int, int]:
        """The side of :func:`iterates_on_codomain`, and the shorter side."""
        weight = self.weight()
        return weight.shape[0 if iterates_on_codomain(weight) else 1], min(weight.shape)

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, n) to (r, m)."""
        return inputs @ self.weight().to(inputs.dtype).mT

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, m) to (r, n)."""
        return outputs @ self.weight().to(outputs.dtype)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``u^T W v``, shape (), in the vectors' dtype."""
        return left @ (self.weight().to(left.dtype) @ right)


class ParametrizedMatrixOperator(MatrixOperator):
    """A matrix that ``torch.nn.utils.parametrize`` computes from other parameters.

    A ``.grad`` written on the computed weight would be lost, so there is no direct parameter: gradients are pulled
    back to the originals through the parametrization.
    """

    @property
    def _parametrizations(self) -> nn.Module:
        if not parametrize.is_parametrized(self.module, "weight"):
            raise RuntimeError(
                f"The weight of layer {self.name!r} lost its parametrization after the layers were selected: select "
                "the layers again."
            )
        parametrizations = self.module.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        return parametrizations["weight"]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The originals and the parametrizations' own parameters."""
        return tuple(self._parametrizations.parameters())

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """None: the weight is computed."""
        return None

    def weight(self) -> Tensor:
        """Return W, shape (m, n), computed in eval mode: a parametrization's own buffers do not change."""
        with eval_mode(self._parametrizations):
            weight: Tensor = self._parametrizations()
        return weight


@singledispatch
def operator_of(module: nn.Module, name: str) -> LinearOperator:
    """Return the linear operator of a module that has weights.

    Args:
        module: The module.
        name: Its name in the model.

    Raises:
        UnsupportedLayerError: If the operator is not known; the message is the reason.
    """
    if callable(getattr(module, "weight", None)):
        raise UnsupportedLayerError("its weight is quantised")
    if is_lora(module):
        raise UnsupportedLayerError("a LoRA layer is W + s B A, not its factors: merge the adapter first")
    own = [key for key, _ in module.named_parameters(recurse=False)]
    raise UnsupportedLayerError(f"what it computes from its parameters {own} is not known")


@operator_of.register
def _(module: nn.Linear, name: str) -> LinearOperator:
    if not keeps_forward(module, nn.Linear):
        raise UnsupportedLayerError("it has a forward of its own, so it is not known to compute x W^T + b")
    if parametrize.is_parametrized(module, "weight"):
        computed = ParametrizedMatrixOperator(name, module)
        if any(is_sharded(p) for p in computed.parameters):
            raise UnsupportedLayerError(
                "its parametrised weight is computed from DTensors (FSDP2, tensor parallel): keep it whole with "
                "fully_shard(..., ignored_params=...)"
            )
        return computed
    weight = check_weight(module)
    if weight.dim() != 2 or weight.numel() == 0:
        raise UnsupportedLayerError(
            f"its weight has shape {tuple(weight.shape)} instead of (out_features, in_features), as FSDP1's shards do"
        )
    return MatrixOperator(name, module)


def check_weight(module: nn.Module) -> nn.Parameter:
    """Return a layer's own weight, if it is a tensor that can be worked with.

    Raises:
        UnsupportedLayerError: If it is computed by a hook, lazy, on the meta device, sparse or not floating; or
            sharded and no matrix.
    """
    weight = module._parameters.get("weight")
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


def iterates_on_codomain(weight: Tensor) -> bool:
    """Whether the singular vectors that an iteration keeps of a matrix (m, n) are left ones.

    They live on the shorter side; of a weight that is sharded along one side, on the other; along both, on the domain.
    """
    sharded = {placement.dim for placement in getattr(weight, "placements", ()) if not placement.is_replicate()}
    return sharded == {1} if sharded else weight.shape[0] < weight.shape[1]


def _refuse(reason: str) -> Callable[[nn.Module, str], LinearOperator]:
    def refuse(module: nn.Module, name: str) -> LinearOperator:
        raise UnsupportedLayerError(reason)

    return refuse


for _types, _reason in (
    (
        (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm),
        "a normalisation is bounded in its place in the graph only: pass example_input=",
    ),
    ((nn.modules.conv._ConvNd,), "a convolution needs the size of its input: pass example_input="),
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
        or callable(getattr(module, "weight", None))
        or is_lora(module)
    )
