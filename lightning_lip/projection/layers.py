"""The weights that a projection changes: matrices whose singular values are clipped, or weights that are scaled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import Bound
from lightning_lip.kernels.tensors import compute_dtype
from lightning_lip.norms.blocks import is_block
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.composed import ComputedMatrixOperator, DiagonalOperator, ScaledOperator

N_START_ITERATIONS = 15
"""Iterations of a block that starts from random vectors."""

N_MARGIN_VECTORS = 2
"""A block holds at least so many vectors more than singular values are clipped."""

N_GROWTH_ITERATIONS = 4
"""Iterations after random vectors were added to a block."""

REACH = 0.8
"""A block must hold singular values down to this share of the cap. Clipping lowers the leading ones to the cap, so that
the largest value beyond the block is found at a rate of ``(sigma_{r+1} / cap)^2``: it must lie well below the cap."""

MAX_ITERATIONS = 30
"""Iterations a step at most."""

RISE = 5e-6
"""A block is iterated on while its leading Ritz value rises by more than this (relative) in half an iteration."""


LinAlgError: type[RuntimeError] = vars(torch.linalg)["LinAlgError"]
"""What decompositions of torch raise; its type stubs do not have the name."""


class Triplets(NamedTuple):
    """k singular triplets of a matrix A (m, n), m >= n: the weight, or its transpose if that is the longer.

    Attributes:
        left: Shape (m, k), orthonormal columns.
        sigma: Shape (k,), descending.
        right: Shape (n, k), orthonormal columns; ``left^T A = diag(sigma) right^T``.
        matrix: A, to be corrected.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor
    matrix: Tensor


class ProjectedLayer:
    """One parameter that a projection may write.

    Attributes:
        name: The layer's name in the model.
        parameter: What is written; a projection leaves it alone while it requires no gradient.
        operators: The positions of the operators that are homogeneous in it, among all of the network's.
    """

    def __init__(self, name: str, parameter: nn.Parameter, operators: Sequence[int]) -> None:
        self.name = name
        self.parameter = parameter
        self.operators = list(operators)

    def original(self) -> Tensor:
        """Return a copy of the parameter in fp64, to scale it from."""
        return _double(self.parameter.detach()).clone()

    def scale_(self, original: Tensor, factor: float) -> None:
        """Write ``factor * original``, rounded to the parameter's dtype."""
        self.parameter.detach().copy_(original * factor)


