"""Frobenius norms of weights, and of what a step of training changed in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lip.kernels.tensors import compute_dtype, in_double, is_sharded, without_modes
from lightning_lip.norms.sharded import groups_of, summed
from lightning_lip.operators.base import LinearOperator


class FrobeniusNorms:
    """The Frobenius norms of the operators' weights; of sharded weights sums over ranks, in one all_reduce.

    For the norm of a change, :meth:`keep` copies the weights (of shards this rank's parts) and the next
    :meth:`measure` frees the copies.

    Args:
        operators: The L operators. A convolution's weight is its kernel.

    Attributes:
        operators: They.
    """

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = operators
        self._kept: list[Tensor] = []

    @without_modes()
    def keep(self) -> None:
        """Copy the present weights, unless there are copies."""
        if not self._kept:
            self._kept = [_local(op.weight()).clone() for op in self.operators]

    def drop(self) -> None:
        """Free the copies."""
        self._kept = []

    @without_modes()
    def measure(self) -> tuple[Tensor, Tensor | None]:
        """Return the norms of the weights and, where copies were kept, of their change divided by those of the copies.

        With sharded weights every rank must call it.

        Returns:
            ``|W|_F`` and ``|W - W_kept|_F / |W_kept|_F``, each of shape (L,), fp64 where the device has it; infinite
            for a weight that was zero and is not, zero for one that stayed zero.
        """
        kept, self._kept = self._kept, []
        parts, groups = [], []
        for index, op in enumerate(self.operators):
            weight = op.weight()
            local = _local(weight)
            terms = [_square(local)]
            if kept:
                terms.append(_square(kept[index]))
                terms.append(_square(kept[index].sub_(local)))
                kept[index] = torch.empty(0)
            parts.append(torch.stack(terms))
            groups.append(groups_of(weight))
        sums = summed(parts, groups)
        norms = torch.stack([s.to(sums[0]) for s in sums]).sqrt().unbind(dim=1)
        if not kept:
            return norms[0], None
        return norms[0], torch.where(norms[2] > 0, norms[2] / norms[1], norms[2])


def _local(weight: Tensor) -> Tensor:
    """Return a weight, or this rank's part of it."""
    whole: Any = weight
    return whole.to_local() if is_sharded(weight) else weight.detach()


def _square(tensor: Tensor) -> Tensor:
    return in_double(torch.linalg.vector_norm(tensor, dtype=compute_dtype(tensor.dtype))).square()
