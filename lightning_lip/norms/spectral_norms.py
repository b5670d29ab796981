"""SpectralNorms: the persistent blocks of singular vectors, and one step of iteration over all operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lip import kernels
from lightning_lip.checks import check_integers
from lightning_lip.kernels.symbol import Symbol, started
from lightning_lip.kernels.tensors import compute_dtype, is_sharded, without_modes
from lightning_lip.norms.blocks import fits, images_of, key_of, norms_in_cells, random_block, tell_unfit
from lightning_lip.norms.matrix_free import MatrixFreeIteration
from lightning_lip.norms.sharded import ShardedIteration
from lightning_lip.operators.base import LinearOperator
from lightning_lip.operators.convolutions.convolution import KernelOperator

N_START_ITERATIONS = 15
"""Iterations of a block that starts from random vectors."""


class SpectralNorms:
    """Estimates (from below) of the operators' spectral norms, by block iteration that goes on from step to step.

    Of a :class:`~lightning_lip.operators.convolutions.symbol.SymbolOperator` they are estimates from below of its
    symbol's norm, whose waves stand for a block: see :mod:`lightning_lip.kernels.symbol`.

    The blocks start from a private generator, seeded alike on every rank, with 15 iterations at first use. They are
    plain tensors: nothing is registered in the model. Matrices and symbols go through the kernels, all of one device
    and dtype in one call, and sharded ones through :class:`~lightning_lip.norms.sharded.ShardedIteration`, for which
    every rank must make each call; other operators through their own ``apply`` and ``adjoint``.

    Args:
        operators: The L operators.
        block_size: Vectors a layer, r, clamped to min(m, n); 1 is the classical power iteration. Of a symbol, cells a
            step, at least 2.
        n_iterations: Iterations a step, each of which reads the weights once.
        seed: Seed of the private generator.
        backend: ``"reference"``, ``"cpu"`` or ``"gpu"`` to force a kernel; None chooses by device.

    Raises:
        ValueError: If `block_size`, `n_iterations` or `seed` is out of range, or the backend is unknown.
    """

    def __init__(
        self,
        operators: Sequence[LinearOperator],
        block_size: int = 8,
        n_iterations: int = 1,
        seed: int = 0,
        backend: kernels.Backend | None = None,
    ) -> None:
        check_integers(1, block_size=block_size, n_iterations=n_iterations)
        check_integers(0, seed=seed)
        if backend is not None:
            kernels.check_backend(backend)
        self.operators = list(operators)
        self.block_size = block_size
        self.n_iterations = n_iterations
        self.seed = seed
        self.backend = backend
        self._groups: list[tuple[list[int], kernels.Iteration]] = []
        self._others: list[tuple[int, MatrixFreeIteration]] = []
        self._served: list[tuple[torch.device, torch.dtype, torch.Size, Any]] = []
        self._loaded: dict[str, Tensor] = {}
        self._keys: list[str] = []
        # For `penalise_`: where the weights are kept, if they are parameters that kernels may write gradients of.
        slots = [op.slot for op in self.operators if op.slot is not None and op.written_parameter is not None]
        self._slots = slots if len(slots) == len(self.operators) else None
        self._is_served = [op.is_matrix or op.symbol_geometry is not None for op in self.operators]
        self._have_scales = any(op.row_scale() is not None for op in self.operators)
        # Matrices that are views of their parameters.
        self._viewed = [i for i, op in enumerate(self.operators) if op.is_matrix and isinstance(op, KernelOperator)]
        self._multiplicities = [op.multiplicity for op in self.operators]
        self._addresses: list[int] = []

    def step(self) -> kernels.PowerStep:
        """Advance the blocks by `n_iterations` and return the leading singular triplets of the present weights.

        The next call may overwrite the vectors. Of a vector along a sharded side, a rank gets its part only.
        """
        return self._evaluate(self.n_iterations)

    def current(self) -> kernels.PowerStep:
        """Return the Ritz values and vectors of the present weights; the blocks stay as they are."""
        return self._evaluate(0)

    def rank_one_update_(self, grads: Sequence[Tensor | None], coefficients: Tensor) -> None:
        """Add ``c_l u_l v_l^T`` of the last step to each gradient, in place.

        Args:
            grads: The gradients of what is iterated of the L operators, a matrix (m_l, n_l) or a kernel; None skips
                one.
            coefficients: ``c``, shape (L,).
        """
        for indices, iteration in self._groups:
            given = [grads[i] for i in indices]
            device = next((grad.device for grad in given if grad is not None), None)
            if device is not None:
                iteration.rank_one_update_(given, coefficients[indices].to(device))

    def penalise_(
        self, code: int, level: float, factor: float, advance: bool, allowed: Collection[int] | None
    ) -> Tensor | None:
        """Iterate, and add the gradient of ``factor * penalty`` to the weights' ``.grad``, in one call of a kernel.

        This is the hot path: at four small layers every microsecond of Python shows.

        Args:
            code: A built-in penalty of the product: a value of :data:`lightning_lip.kernels.PENALTY_CODES`.
            level: M, or the knee: :func:`lightning_lip.kernels.penalties.level_of`.
            factor: The factor of the penalty.
            advance: Whether to iterate; with False the present vectors serve.
            allowed: The ids of the weights that may get a gradient; None for all. Frozen weights get none.

        Returns:
            ``factor * penalty``, shape (), which the next call may overwrite; None, and nothing done, where no kernel
            serves all operators at once.
        """
        if self._slots is None:
            return None
        weights: list[nn.Parameter] = []
        addresses: list[int] = []
        grads: list[Tensor | None] = []
        all_there = allowed is None
        for parameters, key in self._slots:
            weight = parameters.get(key)
            if weight is None:
                return None
            weights.append(weight)
            addresses.append(weight.data_ptr())
            grad = weight.grad if weight.requires_grad else None
            all_there = all_there and grad is not None
            grads.append(grad)
        if addresses != self._addresses or 0 in addresses:  # a sharded weight has no address of its own
            self.prepare()
            self._addresses = addresses
        iteration = self._whole()
        if iteration is None:
            return None
        if not all_there:
            for index, own in enumerate(weights):
                if not own.requires_grad or (allowed is not None and id(own) not in allowed):
                    grads[index] = None
                elif grads[index] is None:
                    grads[index] = own.grad = torch.zeros_like(own)
        matrices: list[Tensor] = list(weights)
        for index in self._viewed:
            grad = grads[index]
            view = None if grad is None else self.operators[index].gradient_view(grad)
            if grad is not None and view is None:
                return None
            matrices[index], grads[index] = weights[index].detach().flatten(1), view
        scales = self._scales(range(len(weights)))
        n_iterations = self.n_iterations if advance else 0
        return iteration.penalise_(matrices, grads, n_iterations, code, level, factor, self._multiplicities, **scales)

    def _whole(self) -> kernels.Iteration | None:
        """Return the iteration that serves all operators, in their order, if there is one such."""
        return self._groups[0][1] if len(self._groups) == 1 and not self._others else None

    @without_modes()
    def prepare(self) -> list[Tensor]:
        """Start the blocks, or move them to where the weights are now, if need be; return the present weights."""
        return self._prepare()

    def _prepare(self) -> list[Tensor]:
        weights = self._weights()
        # A tensor without an attribute takes a microsecond to say so.
        served = [
            (w.device, w.dtype, w.shape, getattr(w, "placements", None) if is_sharded(w) else None) for w in weights
        ]
        if served != self._served:
            if self._served:  # the model was moved, cast or sharded
                self._loaded = self.state_dict()
            self._keys = [key_of(op, weight) for op, weight in zip(self.operators, weights, strict=True)]
            self._start(weights)
            self._served, self._addresses = served, []
        return weights

    @without_modes()
    def _evaluate(self, n_iterations: int) -> kernels.PowerStep:
        weights = self._prepare()
        whole = self._whole()
        if whole is not None:
            return whole.power_step(weights, n_iterations, **self._scales(range(len(weights))))
        nothing = torch.empty(0)
        sigma, left, right, vectors = ([nothing] * len(weights) for _ in range(4))
        steps = [
            (indices, it.power_step([weights[i] for i in indices], n_iterations, **self._scales(indices)))
            for indices, it in self._groups
        ]
        steps += [([index], it.power_step(n_iterations)) for index, it in self._others]
        for indices, step in steps:
            for position, index in enumerate(indices):
                sigma[index], left[index] = step.sigma[position], step.left[position]
                right[index], vectors[index] = step.right[position], step.vectors[position]
        dtype = max((s.dtype for s in sigma), key=lambda d: d.itemsize)
        return kernels.PowerStep(torch.stack([s.to(sigma[0].device, dtype) for s in sigma]), left, right, vectors)

    def _weights(self) -> list[Tensor]:
        # No `detach` of a DTensor, which costs more than the rest: nothing here records gradients.
        pairs = zip(self.operators, self._is_served, strict=True)
        weights = (op.iterated() if served else op.representative() for op, served in pairs)
        return [w if is_sharded(w) else w.detach() for w in weights]

    def _scales(self, indices: Sequence[int]) -> dict[str, list[Tensor | None]]:
        """Return the scales of the rows of some operators, as an argument; none where there are none."""
        scales = [self.operators[i].row_scale() for i in indices] if self._have_scales else []
        return {"scales": scales} if any(scale is not None for scale in scales) else {}

    def _start(self, weights: Sequence[Tensor]) -> None:
        """Draw random blocks, or take the loaded ones, and iterate the random ones 15 times."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        blocks: list[Tensor] = []
        fresh, unfit = [], []
        for index, (op, weight) in enumerate(zip(self.operators, weights, strict=True)):
            # Drawn in fp32 on the CPU whatever comes after: the same vectors on every device and every rank, also where
            # a default device or dtype is set.
            own = torch.Generator("cpu").manual_seed(self.seed + 1_000_003 * (index + 1))
            random = random_block(op, generator if op.symbol_geometry is None else own, self.block_size)
            random = random.to(weight.device, compute_dtype(weight.dtype))
            loaded = self._loaded.pop(self._keys[index], None)
            if loaded is not None and fits(op, loaded, random):
                blocks.append(loaded.to(random))
                continue
            if loaded is None and op.is_matrix:
                if self._loaded.pop(key_of(op, weight, other_side=True), None) is not None:
                    warnings.warn(
                        f"The saved singular vectors of layer {op.name!r} are of its other side, which its weight's "
                        "sharding asked for then and does not now: its iteration starts afresh.",
                        stacklevel=2,
                    )
            elif loaded is not None:
                unfit.append((op.name, tuple(loaded.shape), tuple(random.shape)))
            if op.symbol_geometry is not None:
                scale = op.row_scale()
                scaled = weight if scale is None else weight * scale.to(weight).view(-1, *[1] * (weight.dim() - 1))
                own.manual_seed(own.initial_seed())
                blocks.append(started(scaled, op.symbol_geometry, own))
                continue
            blocks.append(torch.linalg.qr(random.mT).Q.mT)
            fresh.append(index)
        if unfit:
            tell_unfit(unfit)
        groups, others = self._iterations(weights, blocks, fresh)
        for indices, iteration in groups:
            iteration.power_step([weights[i] for i in indices], N_START_ITERATIONS)
            for index, block in zip(indices, iteration.vectors, strict=True):
                blocks[index] = block
        for index, other in others:
            blocks[index] = other.power_step(N_START_ITERATIONS).vectors[0]
        if self._loaded:
            warnings.warn(
                f"Saved singular vectors belong to no selected layer and are dropped: {sorted(self._loaded)}.",
                stacklevel=2,
            )
            self._loaded = {}
        self._groups, self._others = self._iterations(weights, blocks, range(len(blocks)))

    def _iterations(
        self, weights: Sequence[Tensor], blocks: Sequence[Tensor], which: Sequence[int]
    ) -> tuple[list[tuple[list[int], kernels.Iteration]], list[tuple[int, MatrixFreeIteration]]]:
        """Return the iterations of the operators `which`: the kernels', and one each for those not served by them."""
        sharded = [i for i in which if self.operators[i].is_matrix and is_sharded(weights[i])]
        served = [i for i in which if self._is_served[i] and not is_sharded(weights[i])]
        geometries = [self.operators[i].symbol_geometry for i in served]
        symbols = [None if geometry is None else Symbol(geometry, max(2, self.block_size)) for geometry in geometries]
        groups = kernels.iterations_for(
            [weights[i] for i in served], [blocks[i] for i in served], self.backend, symbols if any(symbols) else None
        )
        groups = [([served[i] for i in indices], iteration) for indices, iteration in groups]
        for i in sharded:  # a backend asked for by name that cannot serve is refused
            kernels.choose_backend(weights[i], len(blocks[i]), self.backend)
        if sharded:
            groups.append((sharded, ShardedIteration([weights[i] for i in sharded], [blocks[i] for i in sharded])))
        others = [i for i in which if not self._is_served[i]]
        return groups, [(i, MatrixFreeIteration(self.operators[i], blocks[i], self.backend)) for i in others]

    @without_modes()
    def upper(self) -> Tensor:
        """Return upper bounds of the spectral norms, shape (L,), fp32 (fp64 if a weight is fp64).

        ``sigma_1^2 <= |W|_F^2 - sum_{i=2..r} theta_i^2`` for the Ritz values theta of any orthonormal block, which lie
        below the singular values one by one (Cauchy interlacing); exact where r = min(m, n). This holds in exact
        arithmetic: rounding is not accounted for, so it is no certificate. Infinite for operators that are no matrices.
        """

        def own(op: LinearOperator, weight: Tensor, block: Tensor, sigma: Tensor) -> Tensor:
            if not op.is_matrix:
                return sigma if op.leading_vectors() is not None else torch.full_like(sigma, math.inf)
            scaled = weight.to(block.dtype) / sigma.to(block).clamp(min=torch.finfo(block.dtype).tiny)
            rest = scaled.square().sum() - images_of(scaled, block).square().sum()
            return torch.sqrt(1.0 + rest.clamp(min=0.0)).to(sigma) * sigma

        estimates, uppers = self._of_present(own, ShardedIteration.upper)
        return torch.stack([upper.to(estimates) for upper in uppers])

    @without_modes()
    def ritz_values(self) -> list[Tensor]:
        """Return each block's Ritz values on the present weights: *estimates (from below)* of the top singular values.

        The i-th lies below the i-th singular value (Cauchy interlacing), but for fp32 rounding. The blocks stay as
        they are. L tensors of shape (r_l,), descending; shape (1,) for an operator with its norm in closed form. Of a
        symbol, shape (cells,): one for each part of the frequencies of each group, an estimate from below of the
        largest norm there, and no further singular value; of a depthwise convolution the channels' norms. NaN where
        the weight is not finite.
        """

        def own(op: LinearOperator, weight: Tensor, block: Tensor, sigma: Tensor) -> Tensor:
            if op.symbol_geometry is not None:
                return norms_in_cells(op, weight, block)
            if op.leading_vectors() is not None:
                return sigma[None]
            if op.is_matrix:
                images = images_of(weight.to(block.dtype), block)
            else:
                images = op.apply(block.view(len(block), *op.domain_shape)).flatten(1)
            # LAPACK raises on NaN and infinity.
            is_finite = bool(images.isfinite().all())
            return torch.linalg.svdvals(images) if is_finite else images.new_full((len(block),), math.nan)

        return self._of_present(own, ShardedIteration.ritz_values)[1]

    def _of_present(
        self,
        own: Callable[[LinearOperator, Tensor, Tensor, Tensor], Tensor],
        of_sharded: Callable[[ShardedIteration, list[Tensor]], Iterable[Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the present estimates, shape (L,), and what the functions return for each of the L operators.

        Args:
            own: Takes an operator, its weight, its block and its estimate.
            of_sharded: Takes the iteration of sharded weights and these weights, all at once.
        """
        step = self.current()
        weights = self._weights()
        found: dict[int, Tensor] = {}
        for indices, iteration in self._groups:
            if isinstance(iteration, ShardedIteration):
                found |= zip(indices, of_sharded(iteration, [weights[i] for i in indices]), strict=True)
        rows = enumerate(zip(self.operators, weights, step.vectors, step.sigma, strict=True))
        return step.sigma, [found[index] if index in found else own(*row) for index, row in rows]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the blocks by layer name; empty before the first use. For a matrix the shape is (r, min(m, n)).

        The block of a sharded matrix lives on the side that is not sharded; where that is not the side of a whole one,
        ``" (other side)"`` is added to the name. No communication.
        """
        if not self._served:
            return dict(self._loaded)
        vectors = {
            index: block.clone()
            for indices, iteration in self._groups
            for index, block in zip(indices, iteration.vectors, strict=True)
        }
        vectors |= {index: other.vectors.clone() for index, other in self._others}
        return {key: vectors[index] for index, key in enumerate(self._keys)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take blocks that :meth:`state_dict` returned; they are fitted to the layers at the next use.

        A layer without a saved block, or with one of another shape or side (a warning says so), starts afresh.
        """
        self._groups, self._others, self._served, self._addresses = [], [], [], []
        self._loaded = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the compiled tables behind: they hold addresses of this process."""
        emptied: dict[str, Any] = {key: [] for key in ("_groups", "_others", "_served", "_addresses")}
        return self.__dict__ | emptied | {"_loaded": self.state_dict()}
