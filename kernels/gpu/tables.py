"""Tables for the Triton kernels: which program reads which rows of which weight, with which tile.

Everything here depends on shapes, strides and alignment only, so it is made once; addresses lie in tables of their own.
Nothing here imports Triton: the predicted traffic can be computed on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BLOCK_SIZE = 16
LIMIT = 16384
"""Numbers that the sums of one pass may take in registers, R times the next power of two of p: 64 for 256 threads."""
TWO_PASS_ROWS = 8
TWO_PASS_COLUMNS = 1024
SHORT_TASK = 256
"""Columns of Z that one program of `reduce`, `form` and `orthonormalise` handles."""
LONG_TASK = 1024
"""Rows of T that one program of `reduce` and `form` handles."""
RANK_ONE_TILE = (16, 256)
DEFAULT_PROCESSORS = 132
"""Multiprocessors that predictions assume where there is no GPU (H100 SXM)."""

ORIENT_P, ORIENT_Q, ORIENT_NONE = 0, 1, 2
"""Which axis of A has stride one: the block's (p), the long one (q: a weight wider than high), neither."""


class Tile(NamedTuple):
    """The compile-time tile of one class of layers; the order of the fields is the kernel's.

    A tile has ``rows * groups`` rows of A and `width` columns. `rows` of them lie in one thread, worked off in slices
    of `slice_rows`; each of the `groups` has sums of its own, added up after the last tile.
    """

    width: int
    rows: int
    slice_rows: int
    groups: int
    vectors: int
    orientation: int
    prefetch: bool
    two_pass: bool

    @property
    def height(self) -> int:
        """Rows of A in a tile."""
        return self.rows * self.groups


class Layer(NamedTuple):
    """One weight as the matrix ``A`` of shape (q, p), q >= p, with its strides in elements and its tile."""

    q: int
    p: int
    q_stride: int
    p_stride: int
    aligned: bool
    tile: Tile


class Traffic(NamedTuple):
    """Bytes that one power step and one rank-one update ask of the memory, by what they belong to.

    Attributes:
        weights: Bytes of weights read.
        gradients_read: Bytes of gradients read by the rank-one update.
        gradients_written: Bytes of gradients written by it.
        scratch: Bytes of blocks, images and partial sums written and read between the launches; most stay in L2.
    """

    weights: int
    gradients_read: int
    gradients_written: int
    scratch: int


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def block_class(block_sizes: Sequence[int]) -> int:
    """Return R in {1, 2, 4, 8, 16}, the block size that the kernels are compiled for: the largest, rounded up."""
    return _power_of_two(max(block_sizes))


