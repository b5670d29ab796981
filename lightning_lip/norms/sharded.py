"""The block iteration on sharded weights (DTensors of FSDP2, tensor parallelism), with one all_reduce for all layers.

It differs from :mod:`lightning_lip.kernels.reference` in where things live. Let ``A`` (q, p) be the weight, or its
transpose, whose rows are dealt out to ranks, and ``V`` (r, p) a block of vectors, the same on every rank:

1. Each rank forms its columns of the images, ``T = V A^T``, shape (r, q / ranks).
2. ``Z = T A`` and ``G = T T^T`` are sums over ranks. Those of all layers stand in one flat tensor: one all_reduce.
3. The eigenvectors of ``G`` rotate ``T`` and ``Z``, which commutes with the sum; sigma, u and v follow as in the
   reference. ``u`` stays dealt out as the rows of ``A`` are, so the rank-one update needs no communication.

So the block lives on the side that is not sharded, whichever is shorter. Where both sides are (FSDP2 with row-wise
tensor parallelism), ``T`` must be summed over the second mesh dimension first: another all_reduce. Sums over ranks are
formed in fp64, whose range holds the squares of fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from lightning_lip.kernels.reference import PowerStep, ReferenceIteration, orthonormalise, ritz_rotation
from lightning_lip.kernels.tensors import is_sharded, without_autocast
from lightning_lip.operators.base import iterates_on_codomain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor, Placement


MAX_STACKED = 2**16
"""Elements of a weight up to which those of one shape are iterated as one stack: that copies them, but calls less."""


class _Layout(NamedTuple):
    """How a rank's part of a weight lies in ``A``.

    Attributes:
        transposed: Whether ``A`` is the weight's transpose.
        groups: The groups over which ``Z`` and ``G`` are summed, one for each mesh dimension that shards.
        column_groups: The groups over which ``T`` is summed before; empty unless both sides are sharded.
        columns: The columns of ``A`` that this rank holds.
        counts: Whether this rank contributes to ``G``: of those with the same rows, one does.
        placements: The weight's, which its gradient must have too.
    """

    transposed: bool
    groups: tuple[ProcessGroup, ...]
    column_groups: tuple[ProcessGroup, ...]
    columns: slice
    counts: bool
    placements: tuple[Placement, ...]


def groups_of(weight: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the groups over which sums of a weight's shards are formed, one for each mesh dimension that shards."""
    if not is_sharded(weight):
        return ()
    sharded = cast("DTensor", weight)
    mesh, placements = sharded.device_mesh, enumerate(sharded.placements)
    return tuple(mesh.get_group(i) for i, p in placements if not p.is_replicate() and mesh.size(i) > 1)


