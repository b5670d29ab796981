"""The GPU kernels on a GPU; skipped where there is none. No machine that built this project had one."""

import importlib.util
import math

import pytest
import torch
from support.iterations import penalise
from support.truth import blocks

from lightning_lip.bench.gpu.measuring import captured
from lightning_lip.kernels import reference
from lightning_lip.kernels.gpu.iteration import GpuIteration

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

SHAPES = [(1, 1), (1, 17), (20, 13), (20, 20), (257, 1000), (1024, 1024), (64, 4096)]
OPTIONS = {"penalty": "softplus_log", "scale": 0.1}


def layers(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) / math.sqrt(max(shape))).to("cuda", dtype) for shape in SHAPES]


@pytest.mark.parametrize("size", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_reference(dtype, size):
    weights = layers(dtype)
    start = blocks(weights, size)
    got = GpuIteration(weights, start).power_step(weights, 2)
    want = reference.power_step([w.double() for w in weights], [v.double() for v in start], 2)
    torch.testing.assert_close(got.sigma.double(), want.sigma, rtol=2e-6, atol=0)
    for rows in got.vectors:
        assert (rows @ rows.mT - torch.eye(len(rows), device="cuda")).abs().max() <= 1e-5


def test_nothing_waits_for_the_gpu():
    weights = layers()
    iteration = GpuIteration(weights, blocks(weights, 8))
    grads = [torch.zeros_like(w) for w in weights]
    penalise(iteration, weights, grads, **OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # New gradients too: their addresses are copied without waiting.
        penalise(iteration, weights, [torch.zeros_like(w) for w in weights], **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_bit_for_bit():
    weights = layers()
    runs = []
    for _ in range(2):
        iteration = GpuIteration(weights, blocks(weights, 8))
        grads = [torch.zeros_like(w) for w in weights]
        for _ in range(5):
            penalise(iteration, weights, grads, **OPTIONS)
        runs.append([*iteration.vectors, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_cuda_graph_replays_the_step():
    weights = layers()
    eager, graphed = (GpuIteration(weights, blocks(weights, 8)) for _ in range(2))
    grads = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    replay = captured(lambda: penalise(graphed, weights, grads[1], **OPTIONS))
    for _ in range(3):
        replay()
    # The warm-up before a capture makes three steps; the capture itself makes none.
    for _ in range(6):
        penalise(eager, weights, grads[0], **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_capture_refuses_new_gradients():
    weights = layers()
    iteration = GpuIteration(weights, blocks(weights, 2))
    penalise(iteration, weights, [torch.zeros_like(w) for w in weights], **OPTIONS)
    graph = torch.cuda.CUDAGraph()
    fresh = [torch.zeros_like(w) for w in weights]
    with pytest.raises(RuntimeError, match="set_to_none=False"), torch.cuda.graph(graph):
        penalise(iteration, weights, fresh, **OPTIONS)
