"""The kernels alone, on the device and on the host, beside a loop of cuBLAS calls, torch's peers and memory's floor."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch

from lightning_lip.bench.contenders.training import synchronise
from lightning_lip.bench.gpu.correctness import SHAPES as CHECKED
from lightning_lip.bench.gpu.measuring import DEVICE, DRY, Call, captured, device_times, host_time, record
from lightning_lip.bench.studies import kernels as study
from lightning_lip.bench.studies.kernels import MODELS, Shapes, kernel, parameters
from lightning_lip.kernels import iterations_for
from lightning_lip.kernels.gpu.tables import predicted_traffic

BLOCK_SIZES = (8,) if DRY else (1, 8)
DTYPES = ("float32",) if DRY else ("float32", "bfloat16")
LLAMA_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
SMALL = "MLP 13-20-20-20-1"
LARGE = {"24 x 2048^2": [(2048, 2048)] * 24, "8 blocks of Llama-7B": LLAMA_BLOCK * 8}
SHAPES: dict[str, Shapes] = {SMALL: MODELS[SMALL][:1]} if DRY else MODELS | LARGE
MAX_FLAT_BYTES = 4e9
"""Beyond this the floor's own copy of weights and gradients would not fit beside them."""


def warm() -> None:
    """Compile what the other steps launch, in parallel, into Triton's cache."""
    every = [(SHAPES[SMALL], "float32", 8)] if DRY else _variants()
    # Forked before this process has touched the device.
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool:
        record(compiled=sum(pool.map(_launch, *zip(*every, strict=True))))


def _variants() -> list[tuple[Shapes, str, int]]:
    """Return the shapes, dtypes and block sizes of all steps; a shape once: the tiles decide what is compiled."""
    groups = [(shapes, (1, 8)) for shapes in SHAPES.values()] + [(shapes, (1, 2, 8, 16)) for shapes in CHECKED.values()]
    return [(list(dict.fromkeys(shapes)), dtype, r) for shapes, sizes in groups for dtype in DTYPES for r in sizes]


def _launch(shapes: Shapes, dtype: str, r: int) -> int:
    torch.set_num_threads(1)
    kernel(parameters(shapes, DEVICE.type, getattr(torch, dtype)), r)()
    return 1


def step(name: str, dtype: str) -> None:
    """Time one step of all layers: the kernels, the iteration alone, the loop of cuBLAS calls, and the floor.

    The host's time is that of launching a call; the device's is that of a CUDA graph of it, replayed. `GBps` counts the
    bytes that the floor moves: one read of the weights, and one read and one write of the gradients.
    """
    weights = parameters(SHAPES[name], DEVICE.type, getattr(torch, dtype))
    n_bytes = sum(w.numel() * w.element_size() for w in weights)
    calls: dict[str, Call] = {"loop": study.python_loop(weights)}
    for r in BLOCK_SIZES:
        ((_, iteration),) = iterations_for([w.detach() for w in weights], study.start_blocks(weights, r))
        calls[f"kernels r={r}"] = kernel(weights, r)
        calls[f"iteration r={r}"] = lambda iteration=iteration: iteration.power_step(weights, 1)  # type: ignore[misc]
    if n_bytes < MAX_FLAT_BYTES:
        (flat,) = parameters([(1, sum(w.numel() for w in weights))], DEVICE.type, weights[0].dtype)
        calls |= {"floor": study.floor([flat]), "one read": flat.detach().sum}
    record(model=name, dtype=dtype, host_us={key: host_time(call) for key, call in calls.items()})
    times = device_times({key: captured(call) for key, call in calls.items()}, 3.0)
    moved = {key: n_bytes * (1 if key.startswith(("iteration", "one")) else 3) for key in times}
    rates = {key: round(moved[key] / us[1] / 1e3, 1) for key, us in times.items()}
    predicted = {r: predicted_traffic([w.detach() for w in weights], r)._asdict() for r in BLOCK_SIZES}
    record(model=name, dtype=dtype, n_bytes=n_bytes, device_us=times, GBps=rates, predicted=predicted)


def spectral_norm(name: str) -> None:
    """Time torch's parametrization, forward and backward."""
    call = study.torch_spectral_norm(SHAPES[name], DEVICE.type)
    record(model=name, host_us=host_time(call), device_us=device_times({"spectral_norm": call}, 1.0))


def compiled_loop(name: str, mode: str | None) -> None:
    """Time the loop of cuBLAS calls under torch.compile; a dry run traces it and compiles nothing."""
    loop = study.python_loop(parameters(SHAPES[name], DEVICE.type))
    call = torch.compile(loop, backend="eager") if DRY else torch.compile(loop, mode=mode)
    record(model=name, mode=mode, host_us=host_time(call), device_us=device_times({"compiled": call}, 1.0))


def by_kernel(name: str, dtype: str) -> None:
    """Record the microseconds a step in each kernel on the device, by torch's profiler."""
    activity = torch.profiler.ProfilerActivity
    for r in BLOCK_SIZES:
        call, n_steps = kernel(parameters(SHAPES[name], DEVICE.type, getattr(torch, dtype)), r), 1 if DRY else 10
        call()
        synchronise(DEVICE)
        with torch.profiler.profile(activities=[activity.CPU if DRY else activity.CUDA]) as profile:
            for _ in range(n_steps):
                call()
            synchronise(DEVICE)
        times = {e.key[:40]: e.self_device_time_total / n_steps for e in profile.key_averages()}
        record(model=name, dtype=dtype, r=r, us={key: round(us, 2) for key, us in times.items() if us})
