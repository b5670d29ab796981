"""Operators that only a traced graph shows: weights used functionally, learned scales, batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.kernels.tensors import compute_dtype
from lightning_lip.operators.base import (
    LinearOperator,
    MatrixOperator,
    ParametrizedMatrixOperator,
    add_gradient_,
    unless_zero,
)
from lightning_lip.operators.convolutions.convolution import KernelOperator


class ComputedMatrixOperator(MatrixOperator):
    """A matrix that the model's forward computes from its parameters; gradients are pulled back through that.

    Args:
        name: The name of the module in whose forward it is computed.
        module: That module.
        compute: Returns the matrix, shape (m, n), differentiable in the parameters.
        parameters: What it is computed from.
    """

    def __init__(
        self, name: str, module: nn.Module, compute: Callable[[], Tensor], parameters: tuple[nn.Parameter, ...]
    ) -> None:
        super().__init__(name, module)
        self._compute = compute
        self._parameters = parameters

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What the matrix is computed from."""
        return self._parameters

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """None: the matrix is computed."""
        return None

    def weight(self) -> Tensor:
        """Return W, shape (m, n)."""
        return self._compute()


class LoraOperator(ComputedMatrixOperator):
    """A layer with LoRA adapters as it acts, merged: ``W + sum s B A`` over the active adapters (Hu et al., 2021).

    Args:
        name: The adapted layer's name.
        module: A LoRA layer of peft around a matrix: ``base_layer``, and ``lora_A``, ``lora_B``, ``scaling`` by
            adapter.

    Raises:
        UnsupportedLayerError: If it is of another kind: DoRA and the like, or around no dense matrix.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        base, own = getattr(module, "base_layer", None), vars(module)
        weight = base._parameters.get("weight") if isinstance(base, nn.Module) else None
        if weight is None or weight.dim() != 2 or not weight.is_floating_point() or type(weight.data) is not Tensor:
            raise UnsupportedLayerError("it is a LoRA adapter around something other than a dense matrix")
        scaling, active = own.get("scaling"), getattr(module, "active_adapters", None)
        if not isinstance(scaling, dict) or not isinstance(active, (list, tuple)):
            raise UnsupportedLayerError("it is a LoRA layer of another kind than peft's: merge the adapter first")
        others = {*(own.get("lora_variant") or {}), *(k for k, v in (own.get("use_dora") or {}).items() if v)}
        if others & {*active}:
            raise UnsupportedLayerError("its adapter is no plain LoRA (W + s B A), but DoRA, say: merge it first")
        layer: Any = module
        factors = [part[k].weight for k in active if k in layer.lora_A for part in (layer.lora_A, layer.lora_B)]
        super().__init__(name, module, self._merged, (weight, *factors))

    def _merged(self) -> Tensor:
        module: Any = self.module
        weight: Tensor = module.base_layer.weight
        if module.merged or module.disable_adapters:
            return weight
        for key in module.active_adapters:
            if key in module.lora_A:
                change = module.scaling[key] * (module.lora_B[key].weight @ module.lora_A[key].weight)
                weight = weight + (change.mT if getattr(module, "fan_in_fan_out", False) else change).to(weight.dtype)
        return weight


class TracedParametrizationOperator(ParametrizedMatrixOperator):
    """A layer's parametrised matrix as it is in the graph, which knows the state that the layer is called in.

    Args:
        name: The layer's name.
        module: The layer.
        compute: Returns the matrix, by the graph's own operations, differentiable in the parameters.
    """

    def __init__(self, name: str, module: nn.Module, compute: Callable[[], Tensor]) -> None:
        super().__init__(name, module)
        self._compute = compute

    def weight(self) -> Tensor:
        """Return W, shape (m, n).

        Raises:
            RuntimeError: If the parametrization is gone.
        """
        _ = self._parametrizations
        return self._compute()


def computed_source(
    name: str, module: nn.Module, compute: Callable[[], Tensor], parameters: tuple[nn.Parameter, ...] | None
) -> ComputedMatrixOperator | TracedParametrizationOperator:
    """Return the source of a kernel that is as it is in the graph: parametrised, computed, or a constant.

    Args:
        name: The layer's name.
        module: The layer, or a convolution of its geometry whose own weight does not count.
        compute: Returns the kernel, by the graph's own operations, differentiable in the parameters.
        parameters: What the kernel is computed from; None for those of the layer's parametrization.
    """
    if parameters is None:
        return TracedParametrizationOperator(name, module, compute)
    return ComputedMatrixOperator(name, module, compute, parameters)


class DiagonalOperator(LinearOperator):
    """``x -> s * x`` with the n entries of s: batch normalisation in eval mode, a norm's gamma, a learned scale.

    Where s multiplies a larger input by broadcasting, each entry stands for all its copies: the norm, ``max|s|``, is
    the same. :meth:`leading_vectors` gives it *exactly*, no iteration is needed.

    Args:
        name: The name of the module that owns s.
        module: That module.
        compute: Returns s, any shape, differentiable in the parameters.
        parameters: What it is computed from.
    """

    def __init__(
        self, name: str, module: nn.Module, compute: Callable[[], Tensor], parameters: tuple[nn.Parameter, ...]
    ) -> None:
        super().__init__(name, module)
        self._compute = compute
        self._parameters = parameters

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (n,)."""
        return (self.weight().numel(),)

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (n,)."""
        return self.domain_shape

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the entries are computed from; none for a normalisation without gamma."""
        return self._parameters

    def weight(self) -> Tensor:
        """Return s, shape (n,)."""
        return self._compute().flatten()

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, n) to (r, n)."""
        return inputs * self.weight().to(inputs.dtype)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, n) to (r, n)."""
        return self.apply(outputs)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, s v>``, shape (), in the vectors' dtype."""
        return left @ self.apply(right)

    @torch.no_grad()
    def leading_vectors(self) -> tuple[Tensor, Tensor]:
        """Return u and v, shape (n,) each: the unit vector at the largest entry, with the entry's sign in u."""
        s = self.weight()
        at = torch.nn.functional.one_hot(s.abs().argmax(), s.numel()).to(s.dtype)
        return at * torch.sign(s), at


