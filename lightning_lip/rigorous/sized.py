"""The Gram matrix of a convolution on a small image, where its exact norm costs less than that of the infinite grid.

A convolution on an image of one size is ``A = sum_k K_k x S_k`` over its taps k = (k_1, ..., k_d), with K_k the matrix
from channel to channel and ``S_k = S_{k_1} x ... x S_{k_d}`` the 0/1 matrices that say, dimension by dimension, which
place of the input an output reads through a tap: none in zero padding, another one in the other padding modes. So
``A A^T = sum_{k,l} K_k K_l^T x S_k S_l^T``, and for ``A^T A`` each factor is transposed: A itself, which is much larger
where one side is, is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lip.operators.convolutions.paddings import PaddingMode
from lightning_lip.rigorous.hermitian import EXACT_ESTIMATE_SIZE, LargestEigenvalue
from lightning_lip.rigorous.matrix import certified_largest_eigenvalue
from lightning_lip.rigorous.rounding import UNDERFLOW, frobenius_up, gamma, multiply_up, sqrt_up, sum_up

LARGEST_SIDE = 4096
"""Rows of the largest Gram matrix: 134 MB, and a second or two."""

LARGEST_COST = LARGEST_SIDE**3
"""Of all groups together, in cubes of rows."""

LARGEST_TABLE = 4 * LARGEST_SIDE**2
"""Numbers in an array on the way to it."""

TOLERANCE = 1e-7
"""The first attempt lies this far (relative, in the square) above the estimate: half of it is lost at most."""


@dataclass(frozen=True)
class SizedAxis:
    """One dimension of a convolution on an image.

    Attributes:
        sources: For each tap and each output, the place of the input that it reads, -1 for padding with zeros: integers
            (taps, outputs).
        n_inputs: The size of the input.
    """

    sources: Tensor
    n_inputs: int

    def selections(self) -> Tensor:
        """Return S_k for each tap, (taps, outputs, inputs), fp64."""
        places = torch.arange(self.n_inputs, device="cpu")
        return (self.sources[:, :, None] == places).double()


def sized_axis(
    kernel_size: int,
    stride: int,
    dilation: int,
    pair: tuple[int, int],
    size: int,
    mode: PaddingMode,
    transposed: bool,
    output_padding: int | None,
) -> SizedAxis:
    """Return one dimension of a convolution, or of the one whose adjoint a transposed convolution is.

    Args:
        kernel_size: Number of taps.
        stride: See ``nn.Conv2d``, as the following.
        dilation: See there.
        pair: Padding before and after.
        size: Size of the input of the convolution, or of the transposed one.
        mode: Padding mode.
        transposed: Whether the convolution is transposed.
        output_padding: Of a transposed one; None allows for any, which makes the matrix larger.
    """
    reach = dilation * (kernel_size - 1) + 1
    if transposed:
        n_outputs = size
        uncropped = (size - 1) * stride + reach
        extra = max(stride, dilation) - 1 if output_padding is None else output_padding
        n_inputs = uncropped - sum(pair) + extra
    else:
        n_outputs = (size + sum(pair) - reach) // stride + 1
        n_inputs = size
    places = torch.arange(n_outputs, device="cpu") * stride - pair[0]
    sources = torch.arange(kernel_size, device="cpu")[:, None] * dilation + places
    is_outside = (sources < 0) | (sources >= n_inputs)
    if mode == "circular":
        sources = sources % n_inputs
    elif mode == "replicate":
        sources = sources.clamp(0, n_inputs - 1)
    elif mode == "reflect":
        sources = sources.abs()
        sources = torch.where(sources >= n_inputs, 2 * (n_inputs - 1) - sources, sources)
    else:
        sources = torch.where(is_outside, -1, sources)
    return SizedAxis(sources, n_inputs)


def sized_norm(kernel: Tensor, axes: Sequence[SizedAxis]) -> float | None:
    """Return a *certified upper bound* of the norm of a convolution on an image; None where that would cost too much.

    It lies about 1e-7 above the norm.

    Args:
        kernel: Shape (groups, rows, columns, *kernel_size), fp64 on the CPU, of magnitudes of at most 1.
        axes: One for each dimension of the kernel.
    """
    groups, rows, columns = kernel.shape[:3]
    n_outputs = math.prod(axis.sources.shape[1] for axis in axes)
    n_inputs = math.prod(axis.n_inputs for axis in axes)
    by_outputs = rows * n_outputs <= columns * n_inputs
    side = min(rows * n_outputs, columns * n_inputs)
    if side > LARGEST_SIDE or groups * side**3 > LARGEST_COST:
        return None
    if max(axis.sources.numel() * axis.n_inputs for axis in axes) > LARGEST_TABLE:
        return None
    taps, selections = _used_taps(kernel, axes)
    n_taps = taps.shape[1]
    if n_taps == 0:
        return 0.0  # every output reads padding only
    if not by_outputs:
        taps = taps.transpose(2, 3)
        selections = [selection.mT for selection in selections]
    if _largest_table(groups, taps.shape[2], selections) > LARGEST_TABLE:
        return None
    gram = _gram(taps, selections)
    # Each entry is a sum over pairs of taps of inner products: |error| <= gamma |A| |A|^T, whose norm is at most
    # ||A||_F^2 with magnitudes for entries; a tap is read at most once for each output, T taps add up in one entry.
    frobenius = frobenius_up(kernel.flatten(1))
    n_roundings = taps.shape[3] + n_taps**2 + 2 * n_taps
    gram_error = multiply_up(gamma(n_roundings), n_taps, n_outputs, frobenius, frobenius)
    if groups == 1 and side > EXACT_ESTIMATE_SIZE:
        largest = certified_largest_eigenvalue(gram[0], tolerance=TOLERANCE)
    else:
        level = LargestEigenvalue(side)
        level.include(gram)
        largest = level.bound()
    return sqrt_up(sum_up([largest, gram_error, UNDERFLOW]))


def _used_taps(kernel: Tensor, axes: Sequence[SizedAxis]) -> tuple[Tensor, list[Tensor]]:
    """Return the taps that reach the image at all, (groups, taps, rows, columns), and their selections."""
    selections = []
    for dim, axis in enumerate(axes, start=3):
        selection = axis.selections()
        used = selection.flatten(1).any(1)
        kernel = kernel.index_select(dim, used.nonzero()[:, 0])
        selections.append(selection[used])
    return kernel.flatten(3).movedim(3, 1), selections


def _largest_table(groups: int, rows: int, selections: Sequence[Tensor]) -> int:
    """Return the size of the largest array that :func:`_gram` makes on its way."""
    size = largest = groups * rows**2 * math.prod(len(selection) ** 2 for selection in selections)
    for selection in selections:
        n_taps, places, _ = selection.shape
        size = size // n_taps**2 * places**2
        largest = max(largest, size, n_taps**2 * places**2)
    return largest


def _gram(taps: Tensor, selections: Sequence[Tensor]) -> Tensor:
    """Return ``A A^T``, (groups, p, p).

    Args:
        taps: K_k, (groups, taps, rows, columns).
        selections: S_k of each dimension, (taps of it, outputs, inputs).
    """
    groups, n_taps, rows, columns = taps.shape
    flat = taps.reshape(groups, n_taps * rows, columns)
    counts = [len(selection) for selection in selections]
    dims = len(counts)
    gram = (flat @ flat.mT).view(groups, *counts, rows, *counts, rows)
    # One dimension after the other: its two taps become two places, at the end.
    for dim, selection in enumerate(selections):
        # The taps left are those of `dims - dim` dimensions; the first of them stands at 1.
        second = 1 + (dims - dim) + 1
        overlaps = torch.einsum("kyx,lzx->klyz", selection, selection)
        gram = torch.tensordot(gram, overlaps, dims=([1, second], [0, 1]))
    # (groups, rows, rows, y_1, z_1, y_2, z_2, ...)
    order = [0, 1, *range(3, 3 + 2 * dims, 2), 2, *range(4, 4 + 2 * dims, 2)]
    side = rows * math.prod(selection.shape[1] for selection in selections)
    return gram.permute(order).reshape(groups, side, side)
