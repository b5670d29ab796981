"""Certified upper bounds of a convolution's spectral norm, from its symbol on a grid of frequencies.

On the infinite grid a convolution is multiplication by its symbol ``P(theta) = sum_q K_q e^{i q theta}``, a small
complex matrix for each frequency, and its norm is the largest ``||P(theta)||``. Zero padding, cropping, a finite input
and output padding only compress that operator. A trigonometric polynomial of h taps, at its largest modulus M, is at
least ``M cos((h - 1) t / 2)`` at a distance t (M. Riesz, 1914), so that along each dimension N frequencies miss at most
the factor ``1 / cos((h - 1) pi / 2N)``.

Stride and dilation are removed first: of the places ``s t + d k`` only multiples of gcd(s, d) occur; with s and d
coprime, ``A A^T`` is the same convolution for every d, on ever sparser lattices; and a stride is a convolution of
ceil(k / s) taps on s times as many channels, one for each place modulo s. Transposed convolutions are adjoints.

Assumed of the arithmetic: IEEE 754 double precision on the CPU, a BLAS and LAPACK that multiply by inner products in
any order, and a cosine and sine of the C library within 2 units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lip.operators.convolutions.paddings import PaddingMode, check_padding, most_copies, padding_pairs
from lightning_lip.rigorous.hermitian import LargestEigenvalue
from lightning_lip.rigorous.matrix import scaled_matrix
from lightning_lip.rigorous.rounding import (
    UNDERFLOW,
    UNIT_ROUNDOFF,
    divide_up,
    frobenius_up,
    gamma,
    ldexp_up,
    multiply_up,
    sqrt_up,
    sum_up,
)
from lightning_lip.rigorous.sized import sized_axis, sized_norm

POINTS_PER_TAP = 16
"""Frequencies along a dimension, N = 16 (h - 1): at most 0.5% above the infinite grid's norm a dimension."""

CHUNK_ELEMENTS = 2**21
"""Elements of ``P P^*`` that are worked on at a time: 16 MB for each of some eight arrays."""

PHASE_ERROR = 256 * UNIT_ROUNDOFF
"""Bound of the error of a product of three computed ``e^{i q theta}``: 31 u each by the assumptions, 3 u a product."""