def choose_tile(p: int, block: int, itemsize: int, orientation: int) -> Tile:
    """Return the tile for a short side of `p`.

    The exceptions for single widths are where a compiler spilled; tests/kernels/gpu/test_aot.py compiles every tile for
    every target (LIGHTNING_LIP_FULL_GATE=1).

    Args:
        p: The shorter side.
        block: R, a power of two up to 16.
        itemsize: Bytes of one element of the weight: 4 or 2.
        orientation: One of `ORIENT_P`, `ORIENT_Q`, `ORIENT_NONE`.
    """
    width = max(32, _power_of_two(p))
    wide = orientation == ORIENT_Q
    vector = 16 // itemsize
    vectors = min(block, 4)
    # Along q a thread also holds 16 bytes of each column, so its share of columns is smaller.
    widest = LIMIT // 2 if block == 1 else LIMIT // 4
    if block * width > LIMIT or (wide and width > widest):
        rows = vector if wide else TWO_PASS_ROWS // 2
        groups = max(1, TWO_PASS_ROWS // rows)
        if block == MAX_BLOCK_SIZE:
            rows, groups = min(rows, 4), 1
        vectors = 1 if block == 2 and not wide else vectors
        return Tile(TWO_PASS_COLUMNS, rows, rows, groups, vectors, orientation, False, two_pass=True)
    # Narrow layers have many groups of rows, whose dot products lie in more lanes each: smaller tiles make room.
    narrow = block > 1 and width < 1024
    if not wide:
        small = (block >= 4 and width <= 1024) or (block == 2 and width == 32)
        area = max(width, min(8192, (LIMIT // 2 if small else LIMIT) // block))
        # 16 vectors leave tiles so small that half precision needs 4 rows for 16 bytes a thread.
        tiny = narrow and block == MAX_BLOCK_SIZE and itemsize == 2
        rows = min(2 if small and narrow and not tiny else 4, max(1, 8192 // area))
        prefetch = width < LIMIT and not tiny
        vectors = 1 if tiny else vectors
        return Tile(width, rows, rows, area // width, vectors, orientation, prefetch, two_pass=False)
    width = max(width, 64) if block == MAX_BLOCK_SIZE else width
    area = max(width, min(1024, LIMIT // 2 // block) if narrow else min(2048, LIMIT // block))
    if itemsize == 4:
        vectors = 2 if block == 8 and width == 128 else vectors
        return Tile(width, vector, vector, area // width, vectors, orientation, prefetch=False, two_pass=False)
    # In half precision 16 bytes are 8 rows of A. From a width of 4096 on (beyond it at R = 1), and for 16 vectors
    # below 512, they exceed the registers: 4 rows, 64 bits a load.
    if width > 4096 or (width == 4096 and block > 1) or (width < 512 and block == MAX_BLOCK_SIZE):
        groups = max(1, 512 // width)
        vectors = 2 if width == 4096 else vectors
        return Tile(width, 4, 4, groups, vectors, orientation, prefetch=False, two_pass=False)
    if block >= 4:
        area = max(width, min(area, 512 if width < 512 else 1024))
    if block >= 8:
        slices = 2 if narrow else vector // 2
        return Tile(width, vector, slices, area // width, 1, orientation, prefetch=False, two_pass=False)
    return Tile(width, vector, vector, area // width, vectors, orientation, prefetch=False, two_pass=False)


def describe(weight: Tensor, block: int) -> Layer:
    """Return how the kernels see a weight of shape (m, n): as ``A = W`` for n <= m, else as ``A = W^T``."""
    m, n = weight.shape
    sides = [(m, weight.stride(0)), (n, weight.stride(1))]
    (q, q_stride), (p, p_stride) = sides if n <= m else sides[::-1]
    # The stride of a side of one is never used; PyTorch leaves anything there.
    q_stride, p_stride = (0 if q == 1 else q_stride), (0 if p == 1 else p_stride)
    orientation = ORIENT_P if p_stride == 1 else ORIENT_Q if q_stride == 1 else ORIENT_NONE
    vector = 16 // weight.element_size()
    along, across = (q, p_stride) if orientation == ORIENT_Q else (p, q_stride)
    aligned = (
        orientation != ORIENT_NONE and along % vector == 0 and across % vector == 0 and weight.data_ptr() % 16 == 0
    )
    return Layer(q, p, q_stride, p_stride, aligned, choose_tile(p, block, weight.element_size(), orientation))


class Plan:
    """What the launches need beside addresses, for L weights in their present layouts; tensors on the CPU.

    Attributes:
        layers: One :class:`Layer` a weight.
        table: int64, shape (L, 16): the columns named in kernels/gpu/columns.py.
        strips: int32, shape (S, 4), aligned layers first.
        n_aligned_strips: How many of them.
        configs: The tiles of the two classes, aligned and not.
        tasks: int32, shape (K, 4), tasks of Z first.
        n_short_tasks: How many of them.
        long_offsets, short_offsets: Where each layer's long and short vectors begin.
        n_long, n_short, n_partial: Elements of the buffers (for R = 1; times R for blocks; partial sums in all).
    """

    def __init__(self, layers: Sequence[Layer], block_sizes: Sequence[int], itemsize: int, processors: int) -> None:
        self.layers = list(layers)
        self.block = block = block_class(block_sizes)
        self.itemsize = itemsize
        self.configs: tuple[list[Tile], list[Tile]] = ([], [])
        self.long_offsets: list[int] = []
        self.short_offsets: list[int] = []
        self.n_long = self.n_short = self.n_partial = 0
        rows: list[list[int]] = []
        strips: tuple[list[list[int]], list[list[int]]] = ([], [])
        index = 0
        budget = max(1, sum(layer.q * layer.p for layer in layers) // processors)
        for number, layer in enumerate(layers):
            configs = self.configs[0 if layer.aligned else 1]
            if layer.tile not in configs:
                configs.append(layer.tile)
            ld = round_up(layer.p, 16)
            first = index
            height = self._strip_height(layer, budget)
            for begin in range(0, layer.q, height):
                strips[0 if layer.aligned else 1].append([number, begin, min(layer.q, begin + height), index])
                index += 1
            matrix = [layer.q, layer.p, layer.q_stride, layer.p_stride, configs.index(layer.tile)]
            rows.append([*matrix, self.n_long, self.n_short, ld, self.n_partial, first, index])
            self.long_offsets.append(self.n_long)
            self.short_offsets.append(self.n_short)
            self.n_long += round_up(layer.q, 16)
            self.n_short += ld
            self.n_partial += (index - first) * block * ld
        self.n_strips = index
        self.n_aligned_strips = len(strips[0])
        self.strips = torch.tensor(strips[0] + strips[1], dtype=torch.int32).reshape(-1, 4)
        tasks = self._tasks(rows, [layer.p for layer in layers], SHORT_TASK, 0, 0)
        self.n_short_tasks = len(tasks)
        tasks += self._tasks(rows, [layer.q for layer in layers], LONG_TASK, 1, len(tasks))
        self.tasks = torch.tensor(tasks, dtype=torch.int32).reshape(-1, 4)
        self.table = torch.tensor(
            [[*row, size] for row, size in zip(rows, block_sizes, strict=True)], dtype=torch.int64
        )

    def _strip_height(self, layer: Layer, budget: int) -> int:
        """Rows of one strip: an equal share of all weights for each processor, but no strip of few rows.

        A strip writes R partial sums as long as a row: 8 R rows bound them to an eighth of the weight (in fp32).
        """
        rows = max(budget // layer.p, 8 * self.block)
        return round_up(min(rows, layer.q), layer.tile.height)

    @staticmethod
    def _tasks(rows: list[list[int]], extents: list[int], size: int, kind: int, first: int) -> list[list[int]]:
        tasks: list[list[int]] = []
        for number, (row, extent) in enumerate(zip(rows, extents, strict=True)):
            begin = first + len(tasks)
            tasks += [[number, start, kind, 0] for start in range(0, extent, size)]
            row += [begin, first + len(tasks)]
        return tasks

    def traffic(self) -> Traffic:
        """Return the bytes of one iteration and one rank-one update with gradients of the weights' dtype."""
        elements = sum(layer.q * layer.p for layer in self.layers)
        weights = elements
        partials = vectors = 0
        strips_of = torch.bincount(self.strips[:, 0], minlength=len(self.layers)).tolist()
        for n_strips, layer in zip(strips_of, self.layers, strict=True):
            # Partial sums are written and read: once a strip, or once a block of rows in two passes.
            partials += 2 * layer.p * (-(-layer.q // layer.tile.height) if layer.tile.two_pass else n_strips)
            vectors += layer.p * n_strips
            weights += layer.q * layer.p if layer.tile.two_pass else 0
        # T is written once and read twice; Z and Y are written and read; V is read by `form` and written.
        short = sum(layer.p for layer in self.layers) * (6 if self.block > 1 else 4)
        long = 3 * sum(layer.q for layer in self.layers)
        scratch = 4 * self.block * (partials + vectors + short + long)
        gradients = elements * self.itemsize
        return Traffic(weights * self.itemsize, gradients, gradients, scratch)


def predicted_traffic(weights: Sequence[Tensor], block_size: int, processors: int = DEFAULT_PROCESSORS) -> Traffic:
    """Predict the bytes that the GPU kernels move for one iteration and one rank-one update, from shapes alone.

    Args:
        weights: L matrices, on any device, all of one dtype (fp32, bf16 or fp16).
        block_size: Vectors a layer, at most 16, clamped to min(m, n).
        processors: Multiprocessors of the GPU, which decide how many partial sums there are.

    Returns:
        The :class:`Traffic`. Weights and gradients are exact counts of requested bytes (the PTX executor's tests hold
        them to it); scratch counts each buffer as often as a launch needs it.

    Raises:
        ValueError: If `block_size` is not between 1 and 16, or the weights are of several dtypes.
    """
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"Expected `block_size` between 1 and {MAX_BLOCK_SIZE}, got {block_size}.")
    if len({weight.dtype for weight in weights}) != 1:
        raise ValueError(
            f"Expected weights of one dtype, got {sorted({str(w.dtype) for w in weights})}: predict each group."
        )
    sizes = [min(block_size, *weight.shape) for weight in weights]
    layers = [describe(weight, block_class(sizes)) for weight in weights]
    return Plan(layers, sizes, weights[0].element_size(), processors).traffic()


class GradientPlan:
    """Tiles of the rank-one update for gradients in their present layouts; tensors on the CPU.

    Attributes:
        table: int64, shape (L, 8): rows, columns, row stride, column stride, offsets of the two vectors.
        tiles: int32, shape (K, 4), sorted by class.
        classes: For each class (dtype, aligned) the half-open range of its tiles.
    """

    def __init__(
        self, grads: Sequence[Tensor | None], left_offsets: Sequence[int], right_offsets: Sequence[int]
    ) -> None:
        table: list[list[int]] = []
        by_class: dict[tuple[torch.dtype, bool], list[list[int]]] = {}
        for number, grad in enumerate(grads):
            if grad is None:
                table.append([0] * 8)
                continue
            sides = [
                (grad.shape[0], grad.stride(0), left_offsets[number]),
                (grad.shape[1], grad.stride(1), right_offsets[number]),
            ]
            # The axis of stride one is the column axis: a transposed gradient takes its vectors the other way round.
            if grad.stride(1) != 1 and grad.stride(0) == 1:
                sides.reverse()
            (n_rows, row_stride, u_offset), (n_cols, col_stride, v_offset) = sides
            row_stride = 0 if n_rows == 1 else row_stride
            vector = 16 // grad.element_size()
            aligned = col_stride == 1 and not (n_cols % vector or row_stride % vector or grad.data_ptr() % 16)
            table.append([n_rows, n_cols, row_stride, col_stride, u_offset, v_offset, 0, 0])
            height, width = RANK_ONE_TILE
            by_class.setdefault((grad.dtype, aligned), []).extend(
                [number, i, j, 0] for i in range(0, n_rows, height) for j in range(0, n_cols, width)
            )
        self.table = torch.tensor(table, dtype=torch.int64)
        self.classes: dict[tuple[torch.dtype, bool], tuple[int, int]] = {}
        tiles: list[list[int]] = []
        for key, entries in by_class.items():
            self.classes[key] = (len(tiles), len(tiles) + len(entries))
            tiles += entries
        self.tiles = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4)
