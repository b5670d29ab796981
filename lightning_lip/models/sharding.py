"""Models with sharded weights: refused where whole weights are needed, and resharded after a forward pass."""

from __future__ import annotations

from torch import nn

from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.kernels.tensors import is_sharded


def refuse_sharded(model: nn.Module, what: str, instead: str) -> None:
    """Refuse a model with sharded weights where whole ones are needed.

    Args:
        model: The model.
        what: What needs whole weights.
        instead: What to do.

    Raises:
        UnsupportedLayerError: If a module holds a DTensor, or is one whose weights FSDP2 deals out between its calls.
    """
    named = list(model.named_modules())
    sharded = [
        name for name, module in named if any(p is not None and is_sharded(p) for p in module._parameters.values())
    ]
    sharded = sharded or [name for name, module in named if _is_fsdp(module)]
    if sharded:
        names = [name or "(the model itself)" for name in sharded]
        raise UnsupportedLayerError(
            f"{what} needs whole weights, and those of {names} are sharded (FSDP2, tensor parallel). {instead}"
        )


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP2 keeps after a forward pass without a backward pass; no communication.

    After a validation the outermost module's weights are such: plain tensors, which no optimiser updates.
    """
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def is_dealt_out(model: nn.Module) -> bool:
    """Whether a model's weights are DTensors, now or between its calls (FSDP2, tensor parallelism)."""
    return any(_is_fsdp(module) for module in model.modules()) or any(is_sharded(p) for p in model.parameters())


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
