"""The Lipschitz constants of pooling and upsampling: linear maps, or maxima, along each dimension on its own.

A map that acts on each dimension separately is a tensor product, and its spectral norm is the product of the norms
along the dimensions. All values are *certified upper bounds*, equal to the norm up to rounding where so stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.rigorous.matrix import certified_matrix_norm
from lightning_lip.rigorous.rounding import UNIT_ROUNDOFF, divide_up, multiply_up, sqrt_up, up

LARGEST_DENSE_SIZE = 512
"""Up to this size of its input or output the matrix along a dimension is formed and its norm certified."""

Lengths = int | Sequence[int]


def per_dimension(value: Lengths | None, n_dimensions: int, default: Lengths | None = None) -> tuple[int, ...]:
    """Return one value a dimension; an empty or missing one is `default`."""
    if value is None or (not isinstance(value, int) and len(value) == 0):
        if default is None:
            raise ValueError("Expected a value or a default, got neither.")
        return per_dimension(default, n_dimensions)
    if isinstance(value, int):
        return (value,) * n_dimensions
    values = tuple(int(v) for v in value)
    return values * n_dimensions if len(values) == 1 else values


def max_pool_constant(
    n_dimensions: int, kernel: Lengths, stride: Lengths | None = None, dilation: Lengths = 1
) -> float:
    """Return the constant of max pooling, whatever its input's size, padding and ceil_mode; rounded up.

    ``|max x - max y| <= max |x - y|`` in each window, so it is the square root of the largest number of windows that
    share an input: ``ceil(k gcd(d, s) / s)`` along a dimension. *Exact* where the input is large enough for that many.
    """
    kernels = per_dimension(kernel, n_dimensions)
    strides = per_dimension(stride, n_dimensions, kernels)
    dilations = per_dimension(dilation, n_dimensions, 1)
    return sqrt_up(math.prod(-(-k * math.gcd(d, s) // s) for k, s, d in zip(kernels, strides, dilations, strict=True)))


def average_pool_constant(
    n_dimensions: int,
    kernel: Lengths,
    stride: Lengths | None = None,
    padding: Lengths = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> float:
    """Return the norm of average pooling on an input of any size, rounded up: the infinite input's, which dominates.

    Along a dimension ``sqrt(sum_j (k - |j| s)_+) / k``: the window's frequency response at 0, over all its aliases.
    With an input's size :func:`sized_average_pool_constant` has no exceptions.

    Raises:
        UnsupportedLayerError: With padding that is not counted, or with ceil_mode (unless the windows do not overlap
            their edges): the norm then depends on the input's size.
    """
    kernels = per_dimension(kernel, n_dimensions)
    strides = per_dimension(stride, n_dimensions, kernels)
    paddings = per_dimension(padding, n_dimensions, 0)
    if divisor_override is None and (ceil_mode or (any(paddings) and not count_include_pad)):
        raise UnsupportedLayerError(
            "with ceil_mode=True or count_include_pad=False its norm depends on the input's size: trace it instead"
        )
    factors = []
    for k, s in zip(kernels, strides, strict=True):
        overlaps = sum(max(0, k - abs(j) * s) for j in range(-k, k + 1))
        factors.append(sqrt_up(overlaps) if divisor_override is not None else divide_up(sqrt_up(overlaps), k))
    norm = multiply_up(*factors)
    return norm if divisor_override is None else divide_up(norm, abs(divisor_override))


def lp_pool_constant(
    n_dimensions: int, norm_type: float, kernel: Lengths, stride: Lengths | None = None, ceil_mode: bool = False
) -> float:
    """Return an *upper bound* of the constant of power-average pooling for an even power, inf or 1.

    Each window's p-norm changes by at most the p-norm of the difference, hence by its 2-norm for p >= 2; then as for
    max pooling. For p = 1 torch sums without absolute values: average pooling times the window's size.

    With ceil_mode torch multiplies the mean over a clipped window by the size of a whole one. A clipped window has at
    least k - s + 1 places along a dimension, and at least one.

    Raises:
        UnsupportedLayerError: For other powers, where torch takes a root of a signed sum: its slope is unbounded.
    """
    kernels = per_dimension(kernel, n_dimensions)
    strides = per_dimension(stride, n_dimensions, kernels)
    size = math.prod(kernels)
    smallest = math.prod(max(1, k - s + 1) for k, s in zip(kernels, strides, strict=True)) if ceil_mode else size
    if norm_type == 1:
        return multiply_up(average_pool_constant(n_dimensions, kernel, stride), size, divide_up(size, smallest))
    if norm_type == math.inf or (norm_type >= 2 and norm_type % 2 == 0):
        factor = (size / smallest) ** (1 / norm_type) * (1 + 1e-14) if smallest < size else 1.0
        return multiply_up(max_pool_constant(n_dimensions, kernel, stride), factor)
    raise UnsupportedLayerError(f"with norm_type={norm_type} it takes a root of a sum that may vanish")


def sized_average_pool_constant(
    sizes: Sequence[int],
    kernel: Lengths,
    stride: Lengths | None = None,
    padding: Lengths = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> float:
    """Return the norm of average pooling at an input size, with any of its options; rounded up, *exact* up to 512.

    The divisor is the product of the window's lengths along the dimensions (clipped ones too), or one number, so that
    the map is a tensor product in every case.
    """
    n_dimensions = len(sizes)
    kernels = per_dimension(kernel, n_dimensions)
    strides = per_dimension(stride, n_dimensions, kernels)
    paddings = per_dimension(padding, n_dimensions, 0)
    factors = []
    for n, k, s, p in zip(sizes, kernels, strides, paddings, strict=True):

        def pool(x: Tensor, k: int = k, s: int = s, p: int = p) -> Tensor:
            pooled: Tensor = F.avg_pool2d(
                x[:, None, :, None],
                (k, 1),
                (s, 1),
                (p, 0),
                ceil_mode,
                count_include_pad,
                None if divisor_override is None else 1,
            )
            return pooled.flatten(1)

        factors.append(linear_map_norm(pool, n))
    norm = multiply_up(*factors)
    if divisor_override is not None:
        return divide_up(norm, abs(divisor_override))
    if ceil_mode or (any(paddings) and not count_include_pad):
        return norm
    return min(norm, average_pool_constant(n_dimensions, kernels, strides))


def adaptive_average_pool_constant(sizes: Sequence[int], output_sizes: Sequence[int | None]) -> float:
    """Return the norm of adaptive average pooling at an input size, rounded up; 1 / sqrt(H W) for global pooling."""
    factors = []
    for n, o in zip(sizes, output_sizes, strict=True):

        def pool(x: Tensor, o: int = n if o is None else o) -> Tensor:
            return F.adaptive_avg_pool1d(x[:, None], o).flatten(1)

        factors.append(linear_map_norm(pool, n))
    return multiply_up(*factors)


def adaptive_max_pool_constant(sizes: Sequence[int], output_sizes: Sequence[int | None]) -> float:
    """Return the constant of adaptive max pooling at an input size, *exact*, rounded up.

    Window i covers [floor(i n / o), ceil((i + 1) n / o)); the square root of the largest number that share an input.
    """
    count = 1
    for n, o in zip(sizes, output_sizes, strict=True):
        windows = n if o is None else o
        covers = [0] * n
        for i in range(windows):
            for j in range(i * n // windows, -(-(i + 1) * n // windows)):
                covers[j] += 1
        count *= max(covers)
    return sqrt_up(count)


def linear_map_norm(apply: Callable[[Tensor], Tensor], size: int, non_negative: bool = True) -> float:
    """Return an upper bound of the norm of a linear map along one dimension, up to the rounding of its entries.

    Args:
        apply: Maps (r, n) to (r, m), fp64.
        size: n.
        non_negative: Whether the map's entries are all at least 0.

    Returns:
        The certified norm of its matrix, raised by 1e-12 for the rounding of the entries. For a non-negative map
        with more than 512 inputs and outputs ``sqrt(|A|_1 |A|_inf)``, which needs no matrix.

    Raises:
        UnsupportedLayerError: If the map has negative entries and its size is above 4096.
    """
    # Entries are computed with relative errors of a few u, their sums below with n times as much.
    rounding = 1 + 1e-12 + 4 * size * UNIT_ROUNDOFF
    largest = 8 * LARGEST_DENSE_SIZE
    few_outputs = size <= largest and apply(torch.zeros(1, size, dtype=torch.float64)).shape[1] <= LARGEST_DENSE_SIZE
    if size <= LARGEST_DENSE_SIZE or few_outputs or not non_negative:
        if size > largest:
            raise UnsupportedLayerError(f"at size {size} the matrix of its interpolation is too large to certify")
        matrix = apply(torch.eye(size, dtype=torch.float64, device="cpu"))
        # Top singular values lie close together here, so that an iterative estimate would be poor.
        estimate = float(torch.linalg.matrix_norm(matrix, 2)) if min(matrix.shape) <= LARGEST_DENSE_SIZE else None
        return up(certified_matrix_norm(matrix, estimate) * rounding)
    with torch.enable_grad():
        ones = torch.ones(1, size, dtype=torch.float64, device="cpu", requires_grad=True)
        row_sums = apply(ones)
        (column_sums,) = torch.autograd.grad(row_sums.sum(), ones)
    return up(sqrt_up(float(row_sums.detach().max()) * float(column_sums.max())) * rounding)


def upsample_constant(
    target: Callable[..., Tensor], arguments: dict[str, Any], sizes: Sequence[int], output_sizes: Sequence[int]
) -> float:
    """Return the norm of an ``aten.upsample_*`` operation at an input size, from its matrix along each dimension.

    Args:
        target: The operation.
        arguments: Its arguments by name, without the input.
        sizes: The input's spatial sizes.
        output_sizes: The output's.
    """
    scales = {"scales_d": -3, "scales_h": -2, "scales_w": -1, "scales": -1}
    cubic = "bicubic" in str(target) or "lanczos" in str(target)
    factors = []
    for dimension, (n, o) in enumerate(zip(sizes, output_sizes, strict=True)):
        own = dict(arguments)
        if own.get("output_size") is not None:
            own["output_size"] = [o if d == dimension else 2 for d in range(len(sizes))]
        if own.get("scale_factors") is not None:
            given = own["scale_factors"]
            own["scale_factors"] = [given[d] if d == dimension else 1.0 for d in range(len(sizes))]
        for key, position in scales.items():
            if own.get(key) is not None and position + len(sizes) != dimension:
                own[key] = 1.0

        def resample(x: Tensor, own: dict[str, Any] = own, dimension: int = dimension) -> Tensor:
            # The other dimensions have two equal elements, which every mode keeps. Not one: torch 2.13 resamples a
            # (n, 1, h, 1) tensor wrongly with antialias=True.
            view = [1] * len(sizes)
            view[dimension] = x.shape[1]
            copies = [x.shape[1] if d == dimension else 2 for d in range(len(sizes))]
            result = target(x.view(-1, 1, *view).expand(-1, 1, *copies).contiguous(), **own)
            for d in range(len(sizes)):
                result = result if d == dimension else result.narrow(2 + d, 0, 1)
            return result.flatten(1)

        factors.append(linear_map_norm(resample, n, non_negative=not cubic))
    return multiply_up(*factors)
