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

LARGEST_KNEE = math.exp(30.0)
"""Where the plain product becomes linear in S, 1.1e13: its slope, and a coefficient on it, stay finite in fp32."""

_SOFTPLUS_END = 40.0
"""Where softplus(x) = x to fp64's rounding: e^-40 = 4e-18. PyTorch's own end of 20 leaves an error of 2e-9."""


def product(log_sigma: Tensor, log_bound: Tensor, knee: float = math.inf) -> Tensor:
    """Return the bound P = e^S itself, the paper's penalty, up to a knee; ``knee (1 + S - log knee)`` beyond.

    The slope in S is P itself, so that where training begins at a product of thousands, a coefficient that suits its
    end can destroy the network in a few steps. Beyond the knee the slope stays as it is there.

    Args:
        log_sigma: Logarithms of the spectral norms, shape (L,). Not used.
        log_bound: S, shape ().
        knee: The product where it becomes linear in S; e^30 where it is larger, for the range of fp32.

    Returns:
        The penalty, shape (). Exact up to the knee, continuous with its slope there. Source: N. Couellan, "The
        coupling effect of Lipschitz regularization in deep neural networks" (2021), without a knee.
    """
    knee = min(knee, LARGEST_KNEE)
    log_knee = math.log(knee)
    beyond = log_bound > log_knee
    # Not clamp: whether it passes a gradient at the knee itself differs between versions of torch.
    below = torch.exp(torch.where(beyond, torch.full_like(log_bound, log_knee), log_bound))
    return torch.where(beyond, knee * (1.0 + (log_bound - log_knee)), below)


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


def level_of(name: str, target: float, knee: float) -> float:
    """Return the one number that a built-in penalty depends on: the knee of ``product``, else the target M."""
    return min(knee, LARGEST_KNEE) if name == "product" else target


def built_in(name: str, level: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the penalty of a name, ``(log_sigma (L,), log_bound ()) -> ()``, with its level by :func:`level_of`."""
    function = _FUNCTIONS[name]
    if function is product:
        return partial(function, knee=level)
    return partial(function, target=level) if function in (softplus_log, hinge_log) else function
