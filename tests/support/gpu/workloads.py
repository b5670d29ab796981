"""What tests/kernels/gpu/test_ptx.py runs, and every kernel that this asks for.

The list of kernels lets one test decode all of them: an instruction that the executor does not know fails that test and
names itself there. A test that would execute such a kernel is skipped, and only then: its kernel must be on the list.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import triton

from lightning_lip.kernels.gpu import tables as gpu_tables
from support.iterations import penalise
from support.truth import blocks, orthonormal_columns

from . import launch, ptx_grammar

DECODING = "test_every_instruction_is_known"
"""The test that fails when the tests that execute are skipped."""


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0] + shape[-1])).to(dtype)


CASES = {
    # Several tiles in one launch, both orientations, ragged heights.
    "fp32": [random(20, 20), random(131, 64), random(33, 300)],
    "bf16": [random(*s, dtype=torch.bfloat16) for s in [(24, 24), (131, 64), (40, 304)]],
    "fp16": [random(24, 24, dtype=torch.float16), random(40, 304, dtype=torch.float16)],
    "unaligned": [random(20, 13), random(1, 1), random(1, 17), random(9, 1)],
    "transposed": [random(44, 20).t(), random(20, 44).t()],
    "row_strided": [random(60, 48)[::2, 4:40], random(96, 64)[::2, 8:40]],
    "mixed_alignment": [random(20, 20), random(21, 13)],
}  # fmt: skip
PENALTY_STEPS = [
    *[("fp32", 1), ("fp32", 8), ("bf16", 1), ("bf16", 8), ("fp16", 8), ("unaligned", 1), ("unaligned", 8)],
    *[("transposed", 8), ("row_strided", 8), ("row_strided", 1), ("mixed_alignment", 2)],
]
"""(case, block size)"""
READ_ONCE = [
    (1, (6, 8192), 8192, torch.float32),
    (1, (3, 16384), 16384, torch.float32),
    (1, (6, 8192), 8192, torch.bfloat16),
    (1, (8192, 12), 8192, torch.float32),
    (1, (8192, 16), 8192, torch.bfloat16),
    (8, (20, 2048), 2048, torch.float32),
    (8, (20, 2048), 2048, torch.bfloat16),
    (8, (2048, 16), 2048, torch.float32),
    (8, (2048, 16), 2048, torch.bfloat16),
    (16, (20, 1024), 1024, torch.float32),
]
"""(block size, shape, the side of the block, dtype)"""
READ_TWICE = [
    (8, (20, 4096), 4096, torch.float32),
    (8, (4096, 20), 4096, torch.float32),
    (8, (20, 4096), 4096, torch.bfloat16),
    (1, (10, 17000), 17000, torch.float32),
    (1, (9216, 12), 9216, torch.float32),
]
PLANTED = {
    "barrier": ([random(64, 64)], 8, {}),
    "alignment of the sweep": ([random(20, 13)], 8, {"hints": {"sweep": {"ALIGNED": True}}}),
    "alignment of the update": ([random(20, 13)], 1, {"hints": {"rank_one": {"ALIGNED": True}}}),
    "mask": ([random(131, 64)], 8, {}),
    "race": ([random(400, 16)], 8, {}),
}
"""{fault: (weights, block size, options of the machine)}"""


class Machine(launch.Machine):
    """A machine that skips the test whose kernel has instructions that :data:`DECODING` names.

    Args:
        requests: A list that takes the launches, none of which is then executed.
        options: As for :class:`support.gpu.launch.Machine`.
    """

    def __init__(self, requests=None, **options):
        super().__init__(**options)
        self.requests = requests

    def _run(self, kernel, request, grid, arguments):
        if self.requests is None:
            super()._run(kernel, request, grid, arguments)
        else:
            self.requests.append(request)

    def _decoded(self, request):
        try:
            return super()._decoded(request)
        except ptx_grammar.UnknownInstructionsError:
            if request not in all_requests():
                raise
            pytest.skip(f"the PTX of {request.name} has instructions that are not known: {DECODING} fails, names them")


def penalised(weights, size, **options):
    """Run a whole penalty step on the executor; returns the object, its memory's books and the gradients."""
    machine = Machine(**options)
    iteration = launch.HostIteration(weights, blocks(weights, size), machine)
    grads = [torch.ones_like(w) for w in weights]
    for index, grad in enumerate(grads):
        machine.memory.add(f"grad{index}", grad)
    penalise(iteration, weights, grads, "softplus_log", level=1.6, scale=0.3)
    return iteration, machine.memory, grads


def swept(weight, size, p, monkeypatch, **options):
    """Sweep a matrix whose block is on the side of `p`, even if that is the longer one: wide tiles, few bytes.

    Returns:
        The object, its memory's books, the tile and the rows that the sweep began with.
    """
    n_cols = weight.shape[1]
    sides = list(zip(weight.shape, weight.stride(), strict=True))
    (q, q_stride), (_, p_stride) = sides if p == n_cols else sides[::-1]
    block = gpu_tables.block_class([size])
    orientation = gpu_tables.ORIENT_P if p_stride == 1 else gpu_tables.ORIENT_Q
    tile = gpu_tables.choose_tile(p, block, weight.element_size(), orientation)
    layer = gpu_tables.Layer(q, p, q_stride, p_stride, True, tile)
    monkeypatch.setattr(gpu_tables, "describe", lambda weight, block: layer)
    monkeypatch.setattr(gpu_tables, "DEFAULT_PROCESSORS", 1)
    machine = Machine(**options)
    rows = orthonormal_columns(p, min(size, *weight.shape)).float().T.contiguous()
    iteration = launch.HostIteration([weight], [rows], machine)
    iteration.power_step([weight], 1)
    return iteration, machine.memory, tile, rows


def ritz_values(weights, size, **options):
    """Run no iteration, for the Ritz values alone; returns the result and the memory's books."""
    machine = Machine(**options)
    iteration = launch.HostIteration(weights, blocks(weights, size), machine)
    return iteration.power_step(weights, 0), machine.memory


@cache
def all_requests():
    """Return every kernel that the workloads of this file launch; nothing is compiled or executed."""
    found = []
    for name, size in PENALTY_STEPS:
        penalised(CASES[name], size, requests=found)
    for weights, size, options in PLANTED.values():
        penalised(weights, size, requests=found, **options)
    ritz_values(CASES["fp32"], 8, requests=found)
    for size, shape, p, dtype in READ_ONCE + READ_TWICE:
        with pytest.MonkeyPatch.context() as monkeypatch:
            swept(random(*shape, dtype=dtype), size, p, monkeypatch, requests=found)
    return dict.fromkeys(found)


def unknown_instructions():
    """Decode every kernel of :func:`all_requests`; returns a line for each unknown spelling in each kernel."""
    lines = {}
    for request in all_requests():
        try:
            launch.decoded(request)
        except ptx_grammar.UnknownInstructionsError as error:
            for text, what in error.found:
                lines.setdefault((request.name, what), (text, []))[1].append(request.target)
    return [
        f"{name}: {what} in {text!r} ({len(targets)} variants for {', '.join(sorted(set(targets)))}, "
        f"Triton {triton.__version__})"
        for (name, what), (text, targets) in lines.items()
    ]
