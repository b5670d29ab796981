"""Normalisations that no function of torch shows: those that a module writes out by itself, found by trying.

Llama's RMSNorm and T5's LayerNorm are such; and SyncBatchNorm, which normalises by an autograd function of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_lip.models.modules import state_kept
from lightning_lip.usage.records import Normalisation
from lightning_lip.usage.values import Stored

SCALE = 4.0
TOLERANCE = 2e-2
"""Of the largest entry: bf16 has 8 bits, and a normalisation adds eps to what it divides by."""


def candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that may be normalisations of their own: without submodules, with a vector of gains."""
    for module in model.modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, nn.SyncBatchNorm):
            yield module
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


def written_out(module: nn.Module, value: Tensor) -> Normalisation | None:
    """Return a module's normalisation of its input, if it is one; its gain is found while it runs."""
    if isinstance(module, nn.SyncBatchNorm):
        tensors = {"weight": module.weight, "running_var": module.running_var}
        gain, variance = (
            None if tensor is None else Stored(module, key, tuple(tensor.shape), module, "", "")
            for key, tensor in tensors.items()
        )
        return Normalisation(module, gain, variance, module.eps)
    return Normalisation(module, None, None, 0.0) if is_scale_invariant(module, value) else None
