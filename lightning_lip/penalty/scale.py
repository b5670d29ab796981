"""Whether a penalty's gradient is in scale with the loss's: both norms, once, where the penalty is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_RATIO = 0.2
"""The penalty's gradient over the loss's from which a network may train visibly worse: see bench/studies/knee.py."""

RIGHT_RATIO = 0.03
"""What a suggested coefficient leads to: the defaults are at 0.015 to 0.04 on all networks there but one."""


@torch.no_grad()
def gradient_norms(parameters: Sequence[Tensor], add: Callable[[], object]) -> tuple[float, float]:
    """Return the norm of the gradients of some parameters, and the norm of what a call adds to them.

    The gradients are copied for the time of the call. Of sharded parameters (DTensors) the norms are those of the whole
    gradients, so that every rank must make the call.

    Args:
        parameters: Those that the call may add to; a missing ``.grad`` counts as zero.
        add: Adds to the gradients, in place.

    Returns:
        The two Euclidean norms, over all of the parameters together.
    """
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    add()
    present = [(p.grad, old) for p, old in zip(parameters, before, strict=True) if p.grad is not None]
    added = _norm(grad if old is None else grad - old for grad, old in present)
    return _norm(old for old in before if old is not None), added


def out_of_scale(loss: float, penalty: float, coefficient: float) -> str | None:
    """Say in words that a penalty's gradient is out of scale with the loss's, with a coefficient to try.

    Args:
        loss: Norm of the loss's gradient, positive.
        penalty: Norm of the penalty's, with its coefficient.
        coefficient: That coefficient.

    Returns:
        The warning; None where nothing is wrong.
    """
    ratio = penalty / loss
    if ratio <= LARGEST_RATIO:
        return None
    better = float(f"{coefficient * RIGHT_RATIO / ratio:.0e}")
    return (
        f"At the first step the penalty's gradient is {ratio:.2g} times the loss's on the same layers: it may keep the "
        f"network from training. Try coefficient={better:g}, or raise it slowly with `warmup_steps`."
    )


def _norm(gradients: Iterable[Tensor]) -> float:
    return math.hypot(*(_norm_of(gradient) for gradient in gradients))


def _norm_of(gradient: Tensor) -> float:
    norm: Any = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
