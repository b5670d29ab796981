"""The GPU backend as custom operators, which torch.compile takes whole instead of breaking its graph at an address.

They run the methods of a :class:`lightning_lip.kernels.gpu.iteration.GpuIteration`, found by its handle. The buffers
that outlive a call are arguments too, so that the compiler knows that they change. The schemas are written out, because
torch 2.6 does not infer them from ``list[Tensor]``.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_BY_HANDLE: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def register(iteration: Any) -> int:
    """Return the handle by which the operators find a GpuIteration, as long as it lives."""
    handle = next(_HANDLES)
    _BY_HANDLE[handle] = iteration
    return handle


@contextlib.contextmanager
def _with_state(handle: int, state: Sequence[Tensor]) -> Iterator[Any]:
    """Give the object behind a handle; torch.compile may pass clones of its buffers, which are then kept in step."""
    iteration = _BY_HANDLE.get(handle)
    if iteration is None:
        raise RuntimeError("The GpuIteration of a compiled graph no longer exists: compile again with the new one.")
    pairs = [(own, given) for own, given in zip(iteration._state(), state, strict=True) if own is not given]
    for own, given in pairs:
        own.copy_(given)
    yield iteration
    for own, given in pairs:
        given.copy_(own)


def _spread(grads: Sequence[Tensor], present: Sequence[int], n_layers: int) -> list[Tensor | None]:
    spread: list[Tensor | None] = [None] * n_layers
    for index, grad in zip(present, grads, strict=True):
        spread[index] = grad
    return spread


@torch.library.custom_op(
    "lightning_lip::gpu_power_step",
    mutates_args={"state"},
    schema="(Tensor[] weights, Tensor(a1!)[] state, SymInt handle, SymInt n_iterations) -> ()",
)
def _gpu_power_step(weights: list[Tensor], state: list[Tensor], handle: int, n_iterations: int) -> None:
    with _with_state(handle, state) as iteration:
        iteration._iterate(weights, n_iterations)


@torch.library.custom_op(
    "lightning_lip::gpu_rank_one_update_",
    mutates_args={"grads", "state"},
    schema=("(Tensor(a0!)[] grads, Tensor coefficients, Tensor(a2!)[] state, SymInt handle, SymInt[] present) -> ()"),
)
def _gpu_rank_one_update(
    grads: list[Tensor], coefficients: Tensor, state: list[Tensor], handle: int, present: list[int]
) -> None:
    with _with_state(handle, state) as iteration:
        iteration._factors.copy_(coefficients)
        iteration._update(_spread(grads, present, len(iteration._shapes)))


@torch.library.custom_op(
    "lightning_lip::gpu_penalise_",
    mutates_args={"grads", "state"},
    schema=(
        "(Tensor[] weights, Tensor(a1!)[] grads, Tensor(a2!)[] state, SymInt handle, "
        "SymInt[] present, SymInt n_iterations, SymInt code, float[] numbers, "
        "SymInt[] multiplicities) -> ()"
    ),
)
def _gpu_penalise(
    weights: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    handle: int,
    present: list[int],
    n_iterations: int,
    code: int,
    numbers: list[float],
    multiplicities: list[int],
) -> None:
    with _with_state(handle, state) as iteration:
        spread = _spread(grads, present, len(iteration._shapes))
        iteration._penalise(weights, spread, n_iterations, code, numbers[0], numbers[1], multiplicities)
