"""Penalties: pure functions of the layers' log spectral norms.

Every penalty maps ``log_sigma``, the L logarithms of the spectral norms, and ``log_bound``, the logarithm S of the
bound (without a traced graph S = sum log_sigma, the log of the product), to a scalar. The product itself is never
formed: 120 layers of norm 3 overflow fp32, their logarithms do not. The six built-in ones are in
:mod:`lightning_lip.kernels.penalties`, where kernels reach them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_lip.checks import check_callable, check_number, got, is_finite_number, shown
from lightning_lip.kernels.penalties import (
    LARGEST_KNEE,
    built_in,
    hinge_log,
    layer_sum,
    layer_sum_squares,
    level_of,
    log,
    product,
    softplus_log,
)

__all__ = [
    "COEFFICIENT",
    "KNEE",
    "LARGEST_KNEE",
    "Penalty",
    "PenaltyName",
    "check_knee",
    "check_value",
    "get_penalty",
    "hinge_log",
    "layer_sum",
    "layer_sum_squares",
    "level_of",
    "log",
    "product",
    "scalar",
    "softplus_log",
]

COEFFICIENT = 1e-3
"""The default factor of the penalty; chosen with :data:`KNEE` by bench/studies/knee.py."""

KNEE = 100.0
"""The default product beyond which ``"product"`` is linear in S."""

Penalty = Callable[[Tensor, Tensor], Any]
"""``penalty(log_sigma, log_bound) -> value``: tensors of shapes (L,), () -> (), differentiable in both arguments.

Not ``-> Tensor``: LightningCLI would then take functions only whose return is annotated so.
"""

PenaltyName = Literal["product", "softplus_log", "hinge_log", "log", "layer_sum", "layer_sum_squares"]


def check_knee(knee: object) -> float:
    """Return the knee of ``product`` as a float, infinite for None.

    Raises:
        ValueError: If it is neither None nor a positive number.
    """
    if knee is None or (isinstance(knee, float) and knee == math.inf):
        return math.inf
    if not is_finite_number(knee) or knee <= 0:
        raise ValueError(f"Expected `knee` to be a positive number, or None for the plain product, got {shown(knee)}.")
    return float(knee)


def get_penalty(penalty: PenaltyName | Penalty, target: float = 1.0, knee: float | None = KNEE) -> Penalty:
    """Return the function for a penalty's name, with its target or knee bound; a callable is returned as it is.

    Args:
        penalty: One of the names of :data:`PenaltyName`, or a callable ``(log_sigma (L,), log_bound ()) -> ()``.
        target: M of ``softplus_log`` and ``hinge_log``; positive and finite.
        knee: The product beyond which ``product`` is linear in S; None for none.

    Raises:
        ValueError: If the name is unknown, or `target` or `knee` is not a positive number.
        TypeError: If `penalty` is neither a string nor a callable of two tensors.
    """
    target, knee = check_number("target", target, positive=True), check_knee(knee)
    if isinstance(penalty, str):
        if penalty in get_args(PenaltyName):
            return built_in(penalty, level_of(penalty, target, knee))
        names = ", ".join(repr(name) for name in get_args(PenaltyName))
        raise ValueError(f"Unknown penalty {penalty!r}: expected one of {names}, or a callable of your own.")
    if not callable(penalty) or isinstance(penalty, type):
        raise TypeError(f"Expected `penalty` to be a name or a callable, got {got(penalty)}.")
    check_callable("penalty", penalty, "(log_sigma, log_bound) -> penalty", 2)
    return penalty


def scalar(value: Any) -> Tensor:
    """Return what a penalty returned, if that is a floating-point tensor of shape ().

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, Tensor) or value.shape != ():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"Expected the penalty to return a tensor of shape (), got {got}.")
    if not value.is_floating_point():
        raise ValueError(f"Expected the penalty to return a floating-point tensor, got {value.dtype}.")
    return value


def check_value(penalty: Penalty, value: Tensor, log_sigma: Tensor) -> None:
    """Check that a penalty has a value and a gradient to train with.

    Args:
        penalty: The penalty, for the message.
        value: What it returned, shape ().
        log_sigma: What it returned it for, shape (L,), requiring a gradient. Where it is not finite, as in a network
            that has diverged, the numbers are not the penalty's fault.

    Raises:
        ValueError: If the value does not depend on `log_sigma` in autograd, or it or its gradient is not finite.
    """
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value, log_sigma, retain_graph=True, allow_unused=True)
    if slope is None:
        raise ValueError(
            f"The `penalty` {penalty!r} returned {value.item()}, which does not depend on log_sigma and log_bound in "
            "autograd: it would train nothing. Compute it with torch, without detach(), float(), NumPy or no_grad(); "
            "where there is nothing to penalise, return 0 * log_bound."
        )
    if log_sigma.isfinite().all() and not (value.isfinite() and slope.isfinite().all()):
        raise ValueError(
            f"The `penalty` {penalty!r} returned {value.item()} with the gradient {slope.tolist()} at log_sigma = "
            f"{log_sigma.tolist()}: expected finite numbers."
        )
