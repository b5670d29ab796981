"""The CPU backend: persistent blocks of all weights, iterated by one compiled call.

The functions are in :mod:`lightning_lip.kernels.cpu.compiled.layers`; this module owns the buffers and the table of
addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu import threads
from lightning_lip.kernels.cpu.addresses import Addresses
from lightning_lip.kernels.cpu.compiled.layers import run, thread
from lightning_lip.kernels.cpu.compiled.products import band_width
from lightning_lip.kernels.cpu.loading import load_compiled
from lightning_lip.kernels.cpu.plan import plan
from lightning_lip.kernels.cpu.units import (
    BF16,
    Unit,
    arena,
    buffer_sizes,
    layout_of,
    scratch_of,
    tables_of,
    units_of,
)
from lightning_lip.kernels.cpu.units import why_not as why_no_symbol
from lightning_lip.kernels.reference import PowerStep, rank_one_update_
from lightning_lip.kernels.symbol import Symbol, state_shape

GROUP = 1 << 17
"""Elements of weights a thread whose products are formed before the next ones are read: they lie in a cache of 1 MB."""

PART = 1 << 16
"""Elements of a weight for each task of a thread, about.

Measured on two cores within training steps of 784-1024-1024-10 at r = 8: groups of 1 << 16 to 1 << 18 a thread and
parts of 1 << 15 to 1 << 17 take .55 to .63 ms an iteration, the single pass of one thread .82 ms.
"""

PARALLEL = 1_500_000
"""Elements of all weights, times their vectors, from which on several threads serve: to wake them takes time."""


class CpuIteration(Addresses):
    """Persistent blocks of singular vectors of L weights, with everything preallocated.

    One object serves one thread at a time; different objects share nothing. It can be pickled and copied; the copy
    continues from the same blocks. Sigma is an *estimate from below*, as in the reference.

    Args:
        weights: L matrices, each of shape (m_l, n_l), for their shapes; their addresses may change from step to step.
        vectors: The starting blocks, each of shape (r_l, min(m_l, n_l)), with orthonormal rows; they are copied.

    Raises:
        ValueError: If :meth:`why_not` has a reason against a weight, or a block does not fit its weight.
    """

    def __init__(
        self, weights: Sequence[Tensor], vectors: Sequence[Tensor], symbols: Sequence[Symbol | None] | None = None
    ) -> None:
        symbols = list(symbols or [None] * len(weights))
        for weight, block, symbol in zip(weights, vectors, symbols, strict=True):
            reason = self.why_not(weight, len(block), symbol)
            if reason is not None:
                raise ValueError(f"The CPU kernels cannot serve a weight of shape {tuple(weight.shape)}: {reason}.")
            if symbol is not None:
                if (weight.shape, block.shape) != (symbol.geometry.shape, state_shape(symbol.geometry)):
                    raise ValueError(
                        f"Expected a kernel of shape {symbol.geometry.shape} and a state of shape "
                        f"{state_shape(symbol.geometry)}, got {tuple(weight.shape)} and {tuple(block.shape)}."
                    )
            elif block.dim() != 2 or block.shape[1] != min(weight.shape) or not 1 <= len(block) <= block.shape[1]:
                raise ValueError(
                    f"Expected a block of shape (r, {min(weight.shape)}), 1 <= r <= {min(weight.shape)}, for a weight "
                    f"of shape {tuple(weight.shape)}, got {tuple(block.shape)}."
                )
        self._build([tuple(w.shape) for w in weights], vectors, symbols)

    @staticmethod
    def why_not(weight: Tensor, block_size: int, symbol: Symbol | None = None) -> str | None:
        """Return why these kernels cannot serve a weight with blocks of a size, in words; None if they can."""
        if weight.device.type != "cpu":
            return f"it is on {weight.device}, not on the CPU"
        if weight.dtype not in BF16:
            return f"they take fp32 and bf16, not {weight.dtype}"
        if symbol is not None:
            return why_no_symbol(weight, symbol)
        if weight.layout != torch.strided or weight.dim() != 2 or weight.numel() == 0:
            return "they take dense matrices with at least one element"
        if layout_of(weight.shape, weight.stride()) is None:
            return f"neither of its dimensions is contiguous (strides {weight.stride()})"
        if min(block_size, *weight.shape) > at.MAX_BLOCK_SIZE:
            return f"they take at most {at.MAX_BLOCK_SIZE} vectors a layer, not {block_size}"
        return None

    def _build(
        self, shapes: list[tuple[int, ...]], vectors: Sequence[Tensor], symbols: Sequence[Symbol | None]
    ) -> None:
        """Allocate the buffers and the table, and copy the blocks."""
        n_layers = len(shapes)
        self._shapes, self._symbols = shapes, symbols
        of_layers = [
            units_of(layer, shape, len(block), symbol)
            for layer, (shape, block, symbol) in enumerate(zip(shapes, vectors, symbols, strict=True))
        ]
        self._units = [unit for units in of_layers for unit in units]
        self._firsts = np.cumsum([0, *map(len, of_layers)])
        self._leaders = self._firsts[:-1].copy()
        self._table = np.zeros((len(self._units), at.N_FIELDS), np.int64)
        self._table[:, at.MULTIPLICITY] = 1
        self._multiplicities: Sequence[int] = []
        self._table_addresses(n_layers)

        # The kernels know these types only, whatever default dtype or device is set.
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        fp64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        work = sum(unit.p * unit.q * unit.lanes for unit in self._units)
        self._is_parallel = work >= PARALLEL
        self._buffers = arena([size for unit in self._units for size in buffer_sizes(unit, symbols[unit.layer])])
        self._chosen = np.zeros((len(self._units), at.MAX_WAVES), np.int64)
        self._blocks = [
            self._block(int(first), block, symbol)
            for first, block, symbol in zip(self._firsts, vectors, symbols, strict=False)
        ]
        for number, unit in enumerate(self._units):
            self._describe(number, unit)
        self._sigma = torch.full((n_layers,), math.nan, **fp64)
        self._sigmas = torch.full((len(self._units),), math.nan, **fp64)
        self._coefficients = torch.zeros(n_layers, **fp32)
        self._scales = torch.ones(len(self._units), **fp64)
        self._value = torch.zeros((), **fp32)
        arrays = [array.ctypes.data for array in (self._table, self._firsts, self._leaders, self._addresses)]
        buffers = (self._sigma, self._sigmas, self._coefficients, self._scales, self._value)
        self._header = np.zeros(at.N_HEADER, np.int64)
        self._header[: at.VALUE + 1] = [n_layers, len(self._units), *arrays, *(b.data_ptr() for b in buffers)]
        self._header[at.READY] = -1
        self._header_address: int = self._header.ctypes.data
        self._has_bf16 = False
        self._threads_for: tuple[int, int] | None = None
        self._take_threads(1)
        load_compiled("run", lambda: run.compile("void(int64, int64, int64, float64, float64)"))

    def _block(self, first: int, block: Tensor, symbol: Symbol | None) -> Tensor:
        """Return a copy of a layer's block where the kernels keep it."""
        if symbol is not None:
            return block.to(torch.float32, copy=True).contiguous()
        _, _, r, lanes, p, _ = self._units[first]
        return self._buffers[5 * first].view(p, lanes).zero_().T[:r].copy_(block)

    def _describe(self, number: int, unit: Unit) -> None:
        """Write a unit's row of the table."""
        layer, group, r, lanes, p, q = unit
        row = self._table[number]
        vectors, long, short, left, scaled = (b.data_ptr() for b in self._buffers[5 * number : 5 * number + 5])
        row[at.R : at.SHORT + 1] = [r, lanes, p, q, vectors, 0, 0, long, short]
        row[at.LAYER : at.GROUP + 1] = layer, group
        symbol = self._symbols[layer]
        if symbol is None:
            return
        tables = tables_of(symbol.geometry)
        row[list(tables.fields)] = list(tables.fields.values())
        row[at.KIND] = at.SYMBOL if lanes else at.SCALARS
        row[at.SCALED_IMAGES : at.LEFT + 1] = scaled, left
        row[at.N_DOUBLES] = scratch_of(symbol, lanes)[1]
        if lanes:
            n = int(row[at.N_CELLS])
            state = self._blocks[layer][n * group]
            row[at.STATE : at.CHOSEN + 1] = state.data_ptr(), self._chosen[number].ctypes.data
            row[at.N_TURN] = r // 4 if r < 2 * n else 0

    def _take_threads(self, n_threads: int) -> None:
        """Provide for so many threads: their tasks, scratch for each, and the pool that they come from."""
        pool, _, n_threads = team = threads.team(n_threads, "threads", thread)
        self._header[at.POOL : at.THREADS + 1] = team
        work = plan([unit.sides for unit in self._units], n_threads * GROUP if pool else 0, PART)
        self._tasks, self._phases = np.array(work.tasks, np.int64), np.array(work.phases, np.int64)
        addresses = self._tasks.ctypes.data, self._phases.ctypes.data
        self._header[at.TASKS : at.N_PHASES + 1] = [*addresses, len(work.phases) - 1]
        self._scratch = arena([work.scratch])[0]
        self._table[:, at.PRODUCTS : at.IMAGES + 1] = self._scratch.data_ptr() + 4 * np.array(work.offsets)
        sizes = [
            scratch_of(symbol, self._units[first].lanes)[0]
            for first, symbol in zip(self._firsts, self._symbols, strict=False)
            if symbol is not None
        ]
        small = max([at.SMALL_OF_MATRICES, *sizes])
        self._small = torch.empty(n_threads * small, dtype=torch.float64, device="cpu")
        self._header[at.SMALL : at.SMALL_SIZE + 1] = self._small.data_ptr(), small
        self._take_band()

    def _take_band(self) -> None:
        """Provide the fp32 copies that bf16 needs, for each thread."""
        size = max(max(8 * p, p * band_width(p), q) for _, _, _, _, p, q in self._units) if self._has_bf16 else 0
        self._band = torch.empty(int(self._header[at.THREADS]) * size, dtype=torch.float32, device="cpu")
        self._header[at.BAND : at.BAND_SIZE + 1] = [self._band.data_ptr(), size]

    def _note_threads(self) -> None:
        """Provide for torch's present number of threads."""
        threads_for = torch.get_num_threads(), threads.n_forks
        if threads_for != self._threads_for:
            self._take_threads(threads_for[0])
            self._threads_for = threads_for

    def _run(self, n_iterations: int, code: int, level: float = 1.0, scale: float = 0.0) -> None:
        if self._is_parallel:
            self._note_threads()
        run(self._header_address, n_iterations, code, level, scale)

    def __getstate__(self) -> dict[str, Any]:
        vectors = [block.clone() for block in self._blocks]
        return {"shapes": self._shapes, "vectors": vectors, "symbols": self._symbols}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(state["shapes"], state["vectors"], state["symbols"])

    @property
    def vectors(self) -> list[Tensor]:
        """The present blocks, each of shape (r_l, min(m_l, n_l)), fp32: views that the next step overwrites."""
        return list(self._blocks)

    @property
    def coefficients(self) -> Tensor:
        """What the last gradients of each sigma were multiplied by, shape (L,), fp32; overwritten by the next step."""
        return self._coefficients

    @property
    def last_step(self) -> PowerStep:
        """The result of the last step; its vectors are views that the next step overwrites."""
        pairs = [self._pair(layer) for layer in range(len(self._shapes))]
        left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return PowerStep(self._sigma.float(), left, right, self.vectors)

    def _pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the singular vectors of a layer, as the reference has them."""
        leader, symbol = int(self._leaders[layer]), self._symbols[layer]
        long, short = self._buffers[5 * leader + 1 : 5 * leader + 3]
        if symbol is None:
            m, n = self._shapes[layer]
            return (short, long) if m < n else (long, short)
        geometry = symbol.geometry
        if len(long) < 2 * geometry.groups * geometry.rows:  # of one group
            left = long.new_zeros(2, geometry.groups, geometry.rows)
            left[:, self._units[leader].group] = long.view(2, -1)
            long = left.flatten()
        if self._table[leader, at.COLUMN_STEP] < self._table[leader, at.TAP_STEP]:
            short = short.view(2, geometry.n_taps, geometry.columns).mT.flatten()
        return long, short

    def power_step(
        self, weights: Sequence[Tensor], n_iterations: int = 1, scales: Sequence[Tensor | None] | None = None
    ) -> PowerStep:
        """Advance the blocks; see :func:`lightning_lip.kernels.reference.power_step`.

        Args:
            weights: The L weights, of the shapes given at construction, fp32 or bf16.
            n_iterations: Reads of each weight; with 0 the blocks stay as they are.
            scales: For each kernel s, shape (rows of all groups,), by which its rows are multiplied, or None; if there
                are none at all, those of the step before.

        Returns:
            A :class:`PowerStep`; ``sigma`` is new, fp32, shape (L,), the vectors are views that the next step
            overwrites.

        Raises:
            ValueError: If a weight changed its shape, or to something that :meth:`why_not` refuses.
        """
        self._take_weights(weights)
        self._take_scales(scales)
        self._write_addresses(*self._weight_addresses, *[0] * len(weights), *self._scale_addresses)
        self._run(n_iterations, at.NO_UPDATE)
        return self.last_step

    def rank_one_update_(self, grads: Sequence[Tensor | None], coefficients: Tensor) -> None:
        """Add ``c_l u_l v_l^T`` to each gradient in place, with the vectors of the last step.

        Args:
            grads: The L gradients, each of shape (m_l, n_l), of any floating dtype and strides; None skips a layer.
            coefficients: ``c``, shape (L,); a layer whose coefficient is 0 is skipped.
        """
        self._take_grads(grads)
        self._coefficients.copy_(coefficients)
        self._run(-1, at.COEFFICIENTS_GIVEN)
        self._update_with_torch(grads)
        increment_version([grad for grad in grads if grad is not None])

    def penalise_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        n_iterations: int,
        code: int,
        level: float,
        scale: float,
        multiplicities: Sequence[int],
        scales: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Iterate and add the gradient of ``scale * penalty`` to `grads`, in one compiled call.

        Args:
            weights: As in :meth:`power_step`.
            grads: As in :meth:`rank_one_update_`.
            n_iterations: Reads of each weight; with 0 the present vectors serve.
            code: A value of :data:`lightning_lip.kernels.penalties.PENALTY_CODES`.
            level: M, or the knee: :func:`lightning_lip.kernels.penalties.level_of`.
            scale: The factor of the penalty.
            multiplicities: How often each layer counts, shape (L,).
            scales: As in :meth:`power_step`.

        Returns:
            ``scale * penalty``, shape (), fp32; the next call overwrites it, and `coefficients` too. A layer that is
            exactly zero gets no gradient, nor does one whose coefficient is not finite.
        """
        self._take_weights(weights)
        self._take_scales(scales)
        self._take_grads(grads)
        if multiplicities != self._multiplicities:
            self._table[:, at.MULTIPLICITY] = np.repeat(multiplicities, np.diff(self._firsts))
            self._multiplicities = multiplicities[:]
        self._run(n_iterations, code, level, scale)
        if self._torch_grads:
            self._update_with_torch(grads)
        # The kernel wrote behind autograd's back.
        written = [g for g in grads if g is not None] if self._some_are_none else grads
        increment_version(written)  # type: ignore[arg-type]  # a cast would cost a microsecond's tenth
        return self._value

    @torch.no_grad()
    def _update_with_torch(self, grads: Sequence[Tensor | None]) -> None:
        """Update gradients of a dtype or layout that the kernel has not."""
        for index in self._torch_grads:
            grad, scale = grads[index], self._row_scales[index]
            if grad is not None:
                left, right = self._pair(index)
                if scale is not None:
                    left = (left.view(2, -1) * scale).flatten()
                rank_one_update_([grad], self._coefficients[index : index + 1], [left], [right])
