"""A module's weight as a linear operator: what an iteration, a penalty and a certificate ask of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.kernels.waves import Geometry
from lightning_lip.models.modules import eval_mode


class LinearOperator(ABC):
    """A layer's weight as a linear map, with what an iteration and a penalty need of it.

    Attributes:
        name: The module's name in the model, without the prefixes that wrappers (DDP, torch.compile) add.
        module: The module that owns the weight.
        multiplicity: How often the operator stands in the network: a weight shared by k layers counts k times.
    """

    is_matrix = False
    """Whether :meth:`iterated` is the operator's matrix (m, n)."""

    symbol_geometry: Geometry | None = None
    """What :meth:`iterated` has for a symbol, where it is a convolution's kernel that is iterated as one."""

    slot: tuple[dict[str, nn.Parameter | None], str] | None = None
    """Where :attr:`written_parameter` is kept: the module's dictionary of parameters, and its key there."""

    _parameters: tuple[nn.Parameter, ...] = ()
    """What a weight is computed from, where :attr:`parameters` does not look it up in the module."""

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

    def replace_parameters(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Take new parameters for old ones, given by the ids of the old ones."""
        self._parameters = tuple(replaced.get(id(p), p) for p in self._parameters)

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the present weight, differentiable in :attr:`parameters`, computed with eval semantics."""

    def representative(self) -> Tensor:
        """Return a tensor of the weight's device and dtype, whose shape changes with the weight's; none is computed."""
        return self.weight()

    def iterated(self) -> Tensor:
        """Return what the kernels iterate: a matrix (m, n), or a symbol's kernel; its rows times :meth:`row_scale`."""
        return self.weight()

    def row_scale(self) -> Tensor | None:
        """Return s, shape (rows of all groups,), by which the rows of a symbol's kernel are multiplied, or None."""
        return None

    @property
    def written_parameter(self) -> nn.Parameter | None:
        """The parameter that :meth:`iterated` is, or whose view, if kernels may write its gradient; else None."""
        return self.direct_parameter

    def gradient_view(self, grad: Tensor) -> Tensor | None:
        """Return a gradient of :attr:`written_parameter` in the shape of :meth:`iterated`; None if no view has it."""
        return grad

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
            if gradient is not None:
                add_gradient_(parameter, unless_zero(factor, gradient))

    @property
    def direct_parameter(self) -> nn.Parameter | None:
        """The parameter that *is* the matrix (m, n), if kernels may write its gradient in place; else None."""
        return None


def add_gradient_(parameter: nn.Parameter, gradient: Tensor, factors: Tensor | None = None) -> None:
    """Add a gradient, times factors that broadcast, to a parameter's ``.grad``, made where missing."""
    if parameter.grad is None:
        # Not the gradient itself, which autograd may return for two parameters, or expanded from less memory.
        parameter.grad = torch.zeros_like(parameter)
    if factors is None:
        parameter.grad.add_(gradient)
    else:
        parameter.grad.addcmul_(gradient.to(parameter.grad), factors.to(parameter.grad))


def unless_zero(factor: float | Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient that was multiplied by `factor`, as zeros where that is 0: 0 * NaN would be NaN."""
    if isinstance(factor, Tensor):
        return torch.where((factor == 0).to(gradient.device), 0.0, gradient)
    return gradient if factor != 0 else torch.zeros_like(gradient)  # no copy as large as the weight


class MatrixOperator(LinearOperator):
    """``x -> W x`` for a weight W of shape (m, n), as in ``nn.Linear``.

    Args:
        name: The module's name in the model.
        module: The module that owns the weight.
        key: The weight's name in the module.

    Attributes:
        slot: A look-up in it costs 30 ns, through ``nn.Module.__getattr__`` a microsecond; and unlike a reference to
            the Parameter it survives ``load_state_dict(assign=True)``.
    """

    is_matrix = True
    slot: tuple[dict[str, nn.Parameter | None], str]

    def __init__(self, name: str, module: nn.Module, key: str = "weight") -> None:
        super().__init__(name, module)
        self.slot = (module._parameters, key)

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
        parameters, key = self.slot
        parameter = parameters.get(key)
        if parameter is None:
            raise RuntimeError(
                f"The weight of layer {self.name!r} is no longer a parameter of its own (parametrised, pruned or "
                "removed after the layers were selected): select the layers again, or trace the model again."
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


def iterates_on_codomain(weight: Tensor) -> bool:
    """Whether the singular vectors that an iteration keeps of a matrix (m, n) are left ones.

    They live on the shorter side. For a weight that is sharded along one side, they live on the other one; for a
    weight that is sharded along both, on the domain.
    """
    sharded = {placement.dim for placement in getattr(weight, "placements", ()) if not placement.is_replicate()}
    return sharded == {1} if sharded else weight.shape[0] < weight.shape[1]
