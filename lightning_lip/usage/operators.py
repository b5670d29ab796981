"""Linear operators that no class tells: of weights that a forward pass showed, and of types that the user registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip.checks import check_callable
from lightning_lip.constants.modules import ConstantRule, register_constant
from lightning_lip.constants.pooling import per_dimension
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.kernels.tensors import is_sharded
from lightning_lip.operators.base import LinearOperator, MatrixOperator
from lightning_lip.operators.composed import ComputedMatrixOperator
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator
from lightning_lip.operators.convolutions.symbol import Convolutions, SymbolOperator
from lightning_lip.operators.known import check_weight, register_matrix
from lightning_lip.usage.records import Use
from lightning_lip.usage.values import Stored


class BlocksOperator(LinearOperator):
    """G matrices side by side, ``x_g -> W_g x_g``: heads or experts with weights of their own; its norm is the largest.

    Args:
        name: The layer's name in the model.
        module: The layer.
        compute: Returns the matrices, shape (G, m, n), differentiable in the parameters.
        parameters: What they are computed from.
    """

    def __init__(
        self, name: str, module: nn.Module, compute: Callable[[], Tensor], parameters: tuple[nn.Parameter, ...]
    ) -> None:
        super().__init__(name, module)
        self._compute = compute
        self._parameters = parameters

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (G, n)."""
        blocks, _, n = self.weight().shape
        return blocks, n

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (G, m)."""
        blocks, m, _ = self.weight().shape
        return blocks, m

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What the matrices are computed from."""
        return self._parameters

    def weight(self) -> Tensor:
        """Return the matrices, shape (G, m, n)."""
        return self._compute()

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, G, n) to (r, G, m)."""
        return torch.einsum("gmn,rgn->rgm", self.weight().to(inputs.dtype), inputs)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, G, m) to (r, G, n)."""
        return torch.einsum("gmn,rgm->rgn", self.weight().to(outputs.dtype), outputs)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, W v>``, shape (), in the vectors' dtype."""
        return left @ self.apply(right.view(1, *self.domain_shape)).flatten()


def operator_in_use(use: Use, convolutions: Convolutions = "symbol") -> LinearOperator:
    """Return the operator of a weight that a forward pass showed.

    Args:
        use: How it was used.
        convolutions: Whether the norm of a convolution is that of its symbol, or at the size of the input that it had.

    Raises:
        UnsupportedLayerError: If the weight cannot be worked with, or the convolution is called in an unknown way.
    """
    weight, owner = use.weight, use.weight.owner
    if isinstance(weight, Stored):
        check_weight(weight.module, weight.key)
    elif any(is_sharded(parameter) for parameter in weight.parameters):
        raise UnsupportedLayerError(
            "its weight is computed from DTensors (FSDP2, tensor parallel): keep it whole with fully_shard(..., "
            "ignored_params=...)"
        )
    name = weight.full_name
    if use.convolution is not None:
        return _convolution(use, convolutions)
    if "blocks" in use.layouts:
        return BlocksOperator(name, owner.layer, weight.compute, weight.parameters)
    # For x W the matrix is W^T, which has the same norm, and the same gradient in W.
    return _matrix(use)


def _matrix(use: Use) -> MatrixOperator:
    """Return the operator that holds a weight: of a matrix its own, of a kernel the source."""
    weight, layer = use.weight, use.weight.owner.layer
    if not isinstance(weight, Stored):
        return ComputedMatrixOperator(weight.full_name, layer, weight.compute, weight.parameters)
    operator = MatrixOperator(weight.full_name, weight.module, weight.key)
    operator.module = layer
    return operator


def _convolution(use: Use, convolutions: Convolutions) -> LinearOperator:
    assert use.convolution is not None
    function, settings, domain_shape = use.convolution
    weight = use.weight
    kind: type[Any] = getattr(nn, "Conv" + function.removeprefix("conv_").removeprefix("conv").capitalize())
    rank = len(weight.shape) - 2
    settings = {
        key: value if key == "groups" or isinstance(value, str) else per_dimension(value, rank)
        for key, value in settings.items()
    }
    outer, inner = weight.shape[:2]
    inner *= settings.get("groups", 1)
    channels = (outer, inner) if "transpose" in function else (inner, outer)
    if channels[0] != domain_shape[0]:
        raise UnsupportedLayerError(f"its kernel of shape {weight.shape} does not fit its input {domain_shape}")
    convolution: nn.Module = kind(*channels, weight.shape[2:], bias=False, device="meta", **settings)
    if convolutions == "symbol":
        return SymbolOperator(weight.full_name, convolution, None, _matrix(use))
    return ConvolutionOperator(weight.full_name, convolution, domain_shape, _matrix(use))


def register_operator(
    module_type: type[nn.Module], function: Callable[[Any], Tensor], norm: ConstantRule | None = None
) -> None:
    """State what matrix a module type of your own applies: its norm then counts in every product of norms.

    The matrix stands for the module and all that is in it; it is believed, not checked. Its gradient goes to the
    parameters that it is computed from. It also serves subclasses.

    No traced bound and no certificate rests on it: a trace looks at what the forward pass computes, and refuses what it
    does not know, unless a constant is stated too.

    Args:
        module_type: A subclass of ``nn.Module``.
        function: ``function(module) -> matrix (m, n)``, differentiable in the module's parameters, called in eval mode.
        norm: ``norm(module) -> float``, an upper bound of the module's Lipschitz constant for traced bounds and
            certificates, as in :func:`~lightning_lip.register_constant`.

    Raises:
        TypeError: If `module_type` is no module type, or `function` or `norm` is not callable.

    Example:
        >>> import torch
        >>> from lightning_lip import LipschitzRegularizer, register_operator
        >>> class Mirror(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.v = torch.nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x - 2 * (x @ self.v)[:, None] * self.v
        >>> register_operator(Mirror, lambda module: torch.eye(3) - 2 * torch.outer(module.v, module.v))
        >>> LipschitzRegularizer(Mirror(), coefficient=1.0).bound().detach().round(decimals=4)
        tensor(5., dtype=torch.float64)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"Expected `module_type` to be a subclass of torch.nn.Module, got {module_type!r}.")
    if not callable(function):
        raise TypeError(f"Expected `function` to be a callable (module) -> matrix, got {type(function).__name__}.")
    if norm is not None:
        check_callable("norm", norm, "(module) -> float, or None")
        register_constant(module_type, norm)
    register_matrix(module_type, function)
