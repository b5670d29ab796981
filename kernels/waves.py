"""The plane waves of a convolution: which frequencies are followed, and how the taps of a kernel join in each.

On the infinite grid a convolution multiplies by its symbol, a small complex matrix ``P(w)`` for each frequency ``w``.
Stride and dilation are removed first, as in :mod:`lightning_lip.rigorous.convolution`: with s' = s / gcd(s, d), tap j
of a dimension reads the channels of residue j mod s' and stands at exponent j // s'. A transposed convolution is the
adjoint of the one whose kernel lies as its own does. Kernels are real, so that ``w`` and ``-w`` are twins: half of the
frequencies are followed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CELLS_PER_EXPONENT = 3
"""Cells of a dimension for each exponent: 6 for three taps, 20 on half of the plane. Fewer where they would be many."""

MAX_CELLS = 128
"""Cells of a symbol, at most."""

MOST_POINTS_PER_EXPONENT = 6
MAX_POINTS = 320
"""Of a grid for depthwise convolutions, at most: fewer for each exponent where they would be more."""


class Geometry(NamedTuple):
    """What a kernel, shape (groups * rows, columns, *kernel_size), has for a symbol.

    Attributes:
        rows: Rows of a group: output channels, of a transposed convolution input channels.
        columns: The kernel's second dimension.
        groups: How many kernels of `rows` rows there are, each with a symbol of its own; the largest counts.
        kernel_size: Taps of each dimension.
        stride: One number a dimension.
        dilation: One number a dimension.
        sizes: For a circulant operator, the size of its input in each dimension, a multiple of the stride: only the
            grid's own frequencies occur then. None for the infinite grid.
    """

    rows: int
    columns: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sizes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return (self.groups * self.rows, self.columns, *self.kernel_size)

    @property
    def n_taps(self) -> int:
        """Taps of the kernel."""
        return math.prod(self.kernel_size)


class Waves(NamedTuple):
    """The tables of a geometry, on the CPU: J taps, R residues, D lags, C cells, in one to three dimensions.

    Attributes:
        residues: The residue of each tap, in 0 ... R - 1, (J,).
        exponents: The power of ``e^{iw}`` that each tap stands at, (J, dims), int64.
        n_residues: R.
        lags: Differences of exponents within a residue, (D, dims), int64; 0 is the first.
        pairs: The lag of each two taps, -1 where their residues differ, (J, J).
        centres: The middle of each cell, (C, dims), fp64, radians.
        halves: Half of a cell's side, (dims,), fp64, radians; 0 where no tap overlaps along a dimension.
        points: For a circulant operator the frequencies within each cell, (C, K, dims), fp64, the last ones repeated
            where a cell has fewer; None on the infinite grid.
    """

    residues: Tensor
    exponents: Tensor
    n_residues: int
    lags: Tensor
    pairs: Tensor
    centres: Tensor
    halves: Tensor
    points: Tensor | None


@functools.cache
def waves_of(geometry: Geometry) -> Waves:
    """Return the tables of a geometry."""
    taps = list(itertools.product(*(range(k) for k in geometry.kernel_size)))
    axes = [_axis(*settings) for settings in zip(*geometry[3:6], geometry.sizes or [None] * len(taps[0]), strict=True)]
    parts = [[axis[t] for axis, t in zip(axes, tap, strict=True)] for tap in taps]
    known = sorted({tuple(residue for residue, _ in part) for part in parts})
    residues = [known.index(tuple(residue for residue, _ in part)) for part in parts]
    exponents = [tuple(exponent for _, exponent in part) for part in parts]

    def lag(j: int, k: int) -> tuple[int, ...]:
        return tuple(a - b for a, b in zip(exponents[j], exponents[k], strict=True))

    among = [(j, k) for j in range(len(taps)) for k in range(len(taps)) if residues[j] == residues[k]]
    lags = sorted({lag(j, k) for j, k in among}, key=lambda d: (any(d), d))
    pairs = torch.full((len(taps), len(taps)), -1, device="cpu")
    places = {d: place for place, d in enumerate(lags)}
    first, second = zip(*among, strict=True)
    pairs[list(first), list(second)] = torch.tensor([places[lag(j, k)] for j, k in among], device="cpu")
    degrees = [max(d[axis] for d in lags) for axis in range(len(axes))]
    sizes = geometry.sizes or [None] * len(axes)
    periods = [None if n is None else n // s for n, s in zip(sizes, geometry.stride, strict=True)]
    centres, halves, points = _cells(degrees, periods)
    return Waves(
        torch.tensor(residues, device="cpu"),
        torch.tensor(exponents, device="cpu").view(len(taps), -1),
        len(known),
        torch.tensor(lags, device="cpu").view(len(lags), -1),
        pairs,
        centres,
        halves,
        points,
    )


class Grid(NamedTuple):
    """Frequencies at which the symbols of all channels of a depthwise convolution are evaluated.

    Attributes:
        points: On half of the torus, (P, dims), fp64, radians.
        neighbours: The points beside each one in each dimension, (P, 2 * dims); -w stands for a w of the other half.
        factor: What the largest |P(w)| on them is multiplied by to bound that of all w, infinite for no bound.
    """

    points: Tensor
    neighbours: Tensor
    factor: float


@functools.cache
def dense_grid_of(geometry: Geometry) -> Grid:
    """Return a grid for the numbers of depthwise convolutions; of a circulant one all of its own frequencies."""
    waves = waves_of(geometry)
    if waves.points is not None:
        points = waves.points.flatten(0, 1)
        return Grid(points, torch.arange(len(points), device="cpu")[:, None], 1.0)
    degrees = [int(waves.lags[:, axis].max()) for axis in range(waves.lags.shape[1])]
    for density in range(MOST_POINTS_PER_EXPONENT, 0, -1):
        counts = [max(density * degree, 1) for degree in degrees]
        if math.prod(counts) <= 2 * MAX_POINTS:
            break
    # A trigonometric polynomial of degree N, here |P|^2, is at most 1 / cos(pi N / n) times its largest value at
    # n > 2 N points in its one variable, by Riesz's inequality.
    factor = math.cos(math.pi / density) ** (-sum(map(bool, degrees)) / 2) if density > 2 else math.inf
    cells = [c for c in itertools.product(*(range(n) for n in counts)) if c <= _negative(c, counts)]
    places = {cell: place for place, cell in enumerate(cells)}

    def beside(cell: tuple[int, ...], axis: int, step: int) -> int:
        other = tuple((c + step * (axis == k)) % n for k, (c, n) in enumerate(zip(cell, counts, strict=True)))
        return places[min(other, _negative(other, counts))]

    neighbours = [[beside(cell, axis, step) for axis in range(len(counts)) for step in (1, -1)] for cell in cells]
    steps = torch.tensor([2 * math.pi / n for n in counts], dtype=torch.float64, device="cpu")
    points = torch.tensor(cells, dtype=torch.float64, device="cpu").view(len(cells), -1) * steps
    return Grid(points, torch.tensor(neighbours, device="cpu"), factor)


def _axis(kernel_size: int, stride: int, dilation: int, size: int | None) -> list[tuple[int, int]]:
    """Return the residue and the exponent of each tap of one dimension."""
    if size is not None:
        return [(dilation * tap % stride, dilation * tap // stride) for tap in range(kernel_size)]
    reduced = stride // math.gcd(stride, dilation)
    return [(tap % reduced, tap // reduced) for tap in range(kernel_size)]


def _cells(degrees: Sequence[int], periods: Sequence[int | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the centres of the cells, half of their sides, and the frequencies of a circulant operator in each."""
    for density in range(CELLS_PER_EXPONENT, 0, -1):
        counts = [1 if degree == 0 else 2 * -(-density * degree // 2) for degree in degrees]
        if math.prod(counts) <= 2 * MAX_CELLS - 2 ** len(counts):
            break
    cells = [c for c in itertools.product(*(range(n) for n in counts)) if c <= _negative(c, counts)]
    steps = torch.tensor([2 * math.pi / n for n in counts], dtype=torch.float64, device="cpu")
    centres = torch.tensor(cells, dtype=torch.float64, device="cpu").view(len(cells), -1) * steps
    halves = torch.where(torch.tensor(counts, device="cpu") > 1, steps / 2, 0.0)
    if periods[0] is None:
        return centres, halves, None
    inside: dict[tuple[int, ...], list[list[float]]] = {cell: [] for cell in cells}
    sizes = [p for p in periods if p is not None]
    for point in itertools.product(*map(range, sizes)):
        cell = tuple(round(x * n / p) % n for x, n, p in zip(point, counts, sizes, strict=True))
        if cell in inside:
            inside[cell].append([2 * math.pi * x / p for x, p in zip(point, sizes, strict=True)])
    filled = [points for points in inside.values() if points]
    most = max(map(len, filled))
    table = torch.tensor([points + points[-1:] * (most - len(points)) for points in filled], dtype=torch.float64)
    return table[:, len(table[0]) // 2].clone(), halves, table


def _negative(cell: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(-c % n for c, n in zip(cell, counts, strict=True))
