"""The CPU backend for operators whose maps are PyTorch's own, convolutions first: the rest of a step, compiled.

The functions are in :mod:`lightning_lip.kernels.cpu_rows_compiled`; this module owns the buffers.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_lip.kernels import cpu_threads
from lightning_lip.kernels.cpu import load_compiled
from lightning_lip.kernels.cpu_layout import MAX_BLOCK_SIZE
from lightning_lip.kernels.cpu_rows_compiled import (
    _CHUNK,
    _IMAGES,
    _LANES,
    _LEFT,
    _MIX,
    _N_HEADER,
    _P,
    _POOL,
    _PRODUCTS,
    _Q,
    _R,
    _SIGMA,
    _STRIP,
    _STRIPS,
    _SUMS,
    _THREAD,
    _THREADS,
    _run,
    thread_address,
)

__all__ = ["MAX_BLOCK_SIZE", "CompiledRows"]

PARALLEL = 1 << 16
"""Elements of T and Z together from which on several threads serve."""


class CompiledRows:
    """Finishes steps with blocks of one size; everything but u is preallocated. One object serves one thread at a time.

    Args:
        r: Vectors, at most :data:`~lightning_lip.kernels.cpu_layout.MAX_BLOCK_SIZE`.
        q: Elements of a row of T.
        p: Elements of a row of Z.
    """

    def __init__(self, r: int, q: int, p: int) -> None:
        self._shape = r, q, p
        self._is_parallel = r * (q + p) >= PARALLEL
        self._header = np.zeros(_N_HEADER, np.int64)
        self._header[[_R, _Q, _P]] = r, q, p
        n_tasks = -(-q // _CHUNK) - (-p // _CHUNK)
        fp64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        self._sums = torch.empty((n_tasks + 3) * _LANES**2, **fp64)
        self._sigma = torch.zeros((), **fp64)
        self._mix = torch.empty((_LANES + 1) * _LANES, dtype=torch.float32, device="cpu")
        buffers = {_SUMS: self._sums, _SIGMA: self._sigma, _MIX: self._mix}
        for field, buffer in buffers.items():
            self._header[field] = buffer.data_ptr()
        self._threads_for: tuple[int, int] | None = None
        load_compiled("rows", lambda: cast(Any, _run).compile("boolean(int64)"))

    def _note_threads(self) -> None:
        """Provide for torch's present number of threads."""
        n_threads = torch.get_num_threads() if self._is_parallel else 1
        threads_for = n_threads, cpu_threads.n_forks
        if threads_for == self._threads_for:
            return
        self._threads_for = threads_for
        pool = cpu_threads.pool_address() if n_threads > 1 else 0
        n_threads = n_threads if pool else 1
        if pool:
            load_compiled("threads for rows", thread_address)
        self._header[[_POOL, _THREAD, _THREADS]] = pool, thread_address() if pool else 0, n_threads
        self._strips = torch.empty(n_threads * _LANES * _STRIP, dtype=torch.float32, device="cpu")
        self._header[_STRIPS] = self._strips.data_ptr()

    def finish(self, images: Tensor, products: Tensor) -> tuple[Tensor, Tensor] | None:
        """Turn T and Z of a block into sigma and u, and Z, in place, into the next block, whose first row is v.

        Args:
            images: ``T``, shape (r, q), fp32, contiguous.
            products: ``Z = T A``, shape (r, p), fp32, contiguous; overwritten, also where the result is None.

        Returns:
            sigma, shape (), an *estimate from below*, and the unit vector u, shape (q,), both fp32 and new; None if
            this is for the reference.

        Raises:
            ValueError: If a tensor has another shape, dtype or layout.
        """
        r, q, p = self._shape
        for rows, shape in ((images, (r, q)), (products, (r, p))):
            # Compiled code knows addresses only.
            if rows.shape != shape or rows.dtype != torch.float32 or not rows.is_contiguous():
                raise ValueError(
                    f"Expected contiguous fp32 rows of shape {shape}, got {tuple(rows.shape)}, {rows.dtype}."
                )
        self._note_threads()
        left = images.new_empty(q)
        self._header[[_IMAGES, _PRODUCTS, _LEFT]] = images.data_ptr(), products.data_ptr(), left.data_ptr()
        if not _run(self._header.ctypes.data):
            return None
        increment_version([products])
        return self._sigma.float(), left
