"""What the steps of a visit share: the device, the file of results, and the clocks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lightning_lip.bench.contenders.training import synchronise
from lightning_lip.bench.steps.measure import percentiles

DRY = os.environ.get("DEV") == "cpu"
"""Whether this is a dry run: the CPU, Triton's interpreter, the smallest sizes, as few calls as can be."""

DEVICE = torch.device("cpu" if DRY else "cuda")

SIZES = (13, 1) if DRY else (13, 20, 20, 20, 1)
"""Of the paper's network; in a dry run of a single layer."""

Call = Callable[[], object]


def out() -> Path:
    """Return the folder of the results, $OUT."""
    return Path(os.environ.get("OUT", "."))


def record(**fields: object) -> None:
    """Append a line to results.jsonl, with the name of the step that runs in this process, and print it."""
    line = json.dumps({"step": os.environ.get("VISIT_STEP", ""), **fields}, default=str)
    with (out() / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line[:500], flush=True)


def device_times(calls: Mapping[str, Call], seconds: float) -> dict[str, tuple[float, ...]]:
    """Return the microseconds of a call on the device: p20, p50 and p80.

    Args:
        calls: What is timed, in turn, by name.
        seconds: How long all of it goes on, about; a dry run takes one sample of each.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, min(20, int(2e-3 / _seconds(call))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + (0 if DRY else seconds)
    while not all(samples.values()) or time.perf_counter() < end:
        for name, call in calls.items():
            samples[name].append(1e6 * _seconds(call, repeats[name]))
    return {name: tuple(round(us, 2) for us in percentiles(values)) for name, values in samples.items()}


def _seconds(call: Call, repeats: int = 1) -> float:
    """Return the seconds of one of several calls: between two events on a GPU, by the clock in a dry run."""
    if DRY:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(repeats):
        call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / repeats / 1e3


def host_time(call: Call) -> float:
    """Return the median microseconds that the host needs to launch a call on an idle device, without waiting for it."""
    call()
    times = []
    for _ in range(1 if DRY else 30):
        synchronise(DEVICE)
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    synchronise(DEVICE)
    return round(percentiles(times)[1], 1)


def captured(call: Call) -> Call:
    """Return the replay of a CUDA graph of a call; in a dry run the call itself."""
    if DRY:
        return call
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
