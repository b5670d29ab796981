"""The CPU backend for operators whose maps are PyTorch's own, convolutions first: the rest of a step, compiled.

The functions are in :mod:`lightning_lip.kernels.cpu.compiled.rows`; this module owns the buffers.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lightning_lip.kernels.cpu import threads
from lightning_lip.kernels.cpu.compiled import rows as compiled
from lightning_lip.kernels.cpu.loading import load_compiled

PARALLEL = 1 << 16
"""Elements of T and Z together from which on several threads serve."""


class CompiledRows:
    """Finishes steps with blocks of one size. One object serves one thread at a time.

    Args:
        r: Vectors, at most :data:`~lightning_lip.kernels.cpu.layout.MAX_BLOCK_SIZE`.
        q: Elements of a row of T.
        p: Elements of a row of Z.
    """

    def __init__(self, r: int, q: int, p: int) -> None:
        self._shape = r, q, p
        self._is_parallel = r * (q + p) >= PARALLEL
        self._header = np.zeros(compiled.N_HEADER, np.int64)
        self._header_address: int = self._header.ctypes.data
        self._header[[compiled.R, compiled.Q, compiled.P]] = r, q, p
        self._n_tasks = -(-q // compiled.CHUNK) - (-p // compiled.CHUNK)
        self._threads_for: tuple[int, int] | None = None
        load_compiled("rows", lambda: compiled.run.compile("boolean(int64)"))

    def __reduce__(self) -> tuple[type[CompiledRows], tuple[int, int, int]]:
        """Make copies anew: a copied header would hold addresses of the original."""
        return CompiledRows, self._shape

    def _note_threads(self) -> None:
        """Provide for torch's present number of threads."""
        n_threads = torch.get_num_threads() if self._is_parallel else 1
        threads_for = n_threads, threads.n_forks
        if threads_for == self._threads_for:
            return
        self._threads_for = threads_for
        team = threads.team(n_threads, "threads for rows", compiled.thread)
        self._header[[compiled.POOL, compiled.THREAD, compiled.THREADS]] = team
        # In fp64 numbers: sigma, Gram matrices, what mixes rows, and the strips of each thread.
        gram_matrices, mix = (self._n_tasks + 3) * compiled.LANES**2, (compiled.LANES + 1) * compiled.LANES // 2
        sizes = (8, gram_matrices, mix, team[2] * self._shape[0] * compiled.STRIP // 2)
        starts = [8 * start for start in accumulate(sizes, initial=0)]
        self._offsets, self._scratch_size = np.array(starts[:-1]), sum(sizes)

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
        # Of this call only: kept by every layer it would be as much as many layers' vectors.
        scratch = torch.empty(self._scratch_size, dtype=torch.float64, device="cpu")
        self._header[compiled.IMAGES : compiled.LEFT + 1] = images.data_ptr(), products.data_ptr(), left.data_ptr()
        self._header[compiled.SIGMA : compiled.STRIPS + 1] = self._offsets + scratch.data_ptr()
        if not compiled.run(self._header_address):
            return None
        increment_version([products])
        return scratch[0].float(), left
