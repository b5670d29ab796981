"""Block (subspace) iteration in plain PyTorch, on any device: the specification of every other kernel.

A block holds r orthonormal vectors of a weight's *shorter side* as rows, shape (r, p), p = min(m, n): it is the smaller
one to keep, and the smaller one to orthonormalise. For a weight ``W`` of shape (m, n) with n <= m that is the domain,
``A = W``; otherwise the codomain, ``A = W^T``, with left and right vectors exchanged. One step, for ``A`` of shape
(q, p), q >= p, and a block ``V`` of shape (r, p), reads ``A`` once in a fused kernel:

1. ``T = V A^T``, shape (r, q): the block's images, as rows.
2. Rayleigh-Ritz: the eigenvectors ``Q`` of ``T T^T`` rotate the rows of ``T``, the largest image first.
3. ``Z = T A``, shape (r, p); with ``t`` and ``z`` the first rows, ``u = t / |t|``, ``v = z / |z|`` and
   ``sigma = |z| / |t| = |A^T u| = u^T A v``.
4. The next block is an orthonormal basis of the rows of ``Z``, in their order.

This differs from the textbook (Saad, "Numerical Methods for Large Eigenvalue Problems", ch. 5) in two ways. The pair
``(u, v)`` is taken half a step later, from ``Z`` and not from ``V``: it costs no further read of ``A``, and ``sigma``
is exactly the Rayleigh quotient of the returned pair, hence never above the spectral norm but for rounding. Every
Gram matrix is formed of rows divided by their largest magnitude: squares in fp32 overflow at weights of 1e19.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lip.kernels.penalties import PENALTY_CODES, built_in
from lightning_lip.kernels.symbol import Symbol, symbol_step
from lightning_lip.kernels.tensors import without_autocast


class PowerStep(NamedTuple):
    """What one step returns for L weights of shapes (m_l, n_l) with blocks of r_l vectors.

    Attributes:
        sigma: Estimates (from below) of the L spectral norms, shape (L,), fp32 (fp64 if a weight is fp64).
        left: L unit vectors ``u_l``, each of shape (m_l,); zeros where the weight is exactly zero. Of a symbol,
            real and imaginary part: see :class:`~lightning_lip.kernels.symbol.SymbolStep`.
        right: L unit vectors ``v_l``, each of shape (n_l,); ``u_l^T W_l v_l = sigma_l``. Of a symbol, two rows too.
        vectors: The next blocks, each of shape (r_l, min(m_l, n_l)) with orthonormal rows; of a symbol, its state.
    """

    sigma: Tensor
    left: list[Tensor]
    right: list[Tensor]
    vectors: list[Tensor]

    def copied(self) -> PowerStep:
        """Return a copy of the triplets, which the next iteration leaves alone, without the blocks."""
        return PowerStep(self.sigma.clone(), [u.clone() for u in self.left], [v.clone() for v in self.right], [])


def rayleigh_ritz(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate a block's images onto the Ritz vectors.

    Args:
        images: ``T``, shape (..., r, m); any magnitude.

    Returns:
        The rotation ``Q^T``, shape (..., r, r), whose rows are ordered from the largest Ritz value to the smallest,
        and the largest magnitude in ``T``, shape (..., 1, 1), one where ``T`` is zero. Where ``T`` is not finite
        the rotation is the identity.
    """
    scale = _or_one(_magnitude(images))
    scaled = images / scale
    return ritz_rotation(gram_matrix(scaled)).to(images.dtype), scale


