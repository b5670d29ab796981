"""What every kernel asks of a tensor: whether it is sharded, the dtype that it is computed in, no autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave the surrounding ``torch.autocast`` regions inside the context: they would round vectors and sums."""
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Record no gradients inside the context, and leave surrounding inference mode and autocast regions.

    What is made under inference mode could neither be updated in place later nor be saved for a backward pass.
    """
    with torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (FSDP2, tensor parallel), replicated ones included."""
    # By name: importing torch.distributed.tensor takes a second.
    return type(tensor).__name__ == "DTensor"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of vectors and sums for weights of `dtype`: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_double(numbers: Tensor) -> Tensor:
    """Return numbers in fp64, where the device has it: for L norms it costs nothing, and their product keeps digits."""
    return numbers if numbers.device.type == "mps" else numbers.double()
