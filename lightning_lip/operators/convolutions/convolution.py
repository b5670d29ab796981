"""Convolutions as linear operators: at the size of their input, the true map, not the reshaped kernel.

The spectral norm of the kernel reshaped to (c_out, -1) lies 35% (3 x 3) to 72% (7 x 7) below the operator's.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.operators.base import LinearOperator, MatrixOperator, ParametrizedMatrixOperator
from lightning_lip.operators.convolutions.paddings import PaddingMode, check_padding, pad, pad_adjoint, padding_pairs

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Sizes(NamedTuple):
    """Shapes of one input and one output, and how far the larger side goes on behind the last tap."""

    domain: tuple[int, ...]
    codomain: tuple[int, ...]
    beyond: list[int]


class KernelOperator(LinearOperator):
    """What the kernel of a convolution does: the base of :class:`ConvolutionOperator` and of the kernel's symbol.

    Stride, dilation, groups, padding (numbers, ``"same"``, ``"valid"``) and padding mode are the module's own, read
    when the operator is made.

    Args:
        name: The module's name in the model.
        module: An ``nn.Conv1d``, ``2d``, ``3d`` or ``nn.ConvTranspose1d``, ``2d``, ``3d``; its weight may be
            parametrised.
        source: The kernel, where that is not the module's own weight; its module then owns the operator, and `module`
            tells the geometry.

    Raises:
        UnsupportedLayerError: If the module is no convolution, or has a forward of its own.
    """

    def __init__(self, name: str, module: nn.Module, source: MatrixOperator | None = None) -> None:
        super().__init__(name, module if source is None else source.module)
        self._convolution = module = check_convolution(module)
        if source is None:
            # Its weight is a parameter or parametrised, as a linear layer's is.
            parametrized = parametrize.is_parametrized(module, "weight")
            source = (ParametrizedMatrixOperator if parametrized else MatrixOperator)(name, module)
        self._source = source
        self._kernel_size = tuple(module.kernel_size)
        self._stride = tuple(module.stride)
        self._dilation = tuple(module.dilation)
        self._mode: PaddingMode = module.padding_mode
        self._pairs = padding_pairs(module.padding, self._kernel_size, self._dilation)

    @property
    def convolution(self) -> Convolution:
        """The module that tells the geometry."""
        return self._convolution

    @property
    def source(self) -> MatrixOperator:
        """What holds or computes the kernel."""
        return self._source

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps of each dimension."""
        return self._kernel_size

    @property
    @abstractmethod
    def place(self) -> Hashable:
        """What tells apart the operators of one kernel in several places of a network."""

    @property
    @abstractmethod
    def spatial(self) -> tuple[int, ...] | None:
        """The spatial size of the input that a certified norm is for; None for that of inputs of every size."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The kernel, or the parameters that its parametrization computes it from."""
        return self._source.parameters

    def replace_parameters(self, replaced: Mapping[int, nn.Parameter]) -> None:
        """Take new parameters for old ones, of which the kernel is computed."""
        self._source.replace_parameters(replaced)

    def weight(self) -> Tensor:
        """Return the kernel, shape (c_out, c_in / groups, *kernel_size); transposed, (c_in, c_out / groups, ...)."""
        return self._source.weight()

    @abstractmethod
    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of :meth:`norm`, which is linear in the kernel: of its shape, in the vectors' dtype."""

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``<u, A v>``, shape (), in the vectors' dtype."""
        return (self.weight().to(left.dtype) * self.weight_gradient(left, right)).sum()

    def norm_gradients(
        self, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of :meth:`norm` without its value, which would double the time."""
        with torch.enable_grad():
            weight = self.weight()
        gradient = self.weight_gradient(left, right).to(weight.dtype)
        if len(parameters) == 1 and parameters[0] is weight:
            return (gradient,)
        return torch.autograd.grad(weight, parameters, gradient, allow_unused=True)


class ConvolutionOperator(KernelOperator):
    """A convolution or transposed convolution without its bias, for inputs of one size.

    Stride, dilation, groups, padding (numbers, ``"same"``, ``"valid"``), every padding mode and output padding are
    the module's own, read when the operator is made; the adjoint is *exact*.

    A kernel of size 1 without padding applies one matrix (c_out, c_in), block-diagonal with groups, at every place that
    its stride reads. Its singular values, and the gradient of its norm, are those of that matrix. So the operator is
    taken at a single place, whatever the size of the input.

    Args:
        name: The module's name in the model.
        module: As in :class:`KernelOperator`. A transposed convolution is taken with its own ``output_padding``, as it
            is called without ``output_size``.
        domain_shape: Shape of one input, (c_in, *spatial); None where a subclass finds it later.
        source: As in :class:`KernelOperator`.

    Raises:
        UnsupportedLayerError: If the module is no convolution, or has a forward of its own.
        ValueError: If an input of `domain_shape` does not fit the module.
    """

    def __init__(
        self, name: str, module: nn.Module, domain_shape: Sequence[int] | None, source: MatrixOperator | None = None
    ) -> None:
        super().__init__(name, module, source)
        module = self._convolution
        self._output_padding = tuple(module.output_padding)
        # Whether torch's convolution knows the padding: zeros, as many before as after.
        self._pads_itself = self._mode == "zeros" and all(before == after for before, after in self._pairs)
        self._padding = [before if self._pads_itself else 0 for before, _ in self._pairs]
        dims = len(self._kernel_size)
        self._forward: Callable[..., Tensor] = getattr(F, f"conv{dims}d")
        self._backward: Callable[..., Tensor] = getattr(F, f"conv_transpose{dims}d")
        self._is_plain = isinstance(module, nn.Conv2d) and module.groups == 1 and self._pads_itself
        self._known = None if domain_shape is None else self._at(tuple(int(n) for n in domain_shape))

    @property
    def _sizes(self) -> Sizes:
        assert self._known is not None
        return self._known

    def _at(self, domain_shape: tuple[int, ...]) -> Sizes:
        """Return the sizes for inputs of one shape.

        Raises:
            ValueError: If such an input does not fit the module.
        """
        spatial = self._output_size(domain_shape)
        if all(k == 1 for k in self._kernel_size) and not any(map(any, self._pairs)):
            domain_shape = (self._convolution.in_channels, *[1] * len(self._kernel_size))
            spatial = self._output_size(domain_shape)
        # How many places at the end of the larger side no tap of the kernel reaches, for each dimension.
        small, large = (domain_shape[1:], spatial) if self._transposed else (spatial, domain_shape[1:])
        reached = [
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(small, self._stride, self._dilation, self._kernel_size, strict=True)
        ]
        beyond = [n + sum(pair) - reach for n, pair, reach in zip(large, self._pairs, reached, strict=True)]
        return Sizes(domain_shape, (self._convolution.out_channels, *spatial), beyond)

    def _output_size(self, domain_shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, *spatial = domain_shape or (0,)
        dims, expected = len(self._kernel_size), self._convolution.in_channels
        if channels != expected or len(spatial) != dims or any(n < 1 for n in spatial):
            raise ValueError(
                f"Expected layer {self.name!r} to take inputs of shape ({expected}, then {dims} sizes of at least 1), "
                f"got {domain_shape}: give the shape of one input, without the batch."
            )
        check_padding(spatial, self._pairs, self._mode)
        sizes = []
        for n, k, s, d, o, pair in zip(
            spatial, self._kernel_size, self._stride, self._dilation, self._output_padding, self._pairs, strict=True
        ):
            reach = d * (k - 1) + 1
            sizes.append((n - 1) * s - sum(pair) + reach + o if self._transposed else (n + sum(pair) - reach) // s + 1)
        if any(size < 1 for size in sizes):
            raise ValueError(
                f"Layer {self.name!r} has no output for inputs of shape {domain_shape}: its output would have "
                f"size {tuple(sizes)}. Give the shape of the layer's own input."
            )
        return tuple(sizes)

    @property
    def _transposed(self) -> bool:
        return self._convolution.transposed

    @property
    def spatial(self) -> tuple[int, ...] | None:
        """The spatial size of one input; ones for a kernel of size 1 without padding."""
        return self._sizes.domain[1:]

    @property
    def place(self) -> Hashable:
        """Shape of one input; a kernel of size 1 is one operator at all sizes of its input."""
        return self.domain_shape

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (c_in, *spatial)."""
        return self._sizes.domain

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (c_out, *spatial)."""
        return self._sizes.codomain

    def apply(self, inputs: Tensor) -> Tensor:
        """Map (r, c_in, *spatial) to (r, c_out, *spatial), in the dtype of `inputs`."""
        return self._upsample(inputs) if self._transposed else self._convolve(inputs)

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Map (r, c_out, *spatial) to (r, c_in, *spatial), in the dtype of `outputs`."""
        if not self._transposed:
            return self._upsample(outputs)
        inputs = self._convolve(outputs)
        # Output padding of a stride or more (dilation > stride) makes the convolution return places that are no inputs.
        for dim, size in enumerate(self._sizes.domain[1:], start=2):
            inputs = inputs.narrow(dim, 0, size)
        return inputs

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of ``<u, A v>``, which is linear in the kernel: of its shape, in the vectors' dtype."""
        weight = self.weight().detach().to(left.dtype)  # only its shape matters
        outputs, inputs = left.view(1, *self.codomain_shape), right.view(1, *self.domain_shape)
        if not self._pads_itself:
            inputs = pad(inputs, self._pairs, self._mode)
        with _fp32_kept(inputs):
            gradient: Tensor = torch.ops.aten.convolution_backward(
                outputs,
                inputs,
                weight,
                None,
                self._stride,
                self._padding,
                self._dilation,
                self._transposed,
                self._output_padding,
                self._convolution.groups,
                (False, True, False),
            )[1]
        return gradient

    def add_norm_gradients_(
        self, factor: float | Tensor, left: Tensor, right: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Add `factor` times the gradients of :meth:`norm` to the ``.grad`` of some parameters, made where missing.

        On the CPU, where there are fewer places than output channels, it is one matrix product that is added in place.
        """
        kernel = self._convolution._parameters.get("weight")
        grad = kernel.grad if kernel is not None and [*map(id, parameters)] == [id(kernel)] else None
        channels, *places = self.codomain_shape
        # The input unfolded into columns is then smaller than the kernel.
        is_product = self._is_plain and math.prod(places) < channels
        is_product = is_product and type(grad) is Tensor and grad.is_contiguous() and grad.dtype == left.dtype
        if grad is None or isinstance(factor, Tensor) or not is_product or left.device.type != "cpu":
            super().add_norm_gradients_(factor, left, right, parameters)
        elif factor != 0:
            inputs = right.view(1, *self.domain_shape)
            padding: Any = self._padding
            columns = F.unfold(inputs, self._kernel_size, self._dilation, padding, self._stride)[0]
            outputs = left.view(channels, -1)
            grad.view(len(outputs), -1).addmm_(outputs, columns.mT, alpha=factor)

    def _convolve(self, inputs: Tensor) -> Tensor:
        weight, groups = self.weight().to(inputs.dtype), self._convolution.groups
        if not self._pads_itself:
            inputs = pad(inputs, self._pairs, self._mode)
        padding: Any = self._padding  # typed as a tuple in torch
        with _fp32_kept(inputs):
            return self._forward(inputs, weight, None, self._stride, padding, self._dilation, groups)

    def _upsample(self, inputs: Tensor) -> Tensor:
        """Apply the transposed convolution, then crop by the padding or add the padded places to their sources."""
        weight, groups = self.weight().to(inputs.dtype), self._convolution.groups
        padding: Any = self._padding
        beyond: Any = self._sizes.beyond
        with _fp32_kept(inputs):
            outputs = self._backward(inputs, weight, None, self._stride, padding, beyond, groups, self._dilation)
        return outputs if self._pads_itself else pad_adjoint(outputs, self._pairs, self._mode)


def check_convolution(module: nn.Module) -> Convolution:
    """Return the module, if its forward is known to be a convolution.

    Raises:
        UnsupportedLayerError: If it is not.
    """
    kind = next((kind for kind in get_args(Convolution) if isinstance(module, kind)), None)
    if kind is None:
        raise UnsupportedLayerError(f"a {type(module).__name__} is not a convolution of torch.nn")
    own = vars(module)
    replaced = "forward" in own or "_conv_forward" in own or type(module).forward is not kind.forward
    if replaced or getattr(type(module), "_conv_forward", None) is not getattr(kind, "_conv_forward", None):
        raise UnsupportedLayerError("it has a forward of its own, so it is not known to compute a convolution")
    return cast(Convolution, module)


def _fp32_kept(inputs: Tensor) -> contextlib.AbstractContextManager[None]:
    """Keep cuDNN from rounding fp32 to tf32, which it does by default and which moves norms by 1e-3."""
    if not inputs.is_cuda:
        return contextlib.nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )
