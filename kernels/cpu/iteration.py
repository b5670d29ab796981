"""The CPU backend: persistent blocks of all weights, iterated by one compiled call.

The functions are in :mod:`lightning_lip.kernels.cpu.compiled.layers`; this module owns the buffers and the table of
addresses.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu import threads
from lightning_lip.kernels.cpu.compiled.layers import run, thread
from lightning_lip.kernels.cpu.compiled.products import band_width
from lightning_lip.kernels.cpu.loading import load_compiled
from lightning_lip.kernels.cpu.plan import plan
from lightning_lip.kernels.reference import PowerStep, rank_one_update_

_BF16 = {torch.float32: 0, torch.bfloat16: 1}
_ALIGNMENT = 16  # fp32 elements: a cache line

GROUP = 1 << 17
"""Elements of weights a thread whose products are formed before the next ones are read: they lie in a cache of 1 MB."""

PART = 1 << 16
"""Elements of a weight for each task of a thread, about.

Measured on two cores within training steps of 784-1024-1024-10 at r = 8: groups of 1 << 16 to 1 << 18 a thread and
parts of 1 << 15 to 1 << 17 take .55 to .63 ms an iteration, the single pass of one thread .82 ms.
"""

PARALLEL = 1_500_000
"""Elements of all weights, times their vectors, from which on several threads serve: to wake them takes time."""

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a gradient."""


