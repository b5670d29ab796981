"""Normalisations that a module computes by itself, found by trying: Llama's RMSNorm, T5's LayerNorm and their like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_lip.models.modules import state_kept

SCALE = 4.0
TOLERANCE = 2e-2
"""Of the largest entry: bf16 has 8 bits, and a normalisation adds eps to what it divides by."""


def candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that may be normalisations of their own: without submodules, with a vector of gains."""
    for module in model.modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        is_own = not type(module).__module__.startswith("torch.nn.")
        if is_own and parameters and not module._modules and all(_is_vector(p) for p in parameters):
            yield module


def _is_vector(parameter: Tensor) -> bool:
    return parameter.numel() == max(parameter.shape, default=0)


@torch.no_grad()
def is_scale_invariant(module: nn.Module, value: Tensor) -> bool:
    """Whether a module returns the same for 4 x as for x, and not the same for another input.

    Its forward is called three times, and its state given back.
    """
    if not value.is_floating_point() or value.numel() == 0:
        return False
    with state_kept(module):
        plain, scaled, other = (module.forward(v) for v in (value, SCALE * value, value.roll(1, -1)))
    if not isinstance(plain, Tensor) or plain.shape != value.shape or not plain.is_floating_point():
        return False
    largest = TOLERANCE * plain.abs().max()
    return bool((plain - scaled).abs().max() <= largest and (plain - other).abs().max() > largest)
