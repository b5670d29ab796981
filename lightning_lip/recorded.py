"""Convolutions whose input size is not told: it is recorded in the first training forward pass."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.convolutions import ConvolutionOperator, check_convolution
from lightning_lip.operators import LinearOperator, check_weight


class RecordedConvolution(LinearOperator):
    """A :class:`ConvolutionOperator` at the size of the first input that the module sees in training mode.

    A forward pre-hook on the module records it. A later change of size keeps the first one, with one warning.

    Args:
        name: The module's name in the model.
        module: The convolution.

    Raises:
        UnsupportedLayerError: If the module has a forward of its own or a weight that cannot be worked with.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        check_convolution(module)
        if not parametrize.is_parametrized(module, "weight"):
            check_weight(module)
        self._known: ConvolutionOperator | None = None
        self._warned = False
        module.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not module.training or not inputs or not isinstance(inputs[0], Tensor):
            return
        # The last dimensions: a convolution also takes one sample without a batch dimension.
        shape = tuple(inputs[0].shape[-(len(module.kernel_size) + 1) :])  # type: ignore[arg-type]
        if self._known is None:
            self._known = ConvolutionOperator(self.name, module, shape)
        elif shape != self._known.domain_shape and not self._warned:
            self._warned = True
            warnings.warn(
                f"Layer {self.name!r} now sees inputs of shape {shape}; its spectral norm stays that at the first one, "
                f"{self._known.domain_shape}. Pass example_input= to choose another.",
                stacklevel=2,
            )

    @property
    def is_known(self) -> bool:
        """Whether a forward pass in training mode has shown the size."""
        return self._known is not None

    @property
    def _operator(self) -> ConvolutionOperator:
        if self._known is None:
            raise RuntimeError(
                f"The input size of convolution {self.name!r} is not known yet: run one forward pass in training mode "
                "first, or pass example_input=."
            )
        return self._known

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (c_in, *spatial)."""
        return self._operator.domain_shape

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (c_out, *spatial)."""
        return self._operator.codomain_shape

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The kernel, or the parameters that its parametrization computes it from."""
        if parametrize.is_parametrized(self.module, "weight"):
            return tuple(self.module.parametrizations["weight"].parameters())  # type: ignore[index, union-attr]
        return (check_weight(self.module),)

    def weight(self) -> Tensor:
        """Return the kernel."""
        return self._operator.weight()

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, *domain_shape) to (r, *codomain_shape)."""
        return self._operator.apply(inputs)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, *codomain_shape) to (r, *domain_shape)."""
        return self._operator.adjoint(outputs)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, A v>``, shape ()."""
        return self._operator.norm(left, right)
