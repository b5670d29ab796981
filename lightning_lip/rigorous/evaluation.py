"""Tensors that a network computes from the stored ones, evaluated for certificates: in fp64, with the error of that.

A weight norm in fp32 yields a matrix that differs from the one in exact arithmetic by 1e-7, in bf16 by 1e-2; a bound of
the former is no bound of the network. Every operation is therefore done again in fp64 on the CPU, on exact copies of
the stored tensors, whatever dtype and device it is written for: casts are the identity in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.rigorous.rounding import UNIT_ROUNDOFF, multiply_up, up

N_ROUNDINGS = 64
"""Roundings of an entry that count in any case, beside a sum over all entries."""

MEASURED = 64 * 2.0**-29
"""The roundings of fp64 are 2^-29 times those of fp32; 64 times the measured error stands for an unlucky entry."""


class Evaluation(NamedTuple):
    """A tensor in fp64 on the CPU.

    Attributes:
        value: The tensor.
        error: A bound of each entry's distance from the value in exact arithmetic; None where the value is exact.
    """

    value: Tensor
    error: Tensor | None

    def magnitudes(self) -> Tensor:
        """Return upper bounds of the entries' magnitudes."""
        return self.value.abs() if self.error is None else (self.value.abs() + self.error) * (1 + 2 * UNIT_ROUNDOFF)

    def error_norm(self) -> float:
        """Return an upper bound of the error's Frobenius norm; 0 for an exact value."""
        if self.error is None or self.error.numel() == 0:
            return 0.0
        # Divided by the largest first: squares of small errors underflow.
        largest = float(self.error.max())
        scaled = float(torch.linalg.vector_norm(self.error / largest)) if largest > 0 else 0.0
        return multiply_up(largest, up(scaled * (1 + self.error.numel() * UNIT_ROUNDOFF)))


@torch.no_grad()
def evaluated(compute: Callable[[], Tensor]) -> Evaluation:
    """Return what `compute` returns for exact copies of the stored tensors in fp64, and the rounding error of that.

    A stored tensor, a view or a cast of one is exact. For any other value the error is the sum of two terms:

    - ``(n + 64) u |w|`` for a tensor of n entries, a *proven bound* for elementwise functions of moderate argument and
      quotients by a norm (weight normalisation): a sum of n terms of one sign errs by n u, and few roundings follow;
    - 64 times 2^-29 times the largest difference from the same computation in fp32, on the same entries: *measured*,
      not proven. Cancellation, ill-conditioned solves, many factors (spectral normalisation by stale vectors, Cayley
      maps, sums of products) multiply the roundings of both precisions by the same factor.

    Args:
        compute: Computes the tensor by operations of torch.

    Raises:
        UnsupportedLayerError: If an operation does not run in fp64 (or fp32, to measure by), or its result is beyond
            the largest fp32 number, where nothing can be measured.
    """
    value, is_exact = _computed(compute, torch.float64)
    if is_exact or not bool(value.isfinite().all()):
        return Evaluation(value, None)
    difference = (_computed(compute, torch.float32)[0].double() - value).abs()
    measured = float(difference.max()) if difference.numel() else 0.0
    if not measured < torch.inf:
        raise UnsupportedLayerError("it is computed, and overflows in fp32, by which its rounding is measured")
    error = (value.numel() + N_ROUNDINGS) * UNIT_ROUNDOFF * value.abs() + MEASURED * measured
    return Evaluation(value, error * (1 + 8 * UNIT_ROUNDOFF))


def _computed(compute: Callable[[], Tensor], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Return the value of a computation done in `dtype` on the CPU, and whether it is a stored tensor as it is."""
    mode = _Precision(dtype)
    with torch.compiler.set_stance("force_eager"):
        try:
            with mode:
                value = compute()
        except (RuntimeError, TypeError, ValueError) as error:
            # What fails in the model's own dtype too is not due to the precision.
            compute()
            raise UnsupportedLayerError(f"it cannot be computed in {dtype} from the stored tensors: {error}") from error
    return value.detach().to("cpu", dtype), mode.is_exact


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does every operation in one precision on the CPU: stored tensors are converted where they enter.

    Attributes:
        is_exact: Whether there were only views, copies and casts so far.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_exact = True
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        of_bits = func is torch.ops.aten.view.dtype
        if of_bits and (given["dtype"].is_floating_point or given["self"].is_floating_point()):
            raise TypeError("a view as another dtype reads the bits anew, which are others in another dtype.")
        arguments = pytree.tree_map(self._converted, given)
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and arguments.get(argument.name) is not given.get(argument.name):
                raise TypeError(f"{func} writes into a stored tensor.")
        result = func(**arguments)
        if self._is_other(result) and any(argument.name == "dtype" for argument in func._schema.arguments):
            # A tensor made of the default dtype.
            result = func(**{**arguments, "dtype": self._dtype})
        if any(map(self._is_other, pytree.tree_leaves(result))):
            raise TypeError(f"{func} returns another dtype.")
        self.is_exact &= func.is_view or func in _COPIES
        return result

    def _is_other(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != self._dtype

    def _converted(self, value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.dtype):
            return self._like(value)
        if isinstance(value, Tensor) and (value.device.type != "cpu" or value.dtype != self._like(value.dtype)):
            return value.detach().to("cpu", self._like(value.dtype))
        return value

    def _like(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that stands for another one here; of numbers that are not rounded, itself."""
        if dtype.is_complex:
            return self._dtype.to_complex()
        return self._dtype if dtype.is_floating_point else dtype


_COPIES = {
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh.default,
}
