"""Bytes of torch's tensors that a training needs, at its peak and between its steps."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MEMORY_EVENT = "[memory]"
"""Name in torch's trace of an allocation, or of a release as a negative one."""


class Memory(NamedTuple):
    """Bytes above those from before: the largest number at any time, and those still held at the end."""

    peak: int
    held: int


def memory_of(work: Callable[[], object], device: torch.device) -> Memory:
    """Run `work` and return what it allocated through torch: *exact* for tensors; other memory is not counted.

    On the CPU by torch's profiler, which sees every allocation and release of tensors; on CUDA by the allocator's own
    counters. What `work` returns counts as held.
    """
    # Objects from before are left out of the garbage collections inside, which then take no time.
    gc.freeze()
    try:
        return _on_cuda(work, device) if device.type == "cuda" else _on_cpu(work)
    finally:
        gc.unfreeze()


def _on_cuda(work: Callable[[], object], device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = work()
    gc.collect()
    torch.cuda.synchronize(device)
    peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    del kept
    return Memory(peak - before, held - before)


def _on_cpu(work: Callable[[], object]) -> Memory:
    # The profiler's library reads this at its first use, and else reports each start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
        gc.collect()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == MEMORY_EVENT)
    peak = held = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return Memory(peak, held)
