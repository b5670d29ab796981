"""Convolutions whose input size is not given: it is recorded in the first forward pass of training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import ScaledOperator
from lightning_lip.operators.convolutions.convolution import ConvolutionOperator, Sizes
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


class RecordedConvolution(ConvolutionOperator):
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
        super().__init__(name, module, None)
        if not parametrize.is_parametrized(module, "weight"):
            check_weight(module)
        self._recorder, self._warned = _Recorder(), False
        self._handle = module.register_forward_pre_hook(self._recorder)
        _forget_compiled_code()

    def saw(self, shape: tuple[int, ...]) -> None:
        """Take a size that was seen otherwise, (c_in, *spatial), unless one is recorded."""
        if self._recorder.shape is None:
            self._recorder.shape = shape

    def stop_recording(self) -> None:
        """Take the hook off the module; a size that is known stays."""
        self._handle.remove()

    def __del__(self) -> None:
        """Take the hook off the module."""
        if "_handle" in vars(self):
            self.stop_recording()

    @property
    def _sizes(self) -> Sizes:
        if self._known is None:
            if self._recorder.shape is None:
                raise RuntimeError(
                    f"The input size of convolution {self.name!r} is not known yet: run one forward pass of training "
                    f"first, or pass example_input=; a layer that training never calls is left out with "
                    f"exclude={self.name!r}."
                )
            self._known = self._at(self._recorder.shape)
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


def stop_recording(operators: Iterable[LinearOperator]) -> None:
    """Take the hooks of the operators that record sizes off their modules."""
    for convolution in recorded(operators):
        convolution.stop_recording()


def recorded(operators: Iterable[LinearOperator]) -> list[RecordedConvolution]:
    """Return the convolutions among operators that record sizes, those fused with a normalisation included."""
    bases = (operator.base if isinstance(operator, ScaledOperator) else operator for operator in operators)
    return [base for base in bases if isinstance(base, RecordedConvolution)]


def _forget_compiled_code() -> None:
    """Have torch.compile compile anew: what it compiled before does not call a hook, and it does not look for new ones.

    (``torch._dynamo.config.skip_nnmodule_hook_guards`` is True by default.)
    """
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()
