"""Large layers on the CPU: one pass over the weight through torch's threaded BLAS, in row blocks that fit the cache."""

from __future__ import annotations

import torch
from torch import Tensor

# A block stays in the second-level caches (2 MB a core, two cores) between its two uses; smaller blocks gain nothing
# and make the threads wait for each other more often.
_BLOCK_BYTES = 2 << 20
# Columns of a band: with pieces of rows below 1 kB, prefetching fails and costs more than the cache saves.
_MIN_BAND = 256

LARGE_BYTES = 8 << 20
"""Weights above this size, in fp32, are left to BLAS.

Measured on two cores (AVX-512, 2 MB of L2 each), power step and update together, the best of 25 runs in microseconds,
compiled against BLAS: 1024 x 1024 at r = 1 714 / 668, at r = 8 1243 / 892; 2048 x 1024 1560 / 1466 and 2338 / 1821;
3072 x 768 at r = 8 2742 / 2005; 2048 x 2048 at r = 1 2882 / 2399. Where other processes want the same cores, threads
that wait for each other cost many times more than that gain: only where it is large in absolute terms is it worth it.
"""


def is_large(n_elements: int) -> bool:
    """Return whether a weight of `n_elements` is better left to BLAS.

    With one thread never: the compiled kernel is as fast as BLAS then, at every size.
    """
    return 4 * n_elements > LARGE_BYTES and torch.get_num_threads() > 1


def multiply_(
    matrix: Tensor, vectors: Tensor, images: Tensor, products: Tensor, scale: float, with_products: bool
) -> None:
    """Write ``T = scale V A^T`` and, if asked for, ``Z = T A``.

    Args:
        matrix: ``A``, shape (q, p), fp32 or bf16, contiguous along one dimension.
        vectors: ``V``, shape (r, p), fp32.
        images: ``T``, shape (r, q), fp32; written.
        products: ``Z``, shape (r, p), fp32; written if `with_products`, otherwise undefined.
        scale: Factor of ``T``.
        with_products: Whether to form ``Z``.
    """
    q, p = matrix.shape
    rows = max(16, _BLOCK_BYTES // (4 * p))
    if matrix.stride(1) != 1:
        rows = max(rows, _MIN_BAND)
    products.zero_()
    for start in range(0, q, rows):
        # bf16 is widened, not multiplied as it is: BLAS would round T and Z to bf16.
        block = matrix[start : start + rows].to(torch.float32)
        image = images[:, start : start + rows]
        if len(vectors) == 1:
            torch.addmv(image[0], block, vectors[0], beta=0, alpha=scale, out=image[0])
            if with_products:
                torch.addmv(products[0], block.T, image[0], out=products[0])
        else:
            torch.addmm(image, vectors, block.T, beta=0, alpha=scale, out=image)
            if with_products:
                torch.addmm(products, image, block, out=products)
