"""register_operator: the matrix of a layer of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_lip.constants.modules import ConstantRule, register_constant
from lightning_lip.operators.known import register_matrix


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
        >>> LipschitzRegularizer(Mirror(), coefficient=1.0).bound().round(decimals=4)
        tensor(5., dtype=torch.float64)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"Expected `module_type` to be a subclass of torch.nn.Module, got {module_type!r}.")
    if not callable(function):
        raise TypeError(f"Expected `function` to be a callable (module) -> matrix, got {type(function).__name__}.")
    if norm is not None:
        register_constant(module_type, norm)
    register_matrix(module_type, function)
