"""SpectralNorms: the persistent blocks of singular vectors, and one step of iteration over all operators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lip import kernels
from lightning_lip.kernels.reference import compute_dtype
from lightning_lip.operators import LinearOperator, without_autocast

N_START_ITERATIONS = 15
"""Iterations of a block that starts from random vectors."""


class SpectralNorms:
    """Estimates (from below) of the operators' spectral norms, by block iteration that goes on from step to step.

    The blocks start from a private generator, seeded alike on every rank, with 15 iterations at first use. They are
    plain tensors: nothing is registered in the model.

    Args:
        operators: The L operators.
        block_size: Vectors a layer, r, clamped to min(m, n); 1 is the classical power iteration.
        n_iterations: Iterations a step, each of which reads the weights once.
        seed: Seed of the private generator.

    Raises:
        ValueError: If `block_size` or `n_iterations` is below 1.
    """

    def __init__(
        self, operators: Sequence[LinearOperator], block_size: int = 8, n_iterations: int = 1, seed: int = 0
    ) -> None:
        for argument, value in (("block_size", block_size), ("n_iterations", n_iterations)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Expected `{argument}` to be an integer of at least 1, got {value!r}.")
        self.operators = list(operators)
        self.block_size = block_size
        self.n_iterations = n_iterations
        self.seed = seed
        self._vectors: list[Tensor] = []
        self._loaded: dict[str, Tensor] = {}

    def step(self) -> kernels.PowerStep:
        """Advance the blocks by `n_iterations` and return the leading singular triplets of the present weights."""
        return self._evaluate(self.n_iterations)

    def current(self) -> kernels.PowerStep:
        """Return the Ritz values and vectors of the present weights; the blocks stay as they are."""
        return self._evaluate(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    @without_autocast()
    def _evaluate(self, n_iterations: int) -> kernels.PowerStep:
        weights = self._weights()
        if not self._vectors:
            self._start(weights)
        # The model may have been moved or cast since.
        self._vectors = [v.to(w.device, compute_dtype(w.dtype)) for v, w in zip(self._vectors, weights, strict=True)]
        result = kernels.power_step(weights, self._vectors, n_iterations)
        self._vectors = result.vectors
        return result

    def _weights(self) -> list[Tensor]:
        return [op.weight().detach() for op in self.operators]

    def _start(self, weights: Sequence[Tensor]) -> None:
        """Draw random blocks, or take the loaded ones, and iterate the random ones 15 times."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        blocks, fresh = [], []
        for index, (op, weight) in enumerate(zip(self.operators, weights, strict=True)):
            side = min(weight.shape)
            # Drawn in fp32 on the CPU whatever comes after: the same vectors on every device and every rank, also where
            # a default device or dtype is set.
            random = torch.randn(
                min(self.block_size, side), side, generator=generator, device="cpu", dtype=torch.float32
            ).to(weight.device, compute_dtype(weight.dtype))
            loaded = self._loaded.pop(op.name, None)
            if loaded is not None and loaded.shape == random.shape:
                blocks.append(loaded.to(random))
                continue
            if loaded is not None:
                warnings.warn(
                    f"The saved singular vectors of layer {op.name!r} have shape {tuple(loaded.shape)}, its weight and "
                    f"`block_size` ask for {tuple(random.shape)}: its iteration starts afresh.",
                    stacklevel=2,
                )
            blocks.append(torch.linalg.qr(random.mT).Q.mT)
            fresh.append(index)
        if fresh:
            started = kernels.power_step(
                [weights[i] for i in fresh], [blocks[i] for i in fresh], N_START_ITERATIONS
            ).vectors
            for index, block in zip(fresh, started, strict=True):
                blocks[index] = block
        if self._loaded:
            warnings.warn(
                f"Saved singular vectors belong to no selected layer and are dropped: {sorted(self._loaded)}.",
                stacklevel=2,
            )
            self._loaded = {}
        self._vectors = blocks

    @torch.inference_mode(False)
    @torch.no_grad()
    @without_autocast()
    def upper(self) -> Tensor:
        """Return upper bounds of the spectral norms, shape (L,), fp32 (fp64 if a weight is fp64).

        ``sigma_1^2 <= |W|_F^2 - sum_{i=2..r} theta_i^2`` for the Ritz values theta of any orthonormal block, which lie
        below the singular values one by one (Cauchy interlacing); exact where r = min(m, n). This holds in exact
        arithmetic: rounding is not accounted for, so it is no certificate.
        """
        step = self.current()
        uppers = []
        for weight, block, sigma in zip(self._weights(), self._vectors, step.sigma, strict=True):
            matrix = weight.to(block.dtype)
            scale = matrix.abs().amax().clamp(min=torch.finfo(block.dtype).tiny)
            matrix = matrix / scale
            images = block @ (matrix if matrix.shape[0] < matrix.shape[1] else matrix.mT)
            rest = matrix.square().sum() - images.square().sum()
            top = (sigma.to(scale) / scale).square()
            uppers.append((torch.sqrt(top + rest.clamp(min=0.0)) * scale).to(step.sigma))
        return torch.stack(uppers)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the blocks by layer name, shape (r, min(m, n)) each; empty before the first use."""
        vectors = {op.name: v.clone() for op, v in zip(self.operators, self._vectors, strict=False)}
        return vectors or dict(self._loaded)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take blocks that :meth:`state_dict` returned; they are fitted to the layers at the next use.

        A layer without a saved block, or with one of another shape (a warning says so), starts afresh.
        """
        self._vectors = []
        self._loaded = dict(state)
