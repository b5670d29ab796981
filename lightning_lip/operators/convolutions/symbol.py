"""A convolution by its symbol: its norm on the infinite grid, for which no input size is needed.

There it multiplies by a small complex matrix ``P(w)`` for each frequency w, and its norm is the largest ``|P(w)|``,
which certificates bound where no size is known. Zero padding, cropping and output padding only compress the operator on
an image, whose own norm is lower: by 0.3% at 32 places and 3 taps, by 4% at 8, by 14% at 4. See
:mod:`lightning_lip.kernels.waves`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from lightning_lip.kernels.tensors import compute_dtype
from lightning_lip.kernels.waves import Geometry, waves_of
from lightning_lip.operators.base import MatrixOperator
from lightning_lip.operators.composed import ComputedMatrixOperator
from lightning_lip.operators.convolutions.convolution import KernelOperator
from lightning_lip.operators.convolutions.paddings import most_copies, padding_pairs

Convolutions = Literal["symbol", "spatial"]
"""Which norm a convolution has: that of its symbol, on the infinite grid, or that at the size of its input."""

MOST_FREQUENCIES = 4096
"""Of a circulant operator that are looked at one by one. Between more of them the infinite grid's norm rises by less
than 0.03% (3 taps)."""


class SymbolOperator(KernelOperator):
    """A convolution or transposed convolution without its bias, with the norm of its symbol on the infinite grid.

    Its singular vectors are those of :class:`~lightning_lip.kernels.symbol.SymbolStep`. Kernels whose taps do not
    overlap (no wider than their stride, of size 1) are plain matrices. A padding that copies inputs (reflect,
    replicate, and circular by other than ``d (k - 1)`` places) multiplies by its own norm, the square root of the
    largest number of copies of one input that are read. Groups have a symbol each, of which the largest counts; a
    transposed convolution has that of the convolution with the same kernel, as it lies; output padding is no matter.

    Args:
        name: The module's name in the model.
        module: As in :class:`~lightning_lip.operators.convolutions.convolution.KernelOperator`.
        spatial: The spatial size of one input, if it is known. It matters to padding that copies, and where the
            operator is circulant (circular padding by ``d (k - 1)`` places, a stride that divides the size): only the
            frequencies of that size then count, and the norm is exactly that of the operator there.
        source: The kernel, where that is not the module's own weight.

    Raises:
        UnsupportedLayerError: If the module is no convolution, or has a forward of its own.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        spatial: Sequence[int] | None = None,
        source: MatrixOperator | None = None,
    ) -> None:
        super().__init__(name, module, source)
        convolution, shape = self._convolution, self.weight().shape
        self._channels = (convolution.in_channels, convolution.out_channels)
        self._spatial = self._circulant(spatial)
        geometry = Geometry(
            shape[0] // convolution.groups,
            shape[1],
            convolution.groups,
            self._kernel_size,
            self._stride,
            self._dilation,
            self._spatial,
        )
        self._factor = self._padding_norm(spatial)
        self.is_matrix = convolution.groups == 1 and self._factor == 1 and len(waves_of(geometry).lags) == 1
        self.symbol_geometry = None if self.is_matrix else geometry
        self.slot = self._source.slot

    def _circulant(self, spatial: Sequence[int] | None) -> tuple[int, ...] | None:
        """Return the size, if the operator is circulant at it and has no more frequencies than are looked at."""
        if spatial is None or self._mode != "circular" or not any(map(any, self._pairs)):
            return None
        settings = zip(self._pairs, self._kernel_size, self._stride, self._dilation, spatial, strict=True)
        if not all(_is_circulant(pair, k, d) and n % s == 0 for pair, k, s, d, n in settings):
            return None
        n_frequencies = math.prod(n // s for n, s in zip(spatial, self._stride, strict=True))
        return tuple(spatial) if n_frequencies <= MOST_FREQUENCIES else None

    def _padding_norm(self, spatial: Sequence[int] | None) -> float:
        """Return the norm of a padding that copies inputs; 1 for zeros, and where the operator is circulant."""
        copies = [
            1 if self._mode == "circular" and _is_circulant(pair, k, d) else most_copies(n, pair, self._mode, k, s, d)
            for pair, k, s, d, n in zip(
                self._pairs,
                self._kernel_size,
                self._stride,
                self._dilation,
                [None] * len(self._pairs) if spatial is None else spatial,
                strict=True,
            )
        ]
        return math.sqrt(math.prod(copies))

    @property
    def spatial(self) -> tuple[int, ...] | None:
        """The size at which the operator is circulant; None for the infinite grid."""
        return self._spatial

    @property
    def place(self) -> Hashable:
        """The kernel's size, the size of a circulant operator, and the padding's norm."""
        return self._kernel_size, self._spatial, self._factor

    @property
    def domain_shape(self) -> tuple[int, ...]:
        """Shape (c_in,): there is no size."""
        return self._channels[:1]

    @property
    def codomain_shape(self) -> tuple[int, ...]:
        """Shape (c_out,): there is no size."""
        return self._channels[1:]

    def iterated(self) -> Tensor:
        """Return the kernel; where it is a matrix, (rows, columns * taps)."""
        kernel = self.weight()
        return kernel.flatten(1) if self.is_matrix else kernel

    def row_scale(self) -> Tensor | None:
        """Return the padding's norm for each row; None where that is 1."""
        if self._factor == 1:
            return None
        kernel = self.weight()
        return torch.full((len(kernel),), self._factor, dtype=compute_dtype(kernel.dtype), device=kernel.device)

    @property
    def written_parameter(self) -> nn.Parameter | None:
        """The kernel, if it is a parameter, which a matrix must be a view of."""
        kernel = self._source.direct_parameter
        return None if kernel is None or (self.is_matrix and not kernel.is_contiguous()) else kernel

    def gradient_view(self, grad: Tensor) -> Tensor | None:
        """Return the kernel's gradient; where the kernel is a matrix, as a matrix."""
        if not self.is_matrix:
            return grad
        return grad.view(len(grad), -1) if grad.is_contiguous() else None

    def weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the gradient of the norm in the kernel: a sum of rank-one terms, one each for Re and Im."""
        shape = self.weight().shape
        u = left.view(-1, shape[0])
        gradient = (u.mT @ right.view(len(u), -1)).view(shape)
        return gradient if self._factor == 1 else gradient * self._factor

    def apply(self, inputs: Tensor) -> Tensor:
        """Refuse: without a size there are no inputs.

        Raises:
            TypeError: Always.
        """
        self._refuse()

    def adjoint(self, outputs: Tensor) -> Tensor:
        """Refuse: without a size there are no outputs.

        Raises:
            TypeError: Always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(f"The symbol of layer {self.name!r} is that of no size: it maps no inputs.")


def _is_circulant(pair: tuple[int, int], kernel_size: int, dilation: int) -> bool:
    return sum(pair) == dilation * (kernel_size - 1)


def symbol_at(
    name: str, module: nn.Module, spatial: Sequence[int], source: MatrixOperator | None = None
) -> SymbolOperator:
    """Return the operator of a convolution on inputs of a known size.

    Where one place only is mapped to others (of the output, transposed of the input; with zero padding), it is the
    matrix of the taps inside: *exactly* the operator there.

    Args:
        name: The module's name in the model.
        module: As in :class:`SymbolOperator`.
        spatial: The spatial size of one input.
        source: The kernel, where that is not the module's own weight.
    """
    operator = SymbolOperator(name, module, spatial, source)
    inside = _taps_of_one_place(operator, spatial)
    if inside is None:
        return operator
    convolution = operator.convolution
    sizes = tuple(part.stop - part.start for part in inside)
    shell = type(convolution)(
        convolution.in_channels,
        convolution.out_channels,
        sizes,
        stride=sizes,
        groups=convolution.groups,
        bias=False,
        device="meta",
    )
    whole = operator.source
    if sizes == operator.kernel_size:
        return SymbolOperator(name, shell, None, whole)
    at: Any = (..., *inside)
    part = ComputedMatrixOperator(name, whole.module, lambda: whole.weight()[at], whole.parameters)
    return SymbolOperator(name, shell, None, part)


def _taps_of_one_place(operator: SymbolOperator, spatial: Sequence[int]) -> list[slice] | None:
    """Return the taps inside where an image has one place for the kernel, dimension by dimension; None elsewhere."""
    convolution = operator.convolution
    if convolution.padding_mode != "zeros":
        return None
    dims = len(operator.kernel_size)
    extra = convolution.output_padding if convolution.transposed else (0,) * dims
    pairs = padding_pairs(convolution.padding, operator.kernel_size, convolution.dilation)
    inside = []
    for n, k, s, d, pair, more in zip(
        spatial, operator.kernel_size, convolution.stride, convolution.dilation, pairs, extra, strict=True
    ):
        reach = d * (k - 1) + 1
        n_places, size = (
            (n, reach - sum(pair) + more) if convolution.transposed else ((n + sum(pair) - reach) // s + 1, n)
        )
        taps = [tap for tap in range(k) if 0 <= tap * d - pair[0] < size]
        if n_places != 1 or not taps:
            return None
        inside.append(slice(taps[0], taps[-1] + 1))
    return inside
