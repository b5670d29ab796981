"""Where the weights, gradients and scales of the compiled CPU kernels are, from step to step."""

from __future__ import annotations

import functools
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu.units import BF16, is_for_torch, layout_of, steps_of
from lightning_lip.kernels.symbol import Symbol

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a gradient."""


class Addresses(ABC):
    """What an iteration knows of tensors that may move: their addresses, and how they lie.

    Attributes:
        n_refreshes: Entries of the table of layouts written so far: one for each weight that was new or moved, and for
            each gradient that was new or changed its layout. Addresses of gradients are written at every step.
    """

    _shapes: list[tuple[int, ...]]
    _symbols: Sequence[Symbol | None]
    _table: np.ndarray
    _header: np.ndarray
    _firsts: np.ndarray
    _has_bf16: bool

    @staticmethod
    @abstractmethod
    def why_not(weight: Tensor, block_size: int, symbol: Symbol | None = None) -> str | None:
        """Return why a weight cannot be served, in words; None if it can."""

    @abstractmethod
    def _take_band(self) -> None:
        """Provide the fp32 copies that bf16 needs."""

    def _table_addresses(self, n_layers: int) -> None:
        """Begin with no address."""
        self._weight_addresses = [0] * n_layers
        self._weight_strides: list[tuple[int, ...]] = [()] * n_layers
        self._aliases: list[Tensor | None] = [None] * n_layers
        self._grad_layouts: list[_Layout | None] = [None] * n_layers
        self._torch_grads: list[int] = []
        self._row_scales: list[Tensor | None] = [None] * n_layers
        self._scale_addresses = [0] * n_layers
        self._some_are_none = True
        self.n_refreshes = 0
        # Gradients move at every step, after `zero_grad`; a numpy array is filled several times slower.
        self._addresses = np.zeros(3 * n_layers, np.int64)
        self._write_addresses = functools.partial(struct.Struct(f"{3 * n_layers}q").pack_into, self._addresses.data, 0)

    def _take_weights(self, weights: Sequence[Tensor]) -> None:
        """Rewrite the table where a weight has moved, or lies in another way at the same place."""
        addresses, strides = [w.data_ptr() for w in weights], [w.stride() for w in weights]
        if addresses == self._weight_addresses and strides == self._weight_strides:
            return
        found = zip(weights, addresses, strides, self._weight_addresses, self._weight_strides, strict=True)
        for index, (weight, address, stride, *old) in enumerate(found):
            if [address, stride] == old:
                continue
            symbol, shape = self._symbols[index], self._shapes[index]
            reason = self.why_not(weight, 1, symbol)
            if reason is not None:
                raise ValueError(f"The CPU kernels can no longer serve weight {index}: {reason}.")
            if weight.shape != shape:
                raise ValueError(
                    f"Expected weight {index} to have shape {shape} as at construction, got {tuple(weight.shape)}: "
                    "construct a new iteration."
                )
            units = slice(*self._firsts[index : index + 2])
            self._table[units, at.WEIGHT_LD : at.WEIGHT_ALONG + 1] = self._entry(weight, symbol)
            if symbol is not None and stride != old[1]:
                steps = steps_of(shape, stride)
                assert steps is not None
                self._table[units, at.COLUMN_STEP : at.TAP_STEP + 1] = steps[1:]
                # What was written in the order of elements before is not that of this kernel.
                self._header[at.READY] = -1
                self._grad_layouts[index] = None
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
        self._write_addresses(*self._weight_addresses, *addresses, *self._scale_addresses)

    def _take_scales(self, scales: Sequence[Tensor | None] | None) -> None:
        """Note where the scales of rows are, in fp32; the tensors are kept for as long."""
        if scales is None:
            return
        self._row_scales = [None if s is None else s.detach().to(torch.float32).contiguous() for s in scales]
        for index, (own, symbol) in enumerate(zip(self._row_scales, self._symbols, strict=True)):
            if own is not None and (symbol is None or own.shape != (symbol.geometry.groups * symbol.geometry.rows,)):
                raise ValueError(f"Expected a scale for each row of kernel {index}, got shape {tuple(own.shape)}.")
        self._scale_addresses = [0 if own is None else own.data_ptr() for own in self._row_scales]

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
            symbol, shape = self._symbols[index], self._shapes[index]
            if grad.shape != shape:
                raise ValueError(
                    f"Expected gradient {index} to have shape {shape}, as its weight, got {tuple(grad.shape)}."
                )
            if is_for_torch(grad, symbol, self._weight_strides[index] or grad.stride()):
                self._torch_grads.append(index)
            else:
                units = slice(*self._firsts[index : index + 2])
                self._table[units, at.GRAD_LD : at.GRAD_ALONG + 1] = self._entry(grad, symbol)
            self._grad_layouts[index] = layout
        self._some_are_none = None in self._grad_layouts

    def _entry(self, matrix: Tensor, symbol: Symbol | None) -> tuple[int, int, int]:
        """Return the leading dimension of a weight or gradient, whether it is bf16, and ALONG, for the table.

        The buffer that bf16 needs is in place afterwards.
        """
        if matrix.dtype == torch.bfloat16 and not self._has_bf16:
            self._has_bf16 = True
            self._take_band()
        is_bf16 = BF16[matrix.dtype]
        if symbol is not None:
            steps = steps_of(matrix.shape, matrix.stride())
            assert steps is not None
            return steps[0], is_bf16, 0
        layout = layout_of(matrix.shape, matrix.stride())
        assert layout is not None
        dim, stride = layout
        long_dim = 1 if matrix.shape[0] < matrix.shape[1] else 0
        return stride, is_bf16, int(dim == long_dim)
