"""A certified upper bound of the largest eigenvalue of many small Hermitian matrices, by batched Cholesky factors.

The same argument and assumptions as in :mod:`lightning_lip.rigorous.matrix`, for complex matrices, and for the largest
of all of them: one level is tried on a whole batch, and only matrices that fail raise it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lip.rigorous.rounding import UNDERFLOW, UNIT_ROUNDOFF, divide_up, gamma, multiply_up, sum_up

LEVEL_TOLERANCE = 1e-7
"""A level lies this far (relative) above the estimate that it comes from."""

EXACT_ESTIMATE_SIZE = 128
"""Up to this size an eigenvalue is estimated by a full decomposition, above it by block iteration."""


class LargestEigenvalue:
    """A number that no eigenvalue of the matrices seen so far exceeds, but for rounding errors.

    Args:
        size: p, the size of the matrices.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._level = 0.0

    def bound(self) -> float:
        """Return an upper bound of the largest eigenvalue of all matrices seen, as they were computed.

        Where a Cholesky factor of ``fl(s^2 I - G)`` exists in floating point, ``s^2 I - G`` is at least
        ``- 2 u s^2 - gamma / (1 - gamma) tr(s^2 I - G)`` (Higham, theorem 10.3; a complex product of length k is two
        real ones of length 2k, and gamma's index leaves room for a division by two roundings).
        """
        factorisation = gamma(4 * (self._size + 4))
        slack = sum_up([multiply_up(2 * self._size, divide_up(factorisation, 1 - factorisation)), 4 * UNIT_ROUNDOFF])
        return sum_up([self._level, multiply_up(self._level, slack), UNDERFLOW])

    def include(self, matrices: Tensor) -> None:
        """Raise the level until it covers all of the Hermitian matrices, complex (points, p, p)."""
        # No eigenvalue exceeds the Frobenius norm: most small ones need no factorisation.
        norms = torch.linalg.vector_norm(matrices, dim=(-2, -1)) * (1 + gamma(2 * self._size**2 + 16))
        left = matrices[norms > self._level]
        tolerance = LEVEL_TOLERANCE
        while len(left):
            if self._level > 0:
                shifted = left.neg()
                shifted.diagonal(dim1=-2, dim2=-1).add_(self._level)
                left = left[torch.linalg.cholesky_ex(shifted).info != 0]
                if not len(left):
                    break
            estimate = _estimate(left) * (1 + LEVEL_TOLERANCE)
            if estimate <= self._level:
                estimate = max(self._level, UNDERFLOW) * (1 + tolerance)
                tolerance *= 4
            self._level = estimate


def _estimate(matrices: Tensor) -> float:
    """Return an *estimate (from below)* of the largest eigenvalue of Hermitian matrices, complex (points, p, p)."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = matrices.shape[-1]

    def start(width: int) -> Tensor:
        return torch.randn(size, width, generator=generator, dtype=matrices.dtype, device="cpu")

    vectors = start(1).expand(len(matrices), size, 1)
    lengths = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
    for _ in range(12):
        vectors = matrices @ (vectors / lengths.clamp(min=1e-300))
        lengths = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
    best = matrices[lengths.flatten().topk(min(4, len(matrices))).indices]
    if size <= EXACT_ESTIMATE_SIZE:
        return float(torch.linalg.eigvalsh(best).max())
    block = start(8).expand(len(best), size, 8)
    for _ in range(40):
        block = best @ torch.linalg.qr(block).Q
    return float(torch.linalg.matrix_norm(block, 2).max())
