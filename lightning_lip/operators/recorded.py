"""Convolutions whose input size is not given: it is recorded in the first forward pass of training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.operators.base import LinearOperator, MatrixOperator, ParametrizedMatrixOperator
from lightning_lip.operators.convolution import ConvolutionOperator, check_convolution
from lightning_lip.operators.known import check_weight


class _Recorder:
    """A forward pre-hook: keeps the shape of the first input that a module sees with gradients enabled."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.other: tuple[int, ...] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Gradients, not the module's mode: a frozen backbone trains in eval mode, a validation has no gradients.
        if not torch.is_grad_enabled() or not inputs or not isinstance(inputs[0], Tensor):
            return
        # The last dimensions: a convolution also takes one sample without a batch dimension.
        shape = tuple(inputs[0].shape[-(len(module.kernel_size) + 1) :])  # type: ignore[arg-type]
        if self.shape is None:
            self.shape = shape
        elif self.other is None and shape != self.shape:
            self.other = shape  # the warning comes later: a compiled forward pass could not give it


class RecordedConvolution(LinearOperator):
    """A :class:`ConvolutionOperator` at the size of the first input that the module sees with gradients enabled.

    A forward pre-hook records it, until :meth:`stop_recording` or the end of the operator. If the size changes later,
    the first one stays, and there is one warning.

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
        self._recorder, self._warned = _Recorder(), False
        self._handle = module.register_forward_pre_hook(self._recorder)
        _forget_compiled_code()
        self._known: ConvolutionOperator | None = None

    def stop_recording(self) -> None:
        """Take the hook off the module; a size that is known stays."""
        self._handle.remove()

    def __del__(self) -> None:
        """Take the hook off the module."""
        if "_handle" in vars(self):
            self.stop_recording()

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
        if self._recorder.other is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"Layer {self.name!r} now sees inputs of shape {self._recorder.other}; its spectral norm stays that at "
                f"the first one, {self._recorder.shape}. Pass example_input= to choose another.",
                stacklevel=2,
            )
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
        """Return the kernel; one that is not parametrised also while the input's size is unknown."""
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


def stop_recording(operators: Iterable[LinearOperator]) -> None:
    """Take the hooks of the operators that record sizes off their modules."""
    for operator in operators:
        if isinstance(operator, RecordedConvolution):
            operator.stop_recording()


def _forget_compiled_code() -> None:
    """Have torch.compile compile anew: what it compiled before does not call a hook, and it does not look for new ones.

    (``torch._dynamo.config.skip_nnmodule_hook_guards`` is True by default.)
    """
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