def ritz_rotation(gram: Tensor) -> Tensor:
    """Return the eigenvectors of Gram matrices (..., r, r) as rows, the largest eigenvalue's first.

    Where a matrix is not finite the rotation is the identity.
    """
    # eigh raises on NaN, and a training run whose weights went bad must see NaN in the log, not a LAPACK error.
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(finite, gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.mT.flip(-2)


def orthonormalise(rows: Tensor, fallback: Tensor) -> Tensor:
    """Return an orthonormal basis of `rows`, shape (..., r, n), in their order; `fallback` where that is impossible.

    Householder QR keeps the basis orthonormal to rounding whatever the rank of `rows`. Rows that are all zero or not
    finite carry no direction: there the block stays as it was. A vector of the basis may have either sign.
    """
    magnitude = _magnitude(rows)
    usable = (magnitude > 0) & magnitude.isfinite()
    rows = torch.where(usable, rows / _or_one(magnitude), fallback)
    return torch.where(usable, torch.linalg.qr(rows.mT).Q.mT, fallback)


_PART = 8192
"""Elements of a row that are summed in fp32, at most: all 65536 of a map of features at once would lose a digit."""


def gram_matrix(rows: Tensor) -> Tensor:
    """Return the Gram matrix of `rows`, shape (..., r, n), in fp64 where the device has it, shape (..., r, r)."""
    dtype = rows.dtype if rows.device.type == "mps" else torch.float64
    n = rows.shape[-1]
    part = math.gcd(n, _PART)
    if part == n or part < _PART // 8:
        return (rows @ rows.mT).to(dtype)
    parts = rows.view(*rows.shape[:-1], -1, part).transpose(-3, -2)
    return (parts @ parts.mT).sum(-3, dtype=dtype)


def _magnitude(rows: Tensor) -> Tensor:
    """Return the largest magnitudes of blocks (..., r, m), shape (..., 1, 1)."""
    return rows.abs().amax(dim=(-2, -1), keepdim=True)


def _or_one(divisor: Tensor) -> Tensor:
    """Return a divisor of at least 0 that leaves a zero numerator zero."""
    return torch.where(divisor > 0, divisor, torch.ones_like(divisor))


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vectors in the last dimension divided by their norms, and the norms; a zero stays zero."""
    norm = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return vector / _or_one(norm), norm


def iterate(
    apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], vectors: Tensor, n_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Iterate a block of vectors with any linear map A, given as two functions: the algorithm of this file.

    Args:
        apply: Maps (..., r, p) to (..., r, q): A on each row.
        adjoint: Maps (..., r, q) to (..., r, p): the adjoint of A on each row.
        vectors: Blocks with orthonormal rows, shape (..., r, p).
        n_iterations: Applications of both; with 0 only `apply` is used, and the block stays as it is.

    Returns:
        sigma (...), u (..., q), v (..., p) and the next block (..., r, p), as in :class:`PowerStep`.
    """

    def rotated_images(block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = apply(block)
        rotation, scale = rayleigh_ritz(images)
        return rotation @ (images / scale), rotation, scale

    images, rotation, scale = rotated_images(vectors)
    if n_iterations == 0:
        left, norm = _unit(images[..., 0, :])
        return (norm * scale[..., 0])[..., 0], left, (rotation[..., :1, :] @ vectors)[..., 0, :], vectors
    for _ in range(n_iterations - 1):
        vectors = orthonormalise(adjoint(images), fallback=vectors)
        images, _, _ = rotated_images(vectors)
    # `images` is scaled, `products` has the magnitude of the weight: scale it before squaring.
    products = adjoint(images)
    magnitude = _or_one(_magnitude(products[..., :1, :]))[..., 0]
    left, norm = _unit(images[..., 0, :])
    right, product_norm = _unit(products[..., 0, :] / magnitude)
    sigma = product_norm / _or_one(norm) * magnitude
    right = torch.where(product_norm > 0, right, vectors[..., 0, :])
    return sigma[..., 0], left, right, orthonormalise(products, fallback=vectors)


@torch.no_grad()
@without_autocast()
def power_step(weights: Sequence[Tensor], vectors: Sequence[Tensor], n_iterations: int = 1) -> PowerStep:
    """Advance the blocks of all weights by `n_iterations` and return the leading singular triplets.

    Weights of one shape and dtype are iterated in one batch.

    Args:
        weights: L matrices ``W_l``, each of shape (m_l, n_l), of any floating dtype and any strides.
        vectors: L blocks, each of shape (r_l, min(m_l, n_l)) with orthonormal rows, ``r_l <= min(m_l, n_l)``, in
            :func:`compute_dtype` of the weight's dtype, on the weight's device.
        n_iterations: Reads of each weight. With 0 the blocks stay as they are and `sigma` holds the largest Ritz
            values of the present blocks (half a read).

    Returns:
        A :class:`PowerStep`. ``sigma`` is an *estimate from below*; after k steps in all, its relative error is of
        the order ``(sigma_{r+1} / sigma_1)^(4k)`` and the vectors' ``(sigma_{r+1} / sigma_1)^(2k)``.
    """
    by_shape: defaultdict[tuple[torch.Size, torch.Size, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, (weight, block) in enumerate(zip(weights, vectors, strict=True)):
        by_shape[weight.shape, block.shape, block.dtype, weight.device].append(index)
    sigma: list[Tensor] = [torch.empty(0)] * len(weights)
    left, right, blocks = list(sigma), list(sigma), list(sigma)
    for (shape, *_), indices in by_shape.items():
        batch = torch.stack([weights[i].to(vectors[i].dtype) for i in indices])
        wide = shape[0] < shape[1]
        maps = (batch.mT, batch) if not wide else (batch, batch.mT)
        apply, adjoint = (lambda rows, to=to: rows @ to for to in maps)
        result = iterate(apply, adjoint, torch.stack([vectors[i] for i in indices]), n_iterations)
        long_side, short_side = (right, left) if wide else (left, right)
        for position, index in enumerate(indices):
            sigma[index], long_side[index], short_side[index], blocks[index] = (part[position] for part in result)
    dtype = max((s.dtype for s in sigma), key=lambda d: d.itemsize)
    device = sigma[0].device
    return PowerStep(torch.stack([s.to(device, dtype) for s in sigma]), left, right, blocks)


@torch.no_grad()
@without_autocast()
def rank_one_update_(
    grads: Sequence[Tensor], coefficients: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]
) -> None:
    """Add ``c_l u_l v_l^T`` to each gradient in place; for a kernel, (rows, columns, *taps), the sum of two such terms.

    Args:
        grads: L gradients, each of shape (m_l, n_l), of any floating dtype; the sum is formed in fp32 (fp64 for fp64)
            and rounded once.
        coefficients: ``c``, shape (L,); it may lie on another device than the gradients. A zero adds nothing, also
            where the vectors are NaN.
        left: L vectors ``u_l``, each of shape (m_l,).
        right: L vectors ``v_l``, each of shape (n_l,).
    """
    for index, grad in enumerate(grads):
        coefficient = coefficients[index].to(left[index])
        u, v = (vector.view(1 if grad.dim() == 2 else 2, -1) for vector in (left[index], right[index]))
        update = ((u * coefficient).mT @ v).view(grad.shape)
        grad.add_(torch.where(coefficient == 0, torch.zeros_like(update), update))


@torch.inference_mode(False)
@torch.no_grad()
def penalty_slope(code: int, sigma: Tensor, multiplicities: Sequence[int], level: float) -> tuple[Tensor, Tensor]:
    """Return a built-in penalty on the plain product, and its derivative in each spectral norm.

    Autograd differentiates :mod:`lightning_lip.kernels.penalties` in the L logarithms.

    Args:
        code: One of the values of :data:`~lightning_lip.kernels.penalties.PENALTY_CODES`.
        sigma: Spectral norms, shape (L,).
        multiplicities: How often each layer counts, k, length L; S = sum k log sigma.
        level: M, or the knee: :func:`~lightning_lip.kernels.penalties.level_of`.

    Returns:
        The penalty, shape (), and its slopes, shape (L,), in the dtype of `sigma`. A layer that is exactly zero has no
        slope; slopes that are not finite count as zero.
    """
    penalty = built_in(list(PENALTY_CODES)[code], level)
    uses = [layer for layer, count in enumerate(multiplicities) for _ in range(int(count))]
    log_sigma = sigma.log()
    with torch.enable_grad():
        log_sigma.requires_grad_()
        once = len(uses) == len(sigma)
        repeated = log_sigma if once else log_sigma[torch.tensor(uses, device=sigma.device)]
        value = penalty(repeated, repeated.sum())
    slope = torch.autograd.grad(value, log_sigma)[0] / sigma
    return value.detach(), torch.where(slope.isfinite() & (sigma > 0), slope, torch.zeros_like(slope))


class ReferenceIteration:
    """The iteration of L weights by the functions of this file, with the blocks kept from step to step.

    Args:
        weights: L matrices, each of shape (m_l, n_l), on any device, or kernels of convolutions; only their number
            matters.
        vectors: Starting blocks, each of shape (r_l, min(m_l, n_l)), in :func:`compute_dtype` of their weights; of a
            kernel, its starting state.
        symbols: What each kernel is iterated as, None for a matrix; None where all are matrices.
    """

    def __init__(
        self, weights: Sequence[Tensor], vectors: Sequence[Tensor], symbols: Sequence[Symbol | None] | None = None
    ) -> None:
        self.vectors = list(vectors)
        self._symbols = list(symbols or [None] * len(weights))
        self._scales: list[Tensor | None] = [None] * len(weights)
        self._last: PowerStep | None = None
        self.coefficients: Tensor | None = None

    def power_step(
        self, weights: Sequence[Tensor], n_iterations: int, scales: Sequence[Tensor | None] | None = None
    ) -> PowerStep:
        """Advance the blocks; see :func:`power_step` and :func:`~lightning_lip.kernels.symbol.symbol_step`.

        Args:
            weights: The L weights.
            n_iterations: Reads of each weight.
            scales: For each kernel s, shape (rows of all groups,), by which its rows are multiplied, or None.
        """
        self._scales = list(scales or self._scales)
        matrices = [i for i, symbol in enumerate(self._symbols) if symbol is None]
        found: list[tuple[Tensor, Tensor, Tensor, Tensor] | None] = [None] * len(weights)
        if matrices:
            step = power_step([weights[i] for i in matrices], [self.vectors[i] for i in matrices], n_iterations)
            for place, index in enumerate(matrices):
                found[index] = tuple(part[place] for part in step)  # type: ignore[assignment]
        for index, symbol in enumerate(self._symbols):
            if symbol is not None:
                found[index] = symbol_step(
                    self._scaled(weights[index], index), self.vectors[index], *symbol, n_iterations
                )
        sigmas, left, right, vectors = (list(part) for part in zip(*(f for f in found if f is not None), strict=True))
        dtype = max((s.dtype for s in sigmas), key=lambda d: d.itemsize)
        sigma = torch.stack([s.to(sigmas[0].device, dtype) for s in sigmas])
        self._last = PowerStep(sigma, left, right, vectors)
        self.vectors = vectors
        return self._last

    def _scaled(self, weight: Tensor, index: int) -> Tensor:
        """Return a kernel with its rows scaled."""
        scale = self._scales[index]
        if scale is None:
            return weight
        kernel = weight.to(self.vectors[index].dtype)
        return kernel * scale.to(kernel).view(-1, *[1] * (kernel.dim() - 1))

    def rank_one_update_(self, grads: Sequence[Tensor | None], coefficients: Tensor) -> None:
        """Add ``c_l u_l v_l^T`` of the last step to each gradient; see :func:`rank_one_update_`.

        The gradient is that of the weight: u is multiplied by the scale of the rows, if there is one.

        Raises:
            RuntimeError: If no step was taken yet.
        """
        if self._last is None:
            raise RuntimeError("There are no singular vectors yet: take a power_step first.")
        for index, grad in enumerate(grads):
            if grad is not None:
                left, right, scale = self._last.left[index], self._last.right[index], self._scales[index]
                if scale is not None:
                    left = (left.view(2, -1) * scale.to(left)).flatten()
                rank_one_update_([grad], coefficients[index : index + 1], [left], [right])

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
        """Advance, and add the gradient of ``scale * penalty``; see :func:`penalty_slope`.

        Afterwards `coefficients`, shape (L,), holds ``c_l = scale d penalty / d sigma_l``, zero where that is not
        finite: the gradient in the scales is the caller's.

        Returns:
            ``scale * penalty``, shape ().
        """
        sigma = self.power_step(weights, n_iterations, scales).sigma
        exact = sigma if sigma.device.type == "mps" else sigma.double()
        value, slope = penalty_slope(code, exact, multiplicities, level)
        coefficients = (slope * scale).to(sigma.dtype)
        self.coefficients = torch.where(coefficients.isfinite(), coefficients, torch.zeros_like(coefficients))
        self.rank_one_update_(grads, self.coefficients)
        return (value * scale).to(sigma.dtype)
