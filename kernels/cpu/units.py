"""What the compiled CPU kernels work on: the units of weights, the tables of symbols, and how all lies in memory.

A matrix is one unit; of a convolution each group of its kernel is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.compiled.symbols.cells import scratch_sizes
from lightning_lip.kernels.cpu.compiled.symbols.scalars import scratch_sizes as sizes_of_scalars
from lightning_lip.kernels.scalars import is_scalar
from lightning_lip.kernels.symbol import Symbol
from lightning_lip.kernels.waves import Geometry, dense_grid_of, waves_of

BF16 = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of weights that compiled kernels know, and of gradients."""

_ALIGNMENT = 16  # fp32 elements: a cache line


class Unit(NamedTuple):
    """A matrix, or a group of a convolution's kernel.

    Attributes:
        layer: Which weight.
        group: Which group of it.
        r: Vectors; of a symbol two for each wave.
        lanes: Vectors that buffers hold.
        p: Numbers of a right vector: the shorter side of a matrix, columns times taps of a kernel.
        q: Numbers of a left vector.
    """

    layer: int
    group: int
    r: int
    lanes: int
    p: int
    q: int

    @property
    def sides(self) -> tuple[int, int, int]:
        """What the work is shared out by."""
        return self.p, self.q, self.lanes


def units_of(layer: int, shape: Sequence[int], block_size: int, symbol: Symbol | None) -> list[Unit]:
    """Return the units of a weight."""
    if symbol is None:
        return [Unit(layer, 0, block_size, _lanes(block_size), min(shape), max(shape))]
    geometry, r = symbol.geometry, 2 * waves_a_step(symbol)
    if is_scalar(geometry):
        return [Unit(layer, 0, 2, 0, geometry.n_taps, geometry.groups)]
    sides = geometry.columns * geometry.n_taps, geometry.rows
    return [Unit(layer, group, r, -(-r // 8) * 8, *sides) for group in range(geometry.groups)]


def buffer_sizes(unit: Unit, symbol: Symbol | None) -> tuple[int, ...]:
    """Return the sizes of VECTORS, LONG, SHORT, LEFT and SCALED_IMAGES."""
    _, _, _, lanes, p, q = unit
    return (lanes * p, q, p, 0, 0) if symbol is None else (lanes * p, 2 * q, 2 * p, 2 * q, lanes * q)


def _lanes(r: int) -> int:
    """Return how many vectors the buffers of a matrix's block of r hold."""
    return 1 if r == 1 else 8 if r <= 8 else 16


def arena(sizes: Sequence[int]) -> list[Tensor]:
    """Return fp32 buffers of these sizes in one piece of memory, each at the start of a cache line."""
    starts = np.cumsum([0] + [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()
    # NaN, so that an element that was never written shows.
    whole = torch.full((starts[-1],), math.nan, dtype=torch.float32, device="cpu")
    return [whole[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)]


class Tables(NamedTuple):
    """The tables of a geometry for compiled code.

    Attributes:
        fields: Values of fields of a unit's row in the table, by field.
        side: Numbers of a right vector, columns times residues.
        kept: The arrays whose addresses are among the fields.
    """

    fields: dict[int, int]
    side: int
    kept: list[np.ndarray]


@functools.cache
def tables_of(geometry: Geometry) -> Tables:
    """Return the tables of a geometry on the infinite grid."""
    waves = waves_of(geometry)
    halves = waves.halves.numpy()
    exponents, lags = waves.exponents.numpy(), waves.lags.tolist()
    # The polynomial is real: a lag and its negative have conjugate coefficients, and one of them is enough.
    half = [lag for lag in lags if lag >= [0] * len(lag)]
    pairs = [
        (j, k, half.index(lags[waves.pairs[k, j]]))
        for j in range(geometry.n_taps)
        for k in range(j, geometry.n_taps)
        if waves.pairs[j, k] >= 0
    ]
    addressed = {
        at.RESIDUES: waves.residues.numpy(),
        at.EXPONENTS: exponents,
        at.LAGS: np.array(half, np.int64),
        at.PAIRS: np.array(pairs, np.int64),
        at.CENTRES: waves.centres.numpy(),
        at.HALVES: halves,
    }
    if is_scalar(geometry):
        grid = dense_grid_of(geometry)
        counts = np.where(np.any(half, 1), 2.0, 1.0)
        addressed |= {
            at.CENTRES: grid.points.numpy(),
            # A little more, for rounding.
            at.HALVES: np.append(halves, grid.factor * 1.0001),
            at.COSINES: (np.cos(grid.points.numpy() @ np.array(half, np.float64).T) * counts).astype(np.float32),
            at.NEIGHBOURS: grid.neighbours.numpy(),
        }
    kept = {field: np.ascontiguousarray(table) for field, table in addressed.items()}
    fields = {
        at.N_CELLS: len(addressed[at.CENTRES]),
        at.COLUMNS: geometry.columns,
        at.TAPS: geometry.n_taps,
        at.N_RESIDUES: waves.n_residues,
        at.DIMS: len(geometry.kernel_size),
        at.N_LAGS: len(half),
        at.N_PAIRS: len(pairs),
        at.N_POWERS: int(exponents.max()) + 1,
        **{field: table.ctypes.data for field, table in kept.items()},
    }
    return Tables(fields, geometry.columns * waves.n_residues, list(kept.values()))


def waves_a_step(symbol: Symbol) -> int:
    """Return how many cells of each group a step takes."""
    return min(max(symbol.n_waves, 2), len(waves_of(symbol.geometry).centres))


def scratch_of(symbol: Symbol, lanes: int) -> tuple[int, int]:
    """Return how many numbers of scratch a unit needs in fp64, and how many of them come before its fp32 numbers."""
    tables = tables_of(symbol.geometry)
    taps, *sizes = (tables.fields[field] for field in (at.TAPS, at.N_LAGS, at.N_POWERS, at.N_CELLS))
    if is_scalar(symbol.geometry):
        doubles, floats = sizes_of_scalars(symbol.geometry.groups, taps, *sizes)
    else:
        doubles, floats = scratch_sizes(lanes, tables.side, taps, *sizes)
    return doubles + -(-floats // 2), doubles


def why_not(weight: Tensor, symbol: Symbol) -> str | None:
    """Return why the compiled kernels cannot serve a kernel as a symbol, in words; None if they can."""
    if symbol.geometry.sizes is not None:
        return "a circulant convolution's own frequencies are the reference's"
    if steps_of(weight.shape, weight.stride()) is None:
        return f"neither its taps nor its columns are contiguous (strides {weight.stride()})"
    if waves_a_step(symbol) > at.MAX_WAVES:
        return f"they take at most {at.MAX_WAVES} waves a symbol, not {symbol.n_waves}"
    return None


def steps_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int] | None:
    """Return how a kernel, shape (rows, columns, *kernel_size), lies in memory; None where that is not served.

    Returns:
        Elements from row to row, from column to column and from tap to tap: columns and taps fill a row without gaps,
        taps innermost (contiguous) or columns (channels last).
    """
    columns, taps = shape[1], int(np.prod(shape[2:]))
    row = strides[0] if shape[0] > 1 else columns * taps
    for column_step, tap_step in ((taps, 1), (1, columns)):
        expected = [tap_step]
        for size in reversed(shape[3:]):
            expected.insert(0, expected[0] * size)
        fits = zip(shape[1:], strides[1:], [column_step, *expected], strict=True)
        if all(size == 1 or stride == wanted for size, stride, wanted in fits) and row >= columns * taps:
            return row, column_step, tap_step
    return None


def is_for_torch(grad: Tensor, symbol: Symbol | None, weight_strides: Sequence[int]) -> bool:
    """Return whether a gradient has a dtype or strides that the compiled update does not know."""
    if grad.dtype not in BF16:
        return True
    if symbol is not None:
        steps = steps_of(grad.shape, grad.stride())
        weight_steps = steps_of(grad.shape, weight_strides)
        return steps is None or weight_steps is None or steps[1:] != weight_steps[1:]
    layout = layout_of(grad.shape, grad.stride())
    if layout is None:
        return True
    # Rows that overlap (an expanded tensor): torch refuses to write there, and says so.
    dim, stride = layout
    return grad.shape[1 - dim] > 1 and stride < grad.shape[dim]


def layout_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return the contiguous dimension of a matrix, the longer one if both are, and the stride of the other one."""
    usable = [dim for dim in (1, 0) if strides[dim] == 1 or shape[dim] == 1]
    if not usable:
        return None
    dim = max(usable, key=lambda d: shape[d])
    return dim, strides[1 - dim]
