"""Kernels: the iteration of a list of weights and the rank-one update of their gradients, in three implementations.

:mod:`~lightning_lip.kernels.reference` (PyTorch, any device) is the specification;
:mod:`~lightning_lip.kernels.cpu.iteration` (Numba) and :mod:`~lightning_lip.kernels.gpu.iteration` (Triton) do the same
in one pass over the weights and one call for all layers. Where an operator's maps are PyTorch's own,
:mod:`~lightning_lip.kernels.cpu.rows` does the rest of a step on the CPU. Kernels know tensors and pointers, never
modules.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_lip.kernels.cpu.layout import MAX_BLOCK_SIZE
from lightning_lip.kernels.penalties import PENALTY_CODES
from lightning_lip.kernels.reference import PowerStep, ReferenceIteration, penalty_slope, power_step
from lightning_lip.kernels.symbol import Symbol
from lightning_lip.kernels.tensors import is_sharded

if TYPE_CHECKING:
    from lightning_lip.kernels.cpu.rows import CompiledRows

__all__ = [
    "PENALTY_CODES",
    "Backend",
    "Iteration",
    "PowerStep",
    "choose_backend",
    "compiled_rows",
    "iterations_for",
    "penalty_slope",
    "power_step",
]

_logger = logging.getLogger("lightning_lip")

Backend = Literal["reference", "cpu", "gpu"]

ENVIRONMENT_VARIABLE = "LIGHTNING_LIP_BACKEND"
"""Forces a backend by name for the whole process, unless an argument does."""


class Iteration(Protocol):
    """The persistent blocks of L weights on one device, and what can be done with them.

    An implementation is constructed from the weights (for their shapes; addresses may change) and the starting blocks,
    each of shape (r_l, min(m_l, n_l)) with orthonormal rows.
    """

    @property
    def vectors(self) -> list[Tensor]:
        """The present blocks; they may be views that the next step overwrites."""

    def power_step(
        self, weights: Sequence[Tensor], n_iterations: int, scales: Sequence[Tensor | None] | None = None
    ) -> PowerStep:
        """Advance the blocks as :func:`power_step` does; the vectors returned may be overwritten by the next step."""

    def rank_one_update_(self, grads: Sequence[Tensor | None], coefficients: Tensor) -> None:
        """Add ``c_l u_l v_l^T`` to each gradient, with the vectors of the last step; None skips a layer."""

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
        """Advance, and add the gradient of ``scale * penalty`` of :func:`penalty_slope`; return that, shape ().

        The next call may overwrite what is returned.
        """


def _implementation(backend: str) -> type[Iteration]:
    if backend == "cpu":
        return importlib.import_module("lightning_lip.kernels.cpu.iteration").CpuIteration  # type: ignore[no-any-return]
    if backend == "gpu":
        return importlib.import_module("lightning_lip.kernels.gpu.iteration").GpuIteration  # type: ignore[no-any-return]
    return ReferenceIteration


def _why_not(backend: str, weight: Tensor, block_size: int, symbol: Symbol | None = None) -> str | None:
    """Return why a backend cannot serve a weight, in words, or None if it can."""
    if backend == "reference":
        return None
    if is_sharded(weight):
        return "it is a DTensor (FSDP2, tensor parallel)"
    if symbol is not None and backend == "gpu":
        return "the symbols of convolutions are not compiled for a GPU yet"
    arguments = (weight, block_size) if symbol is None else (weight, block_size, symbol)
    reason: str | None = _implementation(backend).why_not(*arguments)  # type: ignore[attr-defined]
    return reason


_already_told: set[str] = set()


def choose_backend(
    weight: Tensor, block_size: int, backend: Backend | None = None, symbol: Symbol | None = None
) -> str:
    """Return the backend for a weight: by its device, or the one asked for by argument or environment.

    Args:
        weight: Shape (m, n), or a convolution's kernel.
        block_size: Vectors, r.
        backend: The backend to force; None asks the environment variable ``LIGHTNING_LIP_BACKEND``, then the device.
            An automatic choice that cannot serve falls back to the reference, and logs the reason once. So does one
            that cannot serve a symbol, forced or not: nothing but the reference serves all of them.
        symbol: What a kernel is iterated as; None for a matrix.

    Raises:
        ValueError: If the backend asked for is unknown or cannot serve this weight; the message says why.
    """
    forced = backend if backend is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    if forced is not None:
        check_backend(forced)
        reason = _why_not(forced, weight, block_size, symbol)
        if reason is not None and symbol is None:
            raise ValueError(f"The backend {forced!r} cannot serve a weight of shape {tuple(weight.shape)}: {reason}.")
        if reason is None:
            return forced
    else:
        natural = {"cpu": "cpu", "cuda": "gpu"}.get(weight.device.type, "reference")
        reason = _why_not(natural, weight, block_size, symbol)
        if reason is None:
            return natural
    if reason not in _already_told:
        _already_told.add(reason)
        _logger.info("Some weights are served by the PyTorch reference instead of the compiled kernels: %s.", reason)
    return "reference"


def check_backend(backend: str) -> None:
    """Raise ValueError if there is no backend of this name."""
    if not isinstance(backend, str) or backend not in get_args(Backend):
        raise ValueError(f"Unknown backend {backend!r}: expected one of {', '.join(map(repr, get_args(Backend)))}.")


def compiled_rows(vectors: Tensor, q: int, p: int, backend: Backend | None = None) -> CompiledRows | None:
    """Return what iterates a block through maps of PyTorch's, compiled; None where the reference does.

    Args:
        vectors: The block, shape (r, p).
        q: Elements of an image of a vector.
        p: Elements of a vector.
        backend: As in :func:`choose_backend`. A forced one that is another device's does not matter here.
    """
    forced = backend if backend is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    if forced == "reference" or vectors.device.type != "cpu" or vectors.dtype != torch.float32:
        return None
    if len(vectors) > MAX_BLOCK_SIZE:
        return None
    rows = importlib.import_module("lightning_lip.kernels.cpu.rows")
    return rows.CompiledRows(len(vectors), q, p)  # type: ignore[no-any-return]


def iterations_for(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    backend: Backend | None = None,
    symbols: Sequence[Symbol | None] | None = None,
) -> list[tuple[list[int], Iteration]]:
    """Return iterations that together serve all weights, each with the indices of its own.

    Weights of one backend, device and dtype share an iteration: one call, one launch.

    Args:
        weights: L matrices, each of shape (m_l, n_l), or kernels of convolutions.
        vectors: L starting blocks, each of shape (r_l, min(m_l, n_l)); of a kernel, its starting state.
        backend: As in :func:`choose_backend`.
        symbols: What each kernel is iterated as, None for a matrix; None where all are matrices.
    """
    groups: dict[tuple[str, torch.device, torch.dtype], list[int]] = {}
    symbols = symbols or [None] * len(weights)
    for index, (weight, block, symbol) in enumerate(zip(weights, vectors, symbols, strict=True)):
        name = choose_backend(weight, len(block), backend, symbol)
        groups.setdefault((name, weight.device, weight.dtype), []).append(index)
    return [
        (
            indices,
            _implementation(name)(
                *([of[i] for i in indices] for of in (weights, vectors)),
                *([[symbols[i] for i in indices]] if any(symbols[i] for i in indices) else []),
            ),
        )
        for (name, _, _), indices in groups.items()
    ]
