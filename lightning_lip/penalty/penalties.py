"""Penalties: pure functions of the layers' log spectral norms.

Every penalty maps ``log_sigma``, the L logarithms of the spectral norms, and ``log_bound``, the logarithm S of the
bound (without a traced graph S = sum log_sigma, the log of the product), to a scalar. The product itself is never
formed: 120 layers of norm 3 overflow fp32, their logarithms do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Penalty = Callable[[Tensor, Tensor], Any]
"""``penalty(log_sigma, log_bound) -> value``: tensors of shapes (L,), () -> (), differentiable in both arguments.

Not ``-> Tensor``: LightningCLI would then take functions only whose return is annotated so.
"""

PenaltyName = Literal["product", "softplus_log", "hinge_log", "log", "layer_sum", "layer_sum_squares"]

PRODUCT_CAP = 30.0
"""``product`` is linear in S above this value (a bound of e^30 = 1.1e13), so that its slope stays finite in fp32."""


def product(log_sigma: Tensor, log_bound: Tensor) -> Tensor:
    """Return the bound P = e^S itself, the paper's penalty; ``e^c (1 + S - c)`` beyond the cap c = 30.

    Args:
        log_sigma: Logarithms of the spectral norms, shape (L,). Not used.
        log_bound: S, shape ().

    Returns:
        The penalty, shape (). Exact up to the cap, continuous with its slope at the cap. Source: N. Couellan, "The
        coupling effect of Lipschitz regularization in deep neural networks" (2021).
    """
    beyond = log_bound > PRODUCT_CAP
    # Not clamp: whether it passes a gradient at the cap itself differs between versions of torch.
    below = torch.exp(torch.where(beyond, torch.full_like(log_bound, PRODUCT_CAP), log_bound))
    above = math.exp(PRODUCT_CAP) * (1.0 + (log_bound - PRODUCT_CAP))
    return torch.where(beyond, above, below)


def softplus_log(log_sigma: Tensor, log_bound: Tensor, target: float = 1.0) -> Tensor:
    """Return ``log(1 + P / M)`` = softplus(S - log M): like the product far below M, with a slope of at most one.

    Args:
        log_sigma: Logarithms of the spectral norms, shape (L,). Not used.
        log_bound: S, shape ().
        target: M > 0, in the bound's own unit.

    Returns:
        The penalty, shape ().
    """
    return F.softplus(log_bound - math.log(target))


def hinge_log(log_sigma: Tensor, log_bound: Tensor, target: float = 1.0) -> Tensor:
    """Return ``max(0, S - log M)^2``: a budget, nothing at or below M.

    Args:
        log_sigma: Logarithms of the spectral norms, shape (L,). Not used.
        log_bound: S, shape ().
        target: M > 0, in the bound's own unit.

    Returns:
        The penalty, shape ().
    """
    return (log_bound - math.log(target)).clamp(min=0.0).square()


def log(log_sigma: Tensor, log_bound: Tensor) -> Tensor:
    """Return S itself, the logarithm of the bound, shape ().

    It is unbounded below: nothing stops a network from being driven to zero by it (an Adam-trained net of six layers
    ended at P = 6e-9). Prefer ``softplus_log``.
    """
    return log_bound


def layer_sum(log_sigma: Tensor, log_bound: Tensor) -> Tensor:
    """Return ``sum_l sigma_l``, shape (): the uncoupled baseline, "Layer reg" in the paper."""
    return log_sigma.exp().sum()


def layer_sum_squares(log_sigma: Tensor, log_bound: Tensor) -> Tensor:
    """Return ``sum_l sigma_l^2``, shape (). Source: Yoshida & Miyato (2017), who add a factor of one half."""
    return (2 * log_sigma).exp().sum()


_WITHOUT_TARGET: dict[str, Penalty] = {
    "product": product,
    "log": log,
    "layer_sum": layer_sum,
    "layer_sum_squares": layer_sum_squares,
}
_WITH_TARGET: dict[str, Callable[..., Tensor]] = {"softplus_log": softplus_log, "hinge_log": hinge_log}


def get_penalty(penalty: PenaltyName | Penalty, target: float = 1.0) -> Penalty:
    """Return the function for a penalty's name, with its target M bound; a callable is returned as it is.

    Args:
        penalty: One of the names of :data:`PenaltyName`, or a callable ``(log_sigma (L,), log_bound ()) -> ()``.
        target: M of ``softplus_log`` and ``hinge_log``; positive and finite.

    Raises:
        ValueError: If the name is unknown or `target` is not a positive finite number.
        TypeError: If `penalty` is neither a string nor callable.
    """
    if not (isinstance(target, Real) and not isinstance(target, bool) and math.isfinite(target) and target > 0):
        raise ValueError(f"Expected `target` to be a positive finite number, got {target!r}.")
    if isinstance(penalty, str):
        if penalty in _WITHOUT_TARGET:
            return _WITHOUT_TARGET[penalty]
        if penalty in _WITH_TARGET:
            return partial(_WITH_TARGET[penalty], target=float(target))
        names = ", ".join(repr(name) for name in get_args(PenaltyName))
        raise ValueError(f"Unknown penalty {penalty!r}: expected one of {names}, or a callable of your own.")
    if callable(penalty):
        return penalty
    raise TypeError(f"Expected `penalty` to be a name or a callable, got {type(penalty).__name__}.")
