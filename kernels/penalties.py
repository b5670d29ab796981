"""The six built-in penalties, as functions of the layers' log spectral norms: what the kernels differentiate.

:mod:`lightning_lip.penalty.penalties` gives them to users, with what holds for all penalties. The kernels that form a
penalty's derivative themselves, :mod:`lightning_lip.kernels.cpu.compiled.layers` and
:mod:`lightning_lip.kernels.gpu.update`, are held to autograd through these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

PRODUCT_CAP = 30.0
"""``product`` is linear in S above this value (a bound of e^30 = 1.1e13), so that its slope stays finite in fp32."""

_SOFTPLUS_END = 40.0
"""Where softplus(x) = x to fp64's rounding: e^-40 = 4e-18. PyTorch's own end of 20 leaves an error of 2e-9."""


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
    return F.softplus(log_bound - math.log(target), threshold=_SOFTPLUS_END)


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


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "product": product,
    "softplus_log": softplus_log,
    "hinge_log": hinge_log,
    "log": log,
    "layer_sum": layer_sum,
    "layer_sum_squares": layer_sum_squares,
}

PENALTY_CODES = {name: code for code, name in enumerate(_FUNCTIONS)}
"""The number of each penalty, by which compiled code knows it."""


def built_in(name: str, target: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the penalty of a name, ``(log_sigma (L,), log_bound ()) -> ()``, with its target M if it has one."""
    function = _FUNCTIONS[name]
    return partial(function, target=target) if function in (softplus_log, hinge_log) else function