class CpuIteration:
    """Persistent blocks of singular vectors of L weights, with everything preallocated.

    One object serves one thread at a time; different objects share nothing. It can be pickled and copied; the copy
    continues from the same blocks. Sigma is an *estimate from below*, as in the reference.

    Args:
        weights: L matrices, each of shape (m_l, n_l), for their shapes; their addresses may change from step to step.
        vectors: The starting blocks, each of shape (r_l, min(m_l, n_l)), with orthonormal rows; they are copied.

    Attributes:
        n_refreshes: Entries of the table of layouts written so far: one for each weight that was new or moved, and for
            each gradient that was new or changed its layout. Addresses of gradients are written at every step.

    Raises:
        ValueError: If :meth:`why_not` has a reason against a weight, or a block does not fit its weight.
    """

    def __init__(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        for weight, block in zip(weights, vectors, strict=True):
            reason = self.why_not(weight, len(block))
            if reason is not None:
                raise ValueError(f"The CPU kernels cannot serve a weight of shape {tuple(weight.shape)}: {reason}.")
            if block.dim() != 2 or block.shape[1] != min(weight.shape) or not 1 <= len(block) <= block.shape[1]:
                raise ValueError(
                    f"Expected a block of shape (r, {min(weight.shape)}), 1 <= r <= {min(weight.shape)}, for a weight "
                    f"of shape {tuple(weight.shape)}, got {tuple(block.shape)}."
                )
        self._build([(w.shape[0], w.shape[1]) for w in weights], vectors)

    @staticmethod
    def why_not(weight: Tensor, block_size: int) -> str | None:
        """Return why these kernels cannot serve `weight` with blocks of `block_size`, in words; None if they can."""
        if weight.device.type != "cpu":
            return f"it is on {weight.device}, not on the CPU"
        if weight.dtype not in _BF16:
            return f"they take fp32 and bf16, not {weight.dtype}"
        if weight.layout != torch.strided or weight.dim() != 2 or weight.numel() == 0:
            return "they take dense matrices with at least one element"
        if _layout(weight.shape, weight.stride()) is None:
            return f"neither of its dimensions is contiguous (strides {weight.stride()})"
        if min(block_size, *weight.shape) > at.MAX_BLOCK_SIZE:
            return f"they take at most {at.MAX_BLOCK_SIZE} vectors a layer, not {block_size}"
        return None

    def _build(self, shapes: list[tuple[int, int]], vectors: Sequence[Tensor]) -> None:
        """Allocate the buffers and the table, and copy the blocks."""
        n_layers = len(shapes)
        self._shapes = shapes
        self._table = np.zeros((n_layers, at.N_FIELDS), np.int64)
        self._table[:, at.MULTIPLICITY] = 1
        self._multiplicities: Sequence[int] = []
        self._weight_addresses = [0] * n_layers
        self._weight_strides: list[tuple[int, ...]] = [()] * n_layers
        self._aliases: list[Tensor | None] = [None] * n_layers
        self._grad_layouts: list[_Layout | None] = [None] * n_layers
        self._torch_grads: list[int] = []
        self._some_are_none = True
        self.n_refreshes = 0

        # The kernels know these types only, whatever default dtype or device is set.
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        fp64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        sides = [(min(shape), max(shape), _lanes(len(block))) for shape, block in zip(shapes, vectors, strict=True)]
        self._sides = sides
        self._is_parallel = sum(p * q * lanes for p, q, lanes in sides) >= PARALLEL
        views = _parts([size for p, q, lanes in sides for size in (lanes * p, q, p)])
        self._blocks = []
        for view, (p, _, lanes), block in zip(views[::3], sides, vectors, strict=True):
            self._blocks.append(view.view(p, lanes).zero_().T[: len(block)].copy_(block))
        longs, shorts = views[1::3], views[2::3]
        pairs = zip(shapes, longs, shorts, strict=True)
        singular = [(short, long) if m < n else (long, short) for (m, n), long, short in pairs]
        self._left, self._right = ([pair[side] for pair in singular] for side in (0, 1))
        self._sigma = torch.full((n_layers,), math.nan, **fp64)
        self._coefficients = torch.zeros(n_layers, **fp32)
        self._scales = torch.ones(n_layers, **fp64)
        self._value = torch.zeros((), **fp32)
        # Gradients move at every step, after `zero_grad`; a numpy array is filled several times slower.
        self._addresses = np.zeros(2 * n_layers, np.int64)
        self._write_addresses = functools.partial(struct.Struct(f"{2 * n_layers}q").pack_into, self._addresses.data, 0)
        for index, ((p, q, lanes), block) in enumerate(zip(sides, vectors, strict=True)):
            v, long, short = (view.data_ptr() for view in views[3 * index : 3 * index + 3])
            self._table[index, at.R : at.SHORT + 1] = [len(block), lanes, p, q, v, 0, 0, long, short]

        arrays = [self._table.ctypes.data, self._addresses.ctypes.data]
        buffers = (self._sigma, self._coefficients, self._scales, self._value)
        self._header = np.zeros(at.N_HEADER, np.int64)
        self._header[: at.VALUE + 1] = [n_layers, *arrays, *(buffer.data_ptr() for buffer in buffers)]
        self._header_address: int = self._header.ctypes.data
        self._has_bf16 = False
        self._threads_for: tuple[int, int] | None = None
        self._take_threads(1)
        load_compiled("run", lambda: run.compile("void(int64, int64, int64, float64, float64)"))

    def _take_threads(self, n_threads: int) -> None:
        """Provide for so many threads: their tasks, scratch for each, and the pool that they come from."""
        pool, _, n_threads = team = threads.team(n_threads, "threads", thread)
        self._header[at.POOL : at.THREADS + 1] = team
        work = plan(self._sides, n_threads * GROUP if pool else 0, PART)
        self._tasks, self._phases = np.array(work.tasks, np.int64), np.array(work.phases, np.int64)
        addresses = self._tasks.ctypes.data, self._phases.ctypes.data
        self._header[at.TASKS : at.N_PHASES + 1] = [*addresses, len(work.phases) - 1]
        self._scratch = _parts([work.scratch])[0]
        self._table[:, at.PRODUCTS : at.IMAGES + 1] = self._scratch.data_ptr() + 4 * np.array(work.offsets)
        self._small = torch.empty(n_threads * at.SMALL_SIZE, dtype=torch.float64, device="cpu")
        self._header[at.SMALL] = self._small.data_ptr()
        self._take_band()

    def _take_band(self) -> None:
        """Provide the fp32 copies that bf16 needs, for each thread."""
        size = max(max(8 * p, p * band_width(p), q) for p, q, _ in self._sides) if self._has_bf16 else 0
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
        return {"shapes": self._shapes, "vectors": [block.clone() for block in self._blocks]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(state["shapes"], state["vectors"])

    @property
    def vectors(self) -> list[Tensor]:
        """The present blocks, each of shape (r_l, min(m_l, n_l)), fp32: views that the next step overwrites."""
        return list(self._blocks)

    @property
    def last_step(self) -> PowerStep:
        """The result of the last step; its vectors are views that the next step overwrites."""
        return PowerStep(self._sigma.float(), self._left, self._right, self._blocks)

    def power_step(self, weights: Sequence[Tensor], n_iterations: int = 1) -> PowerStep:
        """Advance the blocks; see :func:`lightning_lip.kernels.reference.power_step`.

        Args:
            weights: The L weights, of the shapes given at construction, each of shape (m_l, n_l), fp32 or bf16.
            n_iterations: Reads of each weight; with 0 the blocks stay as they are.

        Returns:
            A :class:`PowerStep`; ``sigma`` is new, fp32, shape (L,), the vectors are views that the next step
            overwrites.

        Raises:
            ValueError: If a weight changed its shape, or to something that :meth:`why_not` refuses.
        """
        self._take_weights(weights)
        self._write_addresses(*self._weight_addresses, *[0] * len(weights))
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

        Returns:
            ``scale * penalty``, shape (), fp32; the next call overwrites it. A layer that is exactly zero gets no
            gradient, nor does one whose coefficient is not finite.
        """
        self._take_weights(weights)
        self._take_grads(grads)
        if multiplicities != self._multiplicities:
            self._table[:, at.MULTIPLICITY] = multiplicities
            self._multiplicities = multiplicities[:]
        self._run(n_iterations, code, level, scale)
        if self._torch_grads:
            self._update_with_torch(grads)
        # The kernel wrote behind autograd's back.
        written = [g for g in grads if g is not None] if self._some_are_none else grads
        increment_version(written)  # type: ignore[arg-type]  # a cast would cost a microsecond's tenth
        return self._value

    def _take_weights(self, weights: Sequence[Tensor]) -> None:
        """Rewrite the table where a weight has moved, or lies in another way at the same place."""
        addresses, strides = [w.data_ptr() for w in weights], [w.stride() for w in weights]
        if addresses == self._weight_addresses and strides == self._weight_strides:
            return
        found = zip(weights, addresses, strides, self._weight_addresses, self._weight_strides, strict=True)
        for index, (weight, address, stride, *old) in enumerate(found):
            if [address, stride] == old:
                continue
            m, n = self._shapes[index]
            reason = self.why_not(weight, 1)
            if reason is not None:
                raise ValueError(f"The CPU kernels can no longer serve weight {index}: {reason}.")
            if weight.shape != (m, n):
                raise ValueError(
                    f"Expected weight {index} to have shape {(m, n)} as at construction, got {tuple(weight.shape)}: "
                    "construct a new iteration."
                )
            self._table[index, at.WEIGHT_LD : at.WEIGHT_ALONG + 1] = self._entry(weight)
            # An address and strides identify the weight as long as no other tensor can be given the address.
            self._aliases[index] = weight.detach()
            self._weight_addresses[index], self._weight_strides[index] = address, stride
            self.n_refreshes += 1

    def _take_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Write the addresses, and the table where a gradient's layout is not that of the last step."""
        layouts = [None if g is None else (g.shape, g.stride(), g.dtype) for g in grads]
        if layouts != self._grad_layouts:
            self._take_layouts(grads, layouts)
        addresses = [0 if g is None else g.data_ptr() for g in grads]
        for index in self._torch_grads:
            addresses[index] = 0
        self._write_addresses(*self._weight_addresses, *addresses)

    def _take_layouts(self, grads: Sequence[Tensor | None], layouts: Sequence[_Layout | None]) -> None:
        for index, (grad, layout, old) in enumerate(zip(grads, layouts, self._grad_layouts, strict=True)):
            if layout == old:
                continue
            # Consistent at every point, should the next line raise: no layout, no place in the list.
            self._grad_layouts[index] = None
            if index in self._torch_grads:
                self._torch_grads.remove(index)
            self.n_refreshes += 1
            if grad is None:
                continue
            m, n = self._shapes[index]
            if grad.shape != (m, n):
                raise ValueError(
                    f"Expected gradient {index} to have shape {(m, n)}, as its weight, got {tuple(grad.shape)}."
                )
            if _is_for_torch(grad):
                self._torch_grads.append(index)
            else:
                self._table[index, at.GRAD_LD : at.GRAD_ALONG + 1] = self._entry(grad)
            self._grad_layouts[index] = layout
        self._some_are_none = None in self._grad_layouts

    def _entry(self, matrix: Tensor) -> tuple[int, int, int]:
        """Return the leading dimension of a weight or gradient, whether it is bf16, and ALONG, for the table.

        The buffer that bf16 needs is in place afterwards.
        """
        if matrix.dtype == torch.bfloat16 and not self._has_bf16:
            self._has_bf16 = True
            self._take_band()
        layout = _layout(matrix.shape, matrix.stride())
        assert layout is not None
        dim, stride = layout
        long_dim = 1 if matrix.shape[0] < matrix.shape[1] else 0
        return stride, _BF16[matrix.dtype], int(dim == long_dim)

    @torch.no_grad()
    def _update_with_torch(self, grads: Sequence[Tensor | None]) -> None:
        """Update gradients of a dtype or layout that the kernel has not."""
        for index in self._torch_grads:
            grad = grads[index]
            if grad is not None:
                vectors = [self._left[index]], [self._right[index]]
                rank_one_update_([grad], self._coefficients[index : index + 1], *vectors)


def _is_for_torch(grad: Tensor) -> bool:
    """Return whether a gradient has a dtype or strides that the compiled update does not know."""
    layout = _layout(grad.shape, grad.stride())
    if grad.dtype not in _BF16 or layout is None:
        return True
    # Rows that overlap (an expanded tensor): torch refuses to write there, and says so.
    dim, stride = layout
    return grad.shape[1 - dim] > 1 and stride < grad.shape[dim]


def _layout(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return the contiguous dimension of a matrix, the longer one if both are, and the stride of the other one."""
    usable = [dim for dim in (1, 0) if strides[dim] == 1 or shape[dim] == 1]
    if not usable:
        return None
    dim = max(usable, key=lambda d: shape[d])
    return dim, strides[1 - dim]


def _lanes(r: int) -> int:
    """Return how many vectors the buffers of a block of r hold."""
    return 1 if r == 1 else 8 if r <= 8 else 16


def _parts(sizes: Sequence[int]) -> list[Tensor]:
    """Return fp32 buffers of these sizes in one piece of memory, each at the start of a cache line."""
    starts = np.cumsum([0] + [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()
    # NaN, so that an element that was never written shows.
    arena = torch.full((starts[-1],), math.nan, dtype=torch.float32, device="cpu")
    return [arena[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)]
