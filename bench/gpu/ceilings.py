"""The machine, and what its memory and its matrix units give at best."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import partial

import torch

from lightning_lip.bench.gpu.measuring import DEVICE, DRY, device_times, record

PACKAGES = ("torch", "triton", "lightning", "numba", "numpy", "torchmetrics", "jsonargparse", "mpmath", "scipy")


def about() -> None:
    """Record the versions and the GPU."""
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    record(python=platform.python_version(), **found)
    if not DRY:
        record(gpu=str(torch.cuda.get_device_properties(DEVICE)))
        shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        record(smi=shown.stdout[:1500])


def memory() -> None:
    """Record the GB/s of a copy, of reading alone, and of reading and writing in place, from cache to main memory."""
    for n_bytes in (2**22,) if DRY else (2**22, 2**25, 2**28, 2**30):
        source, target = (torch.ones(n_bytes // 4, device=DEVICE) for _ in range(2))
        copy, touch = partial(target.copy_, source), partial(source.add_, 1e-9)
        times = device_times({"copy": copy, "read": source.sum, "read and write": touch}, 0.4)
        moved = {"copy": 2 * n_bytes, "read": n_bytes, "read and write": 2 * n_bytes}
        record(n_bytes=n_bytes, GBps={name: round(moved[name] / us[1] / 1e3, 1) for name, us in times.items()})


def matrix_product() -> None:
    """Record the TFLOP/s of a product of two square matrices in bf16."""
    n = 256 if DRY else 8192
    matrix = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    us = device_times({"product": lambda: matrix @ matrix}, 0.4)["product"][1]
    record(n=n, bf16_TFLOPs=round(2 * n**3 / us / 1e6, 3))