class ClippedLayer(ProjectedLayer):
    """A weight that is the operator's matrix, with a persistent block of its leading singular vectors.

    Args:
        name: The layer's name in the model.
        parameter: The weight, shape (m, n).
        operator: The operator's position.
        block_size: Vectors to start with, r, clamped to min(m, n).
        seed: Of the private generator that random vectors are drawn from.
    """

    def __init__(self, name: str, parameter: nn.Parameter, operator: int, block_size: int, seed: int) -> None:
        super().__init__(name, parameter, [operator])
        self._seed = seed + 1_000_003 * operator
        self.block_size = min(block_size, min(parameter.shape))
        self.block: Tensor | None = None
        """V, shape (min(m, n), r), orthonormal columns; None before the first use."""

    def _matrix(self) -> Tensor:
        weight = self.parameter.detach()
        return weight if weight.shape[0] >= weight.shape[1] else weight.mT

    def _converted(self) -> Tensor:
        return self._matrix().to(compute_dtype(self.parameter.dtype))

    def ritz(self, n_iterations: int) -> Triplets:
        """Advance the block and return its Ritz triplets, *estimates (from below)*; exact where it is the whole space.

        Raises:
            ValueError: If the weight is not finite.
        """
        converted = self._converted()
        if self.block is None:
            return self._iterate(converted, self._random(self.block_size, converted), N_START_ITERATIONS)
        return self._iterate(converted, self.block.to(converted), n_iterations)

    def needs_more(self, triplets: Triplets, cap: float) -> bool:
        """Whether the block does not reach far enough below the cap, or lacks values that exceed it."""
        whole = triplets.sigma.numel() == min(self.parameter.shape)
        return not whole and bool(triplets.sigma[-N_MARGIN_VECTORS] > REACH * cap)

    def grown(self) -> Triplets:
        """Add random vectors to the block, half as many as it holds, iterate, and return its Ritz triplets."""
        converted = self._converted()
        assert self.block is not None
        self.block_size = min(self.block_size + max(4, self.block_size // 2), converted.shape[1])
        fresh = self._random(self.block_size - self.block.shape[1], converted)
        block = torch.linalg.qr(torch.cat([self.block, fresh], 1)).Q
        return self._iterate(converted, block, N_GROWTH_ITERATIONS)

    def _iterate(self, matrix: Tensor, block: Tensor, n_iterations: int) -> Triplets:
        """Iterate at least `n_iterations` times, and on until the leading Ritz value rises by less than a tolerance."""
        for iteration in range(1, MAX_ITERATIONS + 1):
            # Householder QR, not Gram matrices: nothing is squared, so no magnitude overflows.
            basis, triangle = torch.linalg.qr(matrix @ block)
            if not bool(triangle.isfinite().all()):
                raise self._not_finite()
            before = torch.linalg.svdvals(triangle)[0]
            block, sigma, rotation = _svd(matrix.mT @ basis)
            if iteration >= n_iterations and bool(sigma[0] <= before * (1 + RISE)):
                break
        self.block = block
        return Triplets(basis @ rotation.mT, sigma, block, self._matrix())

    def svd(self) -> Triplets:
        """Return all singular triplets in fp64; the block becomes the leading ones at :meth:`keep`.

        Raises:
            ValueError: If the weight is not finite.
        """
        # A copy: the weight is written from it, more than once if need be.
        matrix = _double(self._matrix()).clone()
        if not bool(matrix.isfinite().all()):
            raise self._not_finite()
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return Triplets(left, sigma, right.mT, matrix)

    def keep(self, triplets: Triplets) -> None:
        """Take the leading right singular vectors for the block."""
        self.block = triplets.right[:, : self.block_size].to(
            self.parameter.device, compute_dtype(self.parameter.dtype), copy=True
        )

    def load(self, block: Tensor | None) -> None:
        """Take a saved block; without one, or with one of another matrix, the iteration starts afresh."""
        side = min(self.parameter.shape)
        if block is not None and (block.dim() != 2 or block.shape[0] != side or not is_block(block.mT)):
            warnings.warn(
                f"The saved singular vectors of layer {self.name!r} have shape {tuple(block.shape)}, its weight asks "
                f"for ({side}, r) and finite values, not all zero: its iteration starts afresh.",
                stacklevel=2,
            )
            block = None
        self.block = block
        if block is not None:
            self.block_size = block.shape[1]

    def clip_(self, triplets: Triplets, cap: float) -> None:
        """Write the weight with the given singular values clipped at `cap`: ``A - U (Sigma - cap)_+ V^T``."""
        if cap < triplets.sigma[0] / 2:
            # The subtraction below would cancel: its rounding errors have the size of the norm, not of the cap.
            if triplets.sigma.dtype != torch.float64 or triplets.sigma.numel() < min(self.parameter.shape):
                triplets = self.svd()
            clipped = (triplets.left * triplets.sigma.clamp(max=cap)) @ triplets.right.mT
            self._matrix().copy_(clipped)
            return
        n_over = int((triplets.sigma > cap).sum())
        left = triplets.left[:, :n_over] * (triplets.sigma[:n_over] - cap)
        correction = left @ triplets.right[:, :n_over].mT
        self._matrix().copy_(triplets.matrix.to(correction.dtype) - correction)

    def _random(self, n_vectors: int, like: Tensor) -> Tensor:
        # Seeded by what has been drawn so far, so that a resumed run draws the same.
        drawn = 0 if self.block is None else self.block.shape[1]
        generator = torch.Generator("cpu").manual_seed(self._seed + drawn)
        rows = torch.randn(n_vectors, like.shape[1], generator=generator, device="cpu", dtype=torch.float32)
        basis: Tensor = torch.linalg.qr(rows.mT.to(like)).Q
        return basis

    def _not_finite(self) -> ValueError:
        return ValueError(f"The weight of layer {self.name!r} holds NaN or an infinity: there is nothing to project.")


def projected_layers(
    bound: Bound, *, clip: bool, block_size: int, seed: int
) -> tuple[list[ProjectedLayer], dict[int, str]]:
    """Return the weights that a projection can change, and why it cannot change those of the other operators.

    Args:
        bound: The bound of the network's L operators; only layers that it has selected may change.
        clip: Whether matrices are clipped; otherwise they are scaled like all others.
        block_size: Vectors a clipped layer.
        seed: Of the blocks.

    Returns:
        The layers, and a reason by operator's position.

    Raises:
        UnsupportedLayerError: If a weight that could change also acts where it cannot be followed.
    """
    operators = bound.operators
    found: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    for index, op in enumerate(operators):
        parameter = writable(op)
        if isinstance(parameter, str):
            reasons[index] = parameter
        elif any(parameter is selected for selected in bound.selected(op)):
            found.setdefault(id(parameter), []).append(index)
    layers: list[ProjectedLayer] = []
    for key, indices in found.items():
        op = operators[indices[0]]
        others = [o.name for i, o in enumerate(operators) if i not in indices and key in map(id, o.parameters)]
        parameter = writable(op)
        assert isinstance(parameter, nn.Parameter)
        if others:
            raise UnsupportedLayerError(
                f"The projection of layer {op.name!r} would also change {others}, which use the same parameter in "
                f"another way: leave them out with exclude={[op.name, *others]!r}."
            )
        if clip and len(indices) == 1 and op.direct_parameter is not None:
            layers.append(ClippedLayer(op.name, parameter, indices[0], block_size, seed))
        else:
            layers.append(ProjectedLayer(op.name, parameter, indices))
    return layers, reasons


def writable(op: LinearOperator) -> nn.Parameter | str:
    """Return the parameter whose factor is the operator's factor, also in training, or why there is none."""
    if op.direct_parameter is not None:
        return op.direct_parameter
    if isinstance(op, ScaledOperator):
        # Not the layer before the normalisation: in training the batch's own variance undoes any factor of it.
        if len(op.scale_parameters) != 1:
            return "a batch normalisation without gamma undoes what is done to the layer before it: use affine=True"
        return op.scale_parameters[0]
    if parametrize.is_parametrized(op.module, "weight"):
        return "its weight is parametrised, computed from other parameters: remove the parametrization"
    if len(op.parameters) != 1:
        n = len(op.parameters)
        return f"its weight is computed from {n} parameters, so that none can be scaled alone" if n else "no parameter"
    parameter = op.parameters[0]
    if isinstance(op, (ComputedMatrixOperator, DiagonalOperator)) and not is_homogeneous(op, parameter):
        return "what it computes from its parameter does not scale with it"
    return parameter


@torch.inference_mode(False)
@torch.no_grad()
def is_homogeneous(op: LinearOperator, parameter: nn.Parameter) -> bool:
    """Whether half the parameter gives half the weight, which is exact in floating point."""
    before, kept = op.weight().clone(), parameter.detach().clone()
    try:
        parameter.mul_(0.5)
        return torch.equal(op.weight() * 2, before)
    finally:
        parameter.copy_(kept)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, sigma and V^T in the dtype of the matrix.

    LAPACK's divide and conquer can fail in fp32 where many singular values are equal, as clipping makes them.
    """
    try:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    except LinAlgError:
        left, sigma, right = torch.linalg.svd(_double(matrix), full_matrices=False)
    return left.to(matrix), sigma.to(matrix), right.to(matrix)


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
