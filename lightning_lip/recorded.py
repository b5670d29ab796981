"""Convolutions whose input size is not told: it is recorded in the first forward pass of training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.convolutions import ConvolutionOperator, check_convolution
from lightning_lip.operators import LinearOperator, MatrixOperator, ParametrizedMatrixOperator, check_weight


class _Recorder:
    """Keeps the shape of the first input that a module sees with gradients enabled; one a module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shape: tuple[int, ...] | None = None
        self._warned = False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Gradients, not the module's mode: a frozen backbone trains in eval mode, a validation has no gradients.
        if not torch.is_grad_enabled() or not inputs or not isinstance(inputs[0], Tensor):
            return
        # The last dimensions: a convolution also takes one sample without a batch dimension.
        shape = tuple(inputs[0].shape[-(len(module.kernel_size) + 1) :])  # type: ignore[arg-type]
        if self.shape is None:
            self.shape = shape
        elif shape != self.shape and not self._warned:
            self._warned = True
            warnings.warn(
                f"Layer {self.name!r} now sees inputs of shape {shape}; its spectral norm stays that at the first one, "
                f"{self.shape}. Pass example_input= to choose another.",
                stacklevel=2,
            )


_recorders: WeakKeyDictionary[nn.Module, _Recorder] = WeakKeyDictionary()


class RecordedConvolution(LinearOperator):
    """A :class:`ConvolutionOperator` at the size of the first input that the module sees with gradients enabled.

    A forward pre-hook records it: one for each module, however many operators are made of it, and it stays. A later
    change of size keeps the first one, with one warning.

    Args:
        name: The module's name in the model.
        module: The convolution.

    Raises:
        UnsupportedLayerError: If the module has a forward of its own or a weight that cannot be worked with.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        check_convolution(module)
        parametrized = parametrize.is_parametrized(module, "weight")
        if not parametrized:
            check_weight(module)
        self._source: MatrixOperator = (ParametrizedMatrixOperator if parametrized else MatrixOperator)(name, module)
        if module not in _recorders:
            _recorders[module] = _Recorder(name)
            module.register_forward_pre_hook(_recorders[module])
        self._recorder = _recorders[module]
        self._known: ConvolutionOperator | None = None

    @property
    def _operator(self) -> ConvolutionOperator:
        if self._known is None:
            if self._recorder.shape is None:
                raise RuntimeError(
                    f"The input size of convolution {self.name!r} is not known yet: run one forward pass of training "
                    f"first, or pass example_input=; a layer that training never calls is left out with "
                    f"exclude={self.name!r}."
                )
            self._known = ConvolutionOperator(self.name, self.module, self._recorder.shape)
        return self._known

    @property
    def spatial(self) -> tuple[int, ...] | None:
        """The spatial size of one input; None while it is unknown."""
        return None if self._recorder.shape is None else self._recorder.shape[1:]

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
        return self._source.parameters

    def weight(self) -> Tensor:
        """Return the kernel; an own one also while the input's size is unknown."""
        return self._operator.weight() if parametrize.is_parametrized(self.module, "weight") else self.parameters[0]

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, *domain_shape) to (r, *codomain_shape)."""
        return self._operator.apply(inputs)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, *codomain_shape) to (r, *domain_shape)."""
        return self._operator.adjoint(outputs)

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, A v>``, shape ()."""
        return self._operator.norm(left, right)

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of :meth:`norm` in the kernel."""
        return self._operator.weight_gradient(left, right)

    def norm_gradients(
        self, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of :meth:`norm` in some of the parameters."""
        return self._operator.norm_gradients(left, right, parameters)

    def add_norm_gradients_(
        self, factor: float | Tensor, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Add `factor` times the gradients of :meth:`norm` to the ``.grad`` of some of the parameters."""
        self._operator.add_norm_gradients_(factor, left, right, parameters)
