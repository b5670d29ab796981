"""The iteration of an operator that is no matrix, a convolution say, through its own maps."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_lip import kernels
from lightning_lip.kernels.reference import iterate
from lightning_lip.operators.base import LinearOperator


class MatrixFreeIteration:
    """The block of one operator, iterated by its ``apply`` and ``adjoint``.

    Args:
        operator: The operator.
        vectors: The starting block, shape (r, elements of the domain), with orthonormal rows.
        backend: As in :class:`~lightning_lip.norms.spectral_norms.SpectralNorms`.

    Attributes:
        vectors: The present block.
    """

    def __init__(self, operator: LinearOperator, vectors: Tensor, backend: kernels.Backend | None) -> None:
        self._operator = operator
        self.vectors = vectors
        size = math.prod(operator.codomain_shape), math.prod(operator.domain_shape)
        self._rows = kernels.compiled_rows(vectors, *size, backend) if operator.leading_vectors() is None else None

    def power_step(self, n_iterations: int) -> kernels.PowerStep:
        """Advance the block; see :func:`lightning_lip.kernels.reference.iterate`.

        Where the operator knows its singular vectors there is nothing to iterate.
        """
        op = self._operator
        exact = op.leading_vectors()
        if exact is not None:
            left, right = exact
            return kernels.PowerStep(op.norm(left, right)[None], [left], [right], [self.vectors])
        step = None
        for done in range(n_iterations):
            step = self._compiled_step()
            if step is None:
                n_iterations -= done
                break
            self.vectors = step[3]
        if step is None:
            step = iterate(self._apply, self._adjoint, self.vectors, n_iterations)
        sigma, left, right, self.vectors = step
        return kernels.PowerStep(sigma[None], [left], [right], [self.vectors])

    def _apply(self, rows: Tensor) -> Tensor:
        return self._operator.apply(rows.view(len(rows), *self._operator.domain_shape)).flatten(1)

    def _adjoint(self, rows: Tensor) -> Tensor:
        return self._operator.adjoint(rows.view(len(rows), *self._operator.codomain_shape)).flatten(1)

    def _compiled_step(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return what one iteration of the reference returns; None where that must do it."""
        if self._rows is None:
            return None
        images = self._apply(self.vectors).contiguous()
        products = self._adjoint(images).contiguous()
        needed = (rows.untyped_storage().data_ptr() for rows in (images, self.vectors))
        if products.untyped_storage().data_ptr() in needed:  # it is overwritten
            products = products.clone()
        finished = self._rows.finish(images, products)
        return None if finished is None else (*finished, products[0], products)
