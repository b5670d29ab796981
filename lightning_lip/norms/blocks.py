"""Blocks of vectors: how they start, what they are saved as, and what they say of the present weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lip.kernels.frequencies import rows_of
from lightning_lip.kernels.scalars import is_scalar, scalar_step
from lightning_lip.kernels.symbol import random_state, unpacked
from lightning_lip.operators.base import LinearOperator, iterates_on_codomain


def random_block(op: LinearOperator, generator: torch.Generator, block_size: int) -> Tensor:
    """Return a random block of an operator, (r, side), not orthonormal, or the state that a symbol starts from."""
    if op.symbol_geometry is not None:
        return random_state(op.symbol_geometry, generator)
    side, most = op.block_shape
    return torch.randn(min(block_size, most), side, generator=generator, device="cpu", dtype=torch.float32)


def fits(op: LinearOperator, loaded: Tensor, random: Tensor) -> bool:
    """Whether a loaded block, or state of a symbol, can go on in place of a random one."""
    if loaded.shape != random.shape:
        return False
    if op.symbol_geometry is None:
        return is_block(loaded)
    # Depthwise convolutions keep nothing.
    vectors = None if is_scalar(op.symbol_geometry) else unpacked(loaded, op.symbol_geometry).v.flatten(1)
    return bool(loaded.isfinite().all()) and (vectors is None or is_block(vectors))


def is_block(loaded: Tensor) -> bool:
    """Whether the rows of a loaded block are vectors to iterate: finite, and none zero, which would stay so."""
    return bool(loaded.isfinite().all() and loaded.any(dim=1).all())


def norms_in_cells(op: LinearOperator, kernel: Tensor, state: Tensor) -> Tensor:
    """Return ``|P(w) v|`` for the wave of each cell of a symbol, descending; the norms of depthwise channels."""
    geometry, scale = op.symbol_geometry, op.row_scale()
    assert geometry is not None
    matrix = kernel.to(state.dtype).flatten(1)
    if scale is not None:
        matrix = matrix * scale.to(matrix)[:, None]
    if is_scalar(geometry):
        return scalar_step(matrix, geometry)[0].flatten().sort(descending=True)[0]
    wave = unpacked(state, geometry)
    rows = rows_of(wave.w, wave.v, geometry).view(geometry.groups, -1, matrix.shape[1])
    images = rows @ matrix.view(geometry.groups, -1, matrix.shape[1]).mT
    norms: Tensor = torch.linalg.vector_norm(images.view(len(state), -1), dim=1)
    return norms.sort(descending=True)[0]


def tell_unfit(unfit: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    """Warn, once for all, of saved vectors that do not fit: names of layers, saved shapes, and those asked for."""
    name, saved, asked = unfit[0]
    others = [other for other, *_ in unfit[1:]]
    what = f"it and {others}, which do not fit either, start afresh" if others else "its iteration starts afresh"
    warnings.warn(
        f"The saved singular vectors of layer {name!r} have shape {saved}, its weight and `block_size` ask for {asked} "
        f"and finite values, not all zero: {what}.",
        stacklevel=3,
    )


def images_of(matrix: Tensor, block: Tensor) -> Tensor:
    """Return the images of a block's vectors, (r, max(m, n)), which live on the shorter side of a matrix (m, n)."""
    return block @ (matrix if matrix.shape[0] < matrix.shape[1] else matrix.mT)


def key_of(op: LinearOperator, weight: Tensor, other_side: bool = False) -> str:
    """Return the name under which an operator's block is saved. It says on which side the block lives.

    That may be another side for a sharded weight than for a whole one, and the shape of a square weight's block does
    not tell.
    """
    if op.is_matrix and iterates_on_codomain(weight) != (weight.shape[0] < weight.shape[1]):
        other_side = not other_side
    return f"{op.name} (other side)" if other_side else op.name