def _layout(weight: DTensor) -> _Layout:
    transposed = iterates_on_codomain(weight)
    side = 0 if transposed else 1
    mesh = weight.device_mesh
    sharding = [i for i, p in enumerate(weight.placements) if not p.is_replicate() and mesh.size(i) > 1]
    of_columns = [i for i in sharding if weight.placements[i].dim == side]  # type: ignore[attr-defined]
    columns, counts = slice(0, weight.shape[side]), True
    for i in of_columns:  # at most one: others were refused
        rank, width = mesh.get_local_rank(i), -(-weight.shape[side] // mesh.size(i))
        columns, counts = slice(rank * width, (rank + 1) * width), rank == 0
    column_groups = tuple(mesh.get_group(i) for i in of_columns)
    return _Layout(transposed, groups_of(weight), column_groups, columns, counts, weight.placements)


class ShardedIteration(ReferenceIteration):
    """The iteration of L sharded matrices; every rank must take part in each call.

    The side of a step's singular vectors that is sharded holds this rank's part only; sigma, the other side and the
    blocks are the same on every rank, bit for bit.

    Args:
        weights: L DTensors, each of shape (m_l, n_l); replicated ones need no communication.
        vectors: Starting blocks, the same on every rank, each of shape (r_l, p_l) with orthonormal rows, p_l being the
            side of :func:`~lightning_lip.operators.base.iterates_on_codomain`, in fp32 (fp64 for fp64 weights).
    """

    def __init__(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        super().__init__(weights, vectors)
        self._layouts = [_layout(cast("DTensor", weight)) for weight in weights]
        batches = defaultdict(list)
        for index, (weight, block) in enumerate(zip(cast("Sequence[DTensor]", weights), vectors, strict=True)):
            # Of the global shape, on which all ranks agree, whose flat tensors must be alike.
            alike = weight.shape, weight.dtype, weight.placements, weight.device_mesh, block.shape
            batches[alike, index if weight.numel() > MAX_STACKED else None].append(index)
        self._batches = list(batches.values())

    @torch.no_grad()
    @without_autocast()
    def power_step(
        self, weights: Sequence[Tensor], n_iterations: int, scales: Sequence[Tensor | None] | None = None
    ) -> PowerStep:
        """Advance the blocks as the reference does, with one all_reduce an iteration for each sharding mesh dimension.

        Where both sides are sharded there is one more. With ``n_iterations=0`` the blocks stay as they are, and the
        r x r Gram matrices alone are summed. All are matrices: no rows are scaled.
        """
        batches = self._gather(weights)
        for _ in range(max(n_iterations, 1)):
            self._last = step = self._iterate(batches, advance=n_iterations > 0)
            self.vectors = step.vectors
        return step

    def _gather(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's parts of ``A``, in the blocks' dtype: a tensor (K, rows here, columns here) a batch."""
        gathered = []
        for indices in self._batches:
            parts = [cast("DTensor", weights[i]).to_local() for i in indices]
            parts = [part.mT for part in parts] if self._layouts[indices[0]].transposed else parts
            matrices = torch.stack(parts) if len(parts) > 1 else parts[0][None]
            gathered.append(matrices.to(self.vectors[indices[0]].dtype))
        return gathered

    def _blocks(self) -> list[Tensor]:
        """Return the blocks, shape (K, r, p) a batch."""
        return [torch.stack([self.vectors[i] for i in indices]) for indices in self._batches]

    def _images(self, matrices: Sequence[Tensor], blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's columns of ``T``, shape (K, r, rows of A here) a batch."""
        layouts = [self._layouts[indices[0]] for indices in self._batches]
        images = [b[..., layout.columns] @ a.mT for b, layout, a in zip(blocks, layouts, matrices, strict=True)]
        return summed(images, [layout.column_groups for layout in layouts])

    def _iterate(self, matrices: Sequence[Tensor], advance: bool) -> PowerStep:
        blocks = self._blocks()
        images = self._images(matrices, blocks)
        layouts = [self._layouts[indices[0]] for indices in self._batches]
        parts = []
        for t, matrix, layout, old in zip(images, matrices, layouts, blocks, strict=True):
            scaled, scale = _scaled(t)
            part = _gram(scaled, scale, layout)
            if advance:
                rows = torch.zeros(old.shape, dtype=torch.float64, device=old.device)
                rows[..., layout.columns] = (scaled @ matrix).double() * scale
                part = torch.cat([part, rows], dim=-1)
            parts.append(part)
        sums = summed(parts, [layout.groups for layout in layouts])

        sigma, left, right, vectors = ([torch.empty(0)] * len(self.vectors) for _ in range(4))
        for indices, layout, t, old, total in zip(self._batches, layouts, images, blocks, sums, strict=True):
            r = old.shape[1]
            gram = total[..., :r]
            rotation = ritz_rotation(gram)
            first = rotation[:, :1]
            length = (first @ gram @ first.mT).clamp(min=0.0).sqrt()  # of the first rotated image
            length_or_one = torch.where(length > 0, length, torch.ones_like(length))
            u = (first.to(old.dtype) @ t) / length_or_one.to(old.dtype)
            if advance:
                # Divided before squares are taken and before the dtype is that of the blocks.
                rows, scale = _scaled(rotation @ total[..., r:])
                norm = torch.linalg.vector_norm(rows[:, :1], dim=-1, keepdim=True)
                v = torch.where(norm > 0, (rows[:, :1] / norm).to(old.dtype), old[:, :1])
                value = norm * scale / length_or_one
                new = orthonormalise(rows.to(old.dtype), fallback=old)
            else:
                v, value, new = first.to(old.dtype) @ old, length, old
            pair = (v, u) if layout.transposed else (u, v)
            for to, of_batch in zip(
                (sigma, left, right, vectors),
                (value.to(old.dtype)[:, 0, 0], pair[0][:, 0], pair[1][:, 0], new),
                strict=True,
            ):
                for index, of_layer in zip(indices, of_batch.unbind(), strict=True):
                    to[index] = of_layer
        widest = max((s.dtype for s in sigma), key=lambda d: d.itemsize)
        return PowerStep(torch.stack([s.to(widest) for s in sigma]), left, right, vectors)

    @torch.no_grad()
    @without_autocast()
    def upper(self, weights: Sequence[Tensor]) -> Tensor:
        """Return upper bounds of the spectral norms.

        See :meth:`lightning_lip.norms.spectral_norms.SpectralNorms.upper`.

        Returns:
            Shape (L,), fp64.
        """
        grams = self._grams(weights)
        uppers = torch.empty(len(weights), dtype=torch.float64, device=grams[0][0].device)
        for indices, (gram, squares) in zip(self._batches, grams, strict=True):
            first = ritz_rotation(gram)[:, :1]
            rest = squares - gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            uppers[indices] = ((first @ gram @ first.mT)[:, 0, 0] + rest.clamp(min=0.0)).sqrt()
        return uppers

    @torch.no_grad()
    @without_autocast()
    def ritz_values(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the Ritz values, L tensors of shape (r_l,), fp64, descending; NaN where a weight is not finite.

        See :meth:`lightning_lip.norms.spectral_norms.SpectralNorms.ritz_values`.
        """
        values = [torch.empty(0)] * len(weights)
        for indices, (gram, _) in zip(self._batches, self._grams(weights), strict=True):
            rotation = ritz_rotation(gram)  # NaN stays NaN in what it rotates
            of_batch = (rotation @ gram @ rotation.mT).diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
            for index, of_layer in zip(indices, of_batch, strict=True):
                values[index] = of_layer
        return values

    def _grams(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return ``G``, shape (K, r, r), and the squared Frobenius norms, shape (K,), of each batch, fp64."""
        matrices = self._gather(weights)
        layouts = [self._layouts[indices[0]] for indices in self._batches]
        parts = []
        for t, matrix, layout in zip(self._images(matrices, self._blocks()), matrices, layouts, strict=True):
            squares = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square()
            parts.append(torch.cat([_gram(*_scaled(t), layout).flatten(1), squares[:, None]], dim=1))
        sums = summed(parts, [layout.groups for layout in layouts])
        sizes = [len(self.vectors[indices[0]]) for indices in self._batches]
        return [(total[:, :-1].reshape(-1, r, r), total[:, -1]) for total, r in zip(sums, sizes, strict=True)]

    @torch.no_grad()
    def rank_one_update_(self, grads: Sequence[Tensor | None], coefficients: Tensor) -> None:
        """Add this rank's part of ``c_l u_l v_l^T`` of the last step to its part of each gradient; None skips one.

        Raises:
            RuntimeError: If no step was taken yet, or a gradient is not sharded as its weight is.
        """
        if self._last is None:
            raise RuntimeError("There are no singular vectors yet: take a power_step first.")
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            layout, placements = self._layouts[index], cast("DTensor", grad).placements
            if placements != layout.placements:
                raise RuntimeError(
                    f"Expected the gradient of a weight of shape {tuple(grad.shape)} to be placed as the weight is, "
                    f"{layout.placements}, got {placements}: redistribute it before the penalty is added."
                )
            local = cast("DTensor", grad).to_local()
            left, right = self._last.left[index], self._last.right[index]
            if layout.transposed:
                left = left[layout.columns]
            else:
                right = right[layout.columns]
            coefficient = coefficients[index].to(left)
            # Not 0 * NaN where the weight has become NaN.
            dead = coefficient == 0
            left, right = (torch.where(dead, torch.zeros_like(x), x) for x in (left * coefficient, right))
            if local.dtype == left.dtype:
                local.addr_(left, right)
            else:
                local.add_(torch.outer(left, right))


def _scaled(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices (K, r, q) divided by their largest magnitudes, and those, shape (K, 1, 1), fp64.

    A magnitude is one where a matrix is empty or zero.
    """
    if images.numel() == 0:
        return images, torch.ones(len(images), 1, 1, dtype=torch.float64, device=images.device)
    scale = images.abs().amax(dim=(-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return images / scale, scale.double()


def _gram(scaled: Tensor, scale: Tensor, layout: _Layout) -> Tensor:
    """Return this rank's part of ``G``, shape (K, r, r), fp64, from its images divided by `scale`."""
    return (scaled @ scaled.mT).double() * (scale.square() * layout.counts)


def summed(parts: Sequence[Tensor], groups: Sequence[tuple[ProcessGroup, ...]]) -> list[Tensor]:
    """Return the parts summed over the ranks of their groups, those with the same groups in one flat tensor."""
    by_groups = defaultdict(list)
    for index, of_part in enumerate(groups):
        if of_part:
            by_groups[of_part].append(index)
    summed = list(parts)
    for over, indices in by_groups.items():
        flat = torch.cat([parts[i].flatten() for i in indices])
        for group in over:
            torch.distributed.all_reduce(flat, group=group)
        for i, part in zip(indices, torch.split(flat, [parts[i].numel() for i in indices]), strict=True):
            summed[i] = part.view(parts[i].shape)
    return summed
