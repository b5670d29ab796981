"""What every kernel asks of a tensor: whether it is sharded, the dtype that it is computed in, no autocast, no TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Leave the surrounding ``torch.autocast`` regions inside the context: they would round vectors and sums."""
    active = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind)]
    if not active:
        yield
        return
    with contextlib.ExitStack() as stack:
        for kind in active:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Record no gradients inside the context, and leave surrounding inference mode and autocast regions.

    What is made under inference mode could neither be updated in place later nor be saved for a backward pass.
    """
    with without_autocast():
        # Each further context costs microseconds, which count in a step of small layers.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                yield
        else:
            with torch.no_grad():
                yield


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Compute fp32 products in fp32 inside the context, where TF32 (GPU) or bf16 (CPU) is allowed for them.

    For forward and backward passes: torch.export reads the older switches, which raise once the newer ones are set.
    """
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        # Not the older switches: where a program has set the newer ones they raise.
        cpu = backends.mkldnn
        places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn]
        kept = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, kept, strict=True):
                # What a wider setting gives it follows that one again.
                place.fp32_precision = "none"
                if place.fp32_precision != precision:
                    place.fp32_precision = precision
        return
    precision, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        backends.cudnn.allow_tf32 = convolutions


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