@torch.no_grad()
def certified_convolution_norm(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding: str | int | Sequence[int] = 0,
    padding_mode: PaddingMode = "zeros",
    transposed: bool = False,
    spatial: Sequence[int] | None = None,
    grid: int | None = None,
    output_padding: int | Sequence[int] | None = None,
) -> float:
    """Return a *certified upper bound* of a convolution's spectral norm: rounding is accounted for at each step.

    Where `spatial` tells the input's size and the operator on it is small (up to 4096 rows or columns, those of all
    groups together to the power of 3), it is that operator's norm, up to about 1e-7: see
    :mod:`lightning_lip.rigorous.sized`. Otherwise, with zero padding, and for transposed convolutions, it bounds the
    operator on inputs of every size and lies at most 0.5% (1-D), 1% (2-D) or 1.5% (3-D) above the norm on the infinite
    grid at the default `grid`.

    The other padding modes there, dimension by dimension:

    - circular padding of d (k - 1) places in all makes the operator circulant: the exact frequencies of the input's
      size where they are fewer than the grid's and the stride divides the size, the grid otherwise; where the stride
      does not divide it, or the size is not known, the bound is that of stride 1;
    - else the infinite grid's bound times the norm of the padding, the square root of the largest number of copies of
      one input that are read.

    Args:
        weight: The kernel as the module holds it, (c_out, c_in / groups, *kernel_size), transposed
            (c_in, c_out / groups, *kernel_size), with one to three spatial dimensions, real, of any dtype, on any
            device (the work is done on the CPU in fp64).
        stride: One number, or one a dimension.
        dilation: One number, or one a dimension.
        groups: A divisor of ``weight.shape[0]``.
        padding: One number, one a dimension, ``"same"`` or ``"valid"``. Its size matters to the padding modes only.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``; zeros for a transposed convolution.
        transposed: Whether the weight is a transposed convolution's.
        spatial: The size of the input; None bounds the operators of all sizes.
        grid: Frequencies along each dimension, at least the number of taps there; None takes 16 (h - 1), h the number
            of taps once the stride is removed. More of them cost more time for a tighter bound. Where it is given, the
            operator at the input's size is not looked at.
        output_padding: Of a transposed convolution on an input of a size; None bounds those of any output padding.

    Returns:
        The bound; 0.0 for a zero kernel, inf where it may exceed the largest float.

    Raises:
        ValueError: If an argument is out of range, or `weight` holds NaN or an infinity.

    Example:
        >>> import torch
        >>> from lightning_lip.rigorous import certified_convolution_norm
        >>> kernel = torch.ones(1, 1, 3, 3)  # on large images the norm is 9
        >>> 9 <= certified_convolution_norm(kernel, padding=1) < 9.09
        True
    """
    dims = weight.dim() - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"Expected a kernel with 3 to 5 dimensions, got shape {tuple(weight.shape)}.")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"Expected `groups` to divide the kernel's {weight.shape[0]} rows, got {groups}.")
    if padding_mode not in ("zeros", "circular", "reflect", "replicate"):
        raise ValueError(f"Expected a padding mode of torch.nn's convolutions, got {padding_mode!r}.")
    if transposed and padding_mode != "zeros":
        raise ValueError(f"Expected a transposed convolution to have padding mode 'zeros', got {padding_mode!r}.")
    kernel_size = tuple(weight.shape[2:])
    strides = _per_dimension("stride", stride, dims)
    dilations = _per_dimension("dilation", dilation, dims)
    pairs = padding_pairs(padding, kernel_size, dilations)
    sizes: Sequence[int | None] = [None] * dims
    if spatial is not None:
        sizes = spatial = _per_dimension("spatial", spatial, dims)
        check_padding(spatial, pairs, padding_mode)
        if not transposed and any(
            n + sum(pair) <= d * (k - 1) for n, pair, d, k in zip(spatial, pairs, dilations, kernel_size, strict=True)
        ):
            raise ValueError(f"The padded input of size {tuple(spatial)} is smaller than the kernel: no output.")
    if weight.numel() == 0:
        return 0.0
    axes = [
        axis_of(*settings, padding_mode, grid)
        for settings in zip(kernel_size, strides, dilations, pairs, sizes, strict=True)
    ]
    matrix, exponent = scaled_matrix(weight.reshape(weight.shape[0], -1))
    if not matrix.any():
        return 0.0
    kernel = matrix.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    if spatial is not None and grid is None:
        outputs = [None] * dims if output_padding is None else _per_dimension("output_padding", output_padding, dims, 0)
        settings_of = zip(kernel_size, strides, dilations, pairs, spatial, outputs, strict=True)
        sized = [sized_axis(k, s, d, pair, n, padding_mode, transposed, o) for k, s, d, pair, n, o in settings_of]
        norm = sized_norm(kernel, sized)
        if norm is not None:
            return ldexp_up(norm, exponent)
    bound = multiply_up(_largest_symbol(_polyphase(kernel, axes), axes), *(axis.factor for axis in axes))
    return ldexp_up(bound, exponent)


def _per_dimension(argument: str, value: int | Sequence[int], dims: int, least: int = 1) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or any(v < least for v in values):
        raise ValueError(f"Expected `{argument}` to be {dims} numbers of at least {least}, got {value!r}.")
    return values


@dataclass(frozen=True)
class _Axis:
    """One dimension of the symbol.

    Attributes:
        residues: For each tap, the channel block that it reads: its place modulo the stride.
        exponents: For each tap, its power of ``e^{i theta}``.
        n_frequencies: N: the frequencies are ``2 pi j / N``.
        factor: Upper bound of what the norm can exceed the largest symbol by, for the grid's and the padding's sake.
    """

    residues: list[int]
    exponents: list[int]
    n_frequencies: int
    factor: float