class ScaledOperator(LinearOperator):
    """``diag(s) W``: a linear or convolutional layer and the batch normalisation, in eval mode, that follows it.

    Its norm is at most, and often far below, the product of the two norms.

    Args:
        base: W.
        name: The name of both.
        compute: Returns s, shape (c,): one entry for each output channel of W; fp64, differentiable in `parameters`.
        parameters: What s is computed from.
        has_gain: Whether s is the one parameter times numbers, entry by entry: gamma / sqrt(var + eps).

    Attributes:
        base: W.
        has_gain: As given.
    """

    def __init__(
        self,
        base: LinearOperator,
        name: str,
        compute: Callable[[], Tensor],
        parameters: tuple[nn.Parameter, ...],
        has_gain: bool = False,
    ) -> None:
        super().__init__(name, base.module)
        self.base = base
        self.has_gain = has_gain
        self._compute = compute
        self._parameters = parameters
        # A matrix of torch.nn.Linear may be sharded: its scaled one is iterated through its maps.
        self.is_matrix = isinstance(base, KernelOperator) and base.is_matrix
        self.symbol_geometry = base.symbol_geometry

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """The base's."""
        return self.base.domain_shape

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """The base's."""
        return self.base.codomain_shape

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The base's and the normalisation's."""
        return (*self.base.parameters, *self._parameters)

    def replace_parameters(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Take new parameters for old ones, the base's included."""
        super().replace_parameters(replaced)
        self.base.replace_parameters(replaced)

    @property
    def scale_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that s is computed from: gamma, or none."""
        return self._parameters

    def scale(self) -> Tensor:
        """Return s, shape (c,)."""
        return self._compute()

    def weight(self) -> Tensor:
        """Return the base's weight with its output channels scaled, in the shape of the base's weight."""
        weight = self.base.weight()
        return self._scaled_weight(self.scale().to(weight.dtype))

    @property
    def scales_rows(self) -> bool:
        """Whether the base's kernel is iterated, with its rows scaled: output channels are columns of others."""
        return self.symbol_geometry is not None and not getattr(self._convolution, "transposed", False)

    @property
    def _convolution(self) -> nn.Module:
        return self.base.convolution if isinstance(self.base, KernelOperator) else self.base.module

    def iterated(self) -> Tensor:
        """Return the base's kernel, or the scaled one; where it is a matrix, (rows, columns * taps)."""
        if self.scales_rows:
            return self.base.iterated()
        return self.weight().flatten(1) if self.is_matrix else self.weight()

    def row_scale(self) -> Tensor | None:
        """Return s, times the base's own, where rows are scaled."""
        own = self.base.row_scale()
        if not self.scales_rows:
            return own
        dtype = compute_dtype(self.base.iterated().dtype)
        scale = self.scale().detach().to(dtype)
        return scale if own is None else scale * own

    @property
    def written_parameter(self) -> nn.Parameter | None:
        """The base's kernel, where it is iterated with its rows scaled."""
        return self.base.written_parameter if self.scales_rows else None

    @property
    def gain(self) -> nn.Parameter | None:
        """Gamma, where :meth:`add_gain_gradient_` knows its gradient: channels are rows of an iterated kernel."""
        is_known = self.has_gain and (self.is_matrix or self.symbol_geometry is not None)
        return self._parameters[0] if is_known and not getattr(self._convolution, "transposed", False) else None

    def add_gain_gradient_(self, factor: float | Tensor, left: Tensor) -> None:
        """Add `factor` times the gradient of the norm's logarithm to gamma's ``.grad``, made where missing.

        It is ``|u_c|^2 / gamma_c``, u_c the entries of channel c: s is gamma times numbers, and at the singular vectors
        ``<u_c, s_c (W v)_c> = sigma |u_c|^2``. Zero where gamma is.

        Args:
            factor: Any factor, a number or a tensor of shape ().
            left: u, the left singular vector, real and imaginary part where it is complex.
        """
        gain = self._parameters[0]
        gamma = gain.detach().to(left.dtype)
        slopes = left.view(-1, len(gamma)).square().sum(0) * factor / gamma
        add_gradient_(gain, unless_zero(factor, torch.where(gamma == 0, 0.0, slopes)))

    def representative(self) -> Tensor:
        """Return the base's."""
        return self.base.representative()

    def _scaled_weight(self, scale: Tensor) -> Tensor:
        return self.scaled(self.base.weight().to(scale.dtype), scale)

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return a weight of the base's shape with its output channels scaled by `scale`, shape (c,)."""
        if not getattr(self._convolution, "transposed", False):
            return scale.view(-1, *[1] * (weight.dim() - 1)) * weight
        # (c_in, c_out / groups, ...): group g of the inputs feeds the g-th run of output channels.
        runs = scale.view(scale.numel() // weight.shape[1], 1, weight.shape[1], *[1] * (weight.dim() - 2))
        grouped = weight.view(runs.shape[0], -1, *weight.shape[1:])
        return (grouped * runs).view(weight.shape)

    def _broadcast(self, like: Tensor) -> Tensor:
        return self.scale().to(like.dtype).view(-1, *[1] * (like.dim() - 2))

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, *domain_shape) to (r, *codomain_shape)."""
        outputs = self.base.apply(inputs)
        return outputs * self._broadcast(outputs)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, *codomain_shape) to (r, *domain_shape)."""
        return self.base.adjoint(outputs * self._broadcast(outputs))

    def add_norm_gradients_(
        self, factor: float | Tensor, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Add `factor` times the gradients of :meth:`norm` to the ``.grad`` of some parameters, made where missing.

        For a convolution with its own kernel they are ``s_c G_c``, G the gradient of ``<u, W v>`` in the kernel, and
        ``<u_c, (W v)_c>`` in s_c, for each channel c: autograd over the kernel would take twice the time.
        """
        base = self.base
        kernel = base.weight() if isinstance(base, KernelOperator) and not base.convolution.transposed else None
        if kernel is None or kernel is not base.parameters[0] or isinstance(factor, Tensor) or factor == 0:
            super().add_norm_gradients_(factor, left, right, parameters)
            return
        assert isinstance(base, KernelOperator)
        gradient = base.weight_gradient(left, right)
        with torch.enable_grad():
            scale = self.scale()
        own = [p for p in parameters if p is not kernel]
        if own:
            # <u_c, (W v)_c>: the norm is linear in the kernel, and channel c's part of it in the kernel's row c.
            slopes = (gradient * kernel.detach()).flatten(1).sum(1)
            for parameter, slope in zip(own, torch.autograd.grad(scale, own, (factor * slopes).to(scale)), strict=True):
                add_gradient_(parameter, slope)
        if len(own) < len(parameters):
            factors = (factor * scale.detach()).to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
            add_gradient_(base.parameters[0], gradient, factors)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, diag(s) W v>``, shape (), in the vectors' dtype."""
        if isinstance(self.base, KernelOperator):
            # Linear in diag(s) W, which is a kernel: less work than the gradient through the map.
            weight = self._scaled_weight(self.scale().to(left.dtype))
            return (weight * self.base.weight_gradient(left, right)).sum()
        return left @ self.apply(right.view(1, *self.domain_shape)).flatten()