def axis_of(
    kernel_size: int,
    stride: int,
    dilation: int,
    pair: tuple[int, int],
    size: int | None,
    mode: PaddingMode,
    grid: int | None,
) -> _Axis:
    """Return the frequencies of one dimension of a convolution, and what its bound there is multiplied with."""
    circulant = mode == "circular" and any(pair) and sum(pair) == dilation * (kernel_size - 1)
    period = None
    if circulant:
        # The outputs of a stride that does not divide the size are some of stride 1's.
        stride = stride if size is not None and size % stride == 0 else 1
        period = None if size is None else size // stride
    reduced = stride // math.gcd(stride, dilation)
    n_taps = -(-kernel_size // reduced)
    if grid is not None and grid < n_taps:
        raise ValueError(f"Expected `grid` to be at least the number of taps, {n_taps}, got {grid!r}.")
    n_frequencies = 1 if n_taps == 1 else POINTS_PER_TAP * (n_taps - 1) if grid is None else grid
    if period is not None and period <= n_frequencies:
        places = [dilation * tap for tap in range(kernel_size)]
        return _Axis([p % stride for p in places], [p // stride for p in places], period, 1.0)
    # The angle lies below pi/2, where rounding it moves the cosine by less than it.
    cosine = math.cos((n_taps - 1) * math.pi / (2 * n_frequencies)) - 16 * UNIT_ROUNDOFF
    factor = 1.0 if n_taps == 1 else divide_up(1.0, cosine)
    if not circulant:
        copies = most_copies(size, pair, mode, kernel_size, stride, dilation)
        factor = multiply_up(factor, sqrt_up(copies)) if copies > 1 else factor
    taps = range(kernel_size)
    return _Axis([tap % reduced for tap in taps], [tap // reduced for tap in taps], n_frequencies, factor)


def _polyphase(kernel: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """Sort the taps by residue and exponent.

    Args:
        kernel: Shape (groups, rows, columns, *kernel_size).
        axes: One for each dimension of the kernel.

    Returns:
        Shape (taps, groups, p, q), p <= q, taps in the order of the exponents' product.
    """
    for axis in axes:
        # The first kernel dimension left; its residues join the columns, its exponents go last.
        residues, exponents = sorted(set(axis.residues)), sorted(set(axis.exponents))
        taps = kernel.movedim(3, 0)
        sorted_taps = kernel.new_zeros(len(residues), len(exponents), *taps.shape[1:])
        rows = [residues.index(r) for r in axis.residues]
        columns = [exponents.index(q) for q in axis.exponents]
        sorted_taps[rows, columns] = taps
        kernel = sorted_taps.movedim(1, -1).movedim(0, 3).flatten(2, 3)
    kernel = kernel.flatten(3).movedim(3, 0)
    return kernel if kernel.shape[2] <= kernel.shape[3] else kernel.mT


def _largest_symbol(taps: Tensor, axes: Sequence[_Axis]) -> float:
    """Return an upper bound of ``||P(theta)||`` over all groups and all frequencies of the grid.

    ``P P^*`` is a trigonometric polynomial itself, whose coefficients are correlations of the taps, computed once.

    Args:
        taps: Shape (taps, groups, p, q), p <= q, of magnitudes of at most 1.
        axes: The frequencies, and the exponents of the taps.
    """
    n_taps, groups, rows, columns = taps.shape
    exponents = torch.cartesian_prod(*(torch.tensor(sorted(set(axis.exponents)), device="cpu") for axis in axes))
    lags, even, odd = _correlations(taps, exponents.view(n_taps, -1))
    counts = torch.tensor([axis.n_frequencies for axis in axes], device="cpu")
    roots = [roots_of_unity(axis.n_frequencies) for axis in axes]
    points = half_grid(counts.tolist())
    largest = LargestEigenvalue(rows)
    step = max(1, CHUNK_ELEMENTS // (groups * rows * rows))
    for first in range(0, len(points), step):
        turns = points[first : first + step, None] * lags % counts
        phases = roots[0][turns[..., 0]]
        for dim in range(1, len(axes)):
            phases = phases * roots[dim][turns[..., dim]]
        real = phases.real.contiguous() @ even
        # The first lag is 0.
        imaginary = phases.imag[:, 1:].contiguous() @ odd
        largest.include(torch.complex(real, imaginary).view(-1, rows, rows))
    # Entry by entry, real and imaginary part each, with B = sum_{s,t} |K_t| |K_s|^T: a correlation errs by
    # gamma_{q+T+1} of it, a polynomial of R lags by gamma_R and the phases; ||B||_F <= T ||K||_F^2.
    relative = sum_up([2 * gamma(columns + n_taps + len(lags) + 8), PHASE_ERROR])
    frobenius = frobenius_up(taps.transpose(0, 1).flatten(2))
    gram_error = multiply_up(sqrt_up(2), relative, n_taps, frobenius, frobenius)
    return sqrt_up(sum_up([largest.bound(), gram_error, UNDERFLOW]))


def _correlations(taps: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficients of ``P P^* = C_0 + sum_r (C_r e^{i r theta} + C_r^T e^{-i r theta})``.

    Args:
        taps: K_t, (taps, groups, p, q).
        exponents: The power of ``e^{i theta}`` that each tap stands at, (taps, dims).

    Returns:
        The lags r, 0 and one of each pair +-r, (lags, dims); C_0 and the ``C_r + C_r^T``, which the cosines multiply,
        flat, (lags, groups p p); the ``C_r - C_r^T`` for r != 0, which i times the sines multiply.
    """
    n_taps, groups, rows, _ = taps.shape
    # A number for each lag, in which one of a pair is positive.
    spans = 2 * (exponents.amax(0) - exponents.amin(0)) + 1
    weights = torch.tensor([math.prod(spans[dim + 1 :].tolist()) for dim in range(len(spans))], device="cpu")
    differences = exponents[:, None] - exponents
    numbers = (differences * weights).sum(-1)
    known = sorted({number for number in numbers.flatten().tolist() if number >= 0})
    places = torch.bucketize(numbers, torch.tensor(known, device="cpu"))
    lags = differences.new_zeros(len(known), exponents.shape[1])
    correlations = taps.new_zeros(len(known), groups, rows, rows)
    for tap in range(n_taps):
        kept = (numbers[tap] >= 0).nonzero()[:, 0]
        lags[places[tap, kept]] = differences[tap, kept]
        correlations.index_add_(0, places[tap, kept], taps[tap] @ taps[kept].mT)
    even, odd = correlations + correlations.mT, correlations[1:] - correlations[1:].mT
    even[0] /= 2
    return lags, even.flatten(1), odd.flatten(1)


def half_grid(counts: Sequence[int]) -> Tensor:
    """Return the grid's frequencies but for one of each pair +-theta, shape (points, dims), in a mixed order.

    A real kernel's symbols at theta and -theta are conjugate. The order is mixed because the first points set the
    level that most others then pass at once.
    """
    axes = [torch.arange(n, device="cpu") for n in counts]
    points = torch.cartesian_prod(*axes).view(-1, len(counts))
    strides = torch.tensor([math.prod(counts[i + 1 :]) for i in range(len(counts))], device="cpu")
    negatives = (-points) % torch.tensor(counts, device="cpu")
    half = points[(points * strides).sum(1) <= (negatives * strides).sum(1)]
    generator = torch.Generator("cpu").manual_seed(0)
    return half[torch.randperm(len(half), generator=generator, device="cpu")]


def roots_of_unity(n: int) -> Tensor:
    """Return ``e^{2 pi i m / n}`` for m = 0, ..., n - 1, complex fp64."""
    angles = [2 * math.pi * m / n for m in range(n)]
    return torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128, device="cpu")
