"""The tables of the GPU backend and its refusals; nothing here compiles or needs a GPU."""

import subprocess
import sys

import pytest
import torch

from lightning_lip.kernels.gpu import iteration as gpu
from lightning_lip.kernels.gpu import tables


@pytest.mark.parametrize(
    ("weight", "aligned", "orientation"),
    [
        (torch.empty(24, 16), True, tables.ORIENT_P),
        (torch.empty(16, 24), True, tables.ORIENT_Q),
        (torch.empty(16, 24).t(), True, tables.ORIENT_Q),
        (torch.empty(20, 13), False, tables.ORIENT_P),
        (torch.empty(20, 14, dtype=torch.bfloat16), False, tables.ORIENT_P),
        (torch.empty(40, 48)[::2, ::3], False, tables.ORIENT_NONE),
        (torch.empty(40, 16)[:, 2:14], False, tables.ORIENT_P),
        (torch.empty(9, 1), False, tables.ORIENT_Q),
    ],
)
def test_describe(weight, aligned, orientation):
    layer = tables.describe(weight, 8)
    assert (layer.q, layer.p) == (max(weight.shape), min(weight.shape))
    assert layer.aligned == aligned
    assert layer.tile.orientation == orientation


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_one_pass_reaches_as_far_as_promised(block, itemsize):
    for p in (1, 31, 33, 1000, 2048, 4096, 8192, 16384):
        tile = tables.choose_tile(p, block, itemsize, tables.ORIENT_P)
        assert tile.two_pass == (block * p > 16384 and p > 32)
        assert tile.two_pass or tile.width >= p
    assert not tables.choose_tile(8192, 1, itemsize, tables.ORIENT_Q).two_pass
    assert not tables.choose_tile(min(4096, 16384 // block), block, itemsize, tables.ORIENT_Q).two_pass


def test_strips_and_tasks_cover_every_row_once():
    weights = [torch.empty(1000, 13), torch.empty(24, 700), torch.empty(1, 1), torch.empty(300, 300)]
    layers = [tables.describe(w, 8) for w in weights]
    plan = tables.Plan(layers, [8, 8, 1, 8], 4, 16)
    for number, layer in enumerate(layers):
        strips = plan.strips[plan.strips[:, 0] == number]
        rows = torch.cat([torch.arange(a, b) for a, b in strips[:, 1:3].tolist()])
        assert torch.equal(rows, torch.arange(layer.q))
        assert strips[:, 3].tolist() == list(range(int(plan.table[number, 9]), int(plan.table[number, 10])))
        assert all(begin % layer.tile.height == 0 for begin in strips[:, 1].tolist())
    kinds = plan.tasks[:, 2]
    assert kinds[: plan.n_short_tasks].sum() == 0
    assert kinds[plan.n_short_tasks :].min() == 1


def test_predicted_traffic():
    weights = [torch.empty(4096, 4096, device="meta") for _ in range(4)]
    n_bytes = 4 * 4096 * 4096 * 4
    one = tables.predicted_traffic(weights, 1)
    assert one[:3] == (n_bytes, n_bytes, n_bytes)
    assert one.scratch < n_bytes / 20
    # r p = 32768 takes two passes.
    assert tables.predicted_traffic(weights, 8).weights == 2 * n_bytes
    halves = [w.to(torch.bfloat16) for w in weights]
    assert tables.predicted_traffic(halves, 1).weights == n_bytes // 2
    with pytest.raises(ValueError, match="between 1 and 16"):
        tables.predicted_traffic(weights, 17)
    with pytest.raises(ValueError, match="one dtype"):
        tables.predicted_traffic([weights[0], halves[0]], 1)


def test_why_not(monkeypatch):
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "3.3.0")  # an older one is refused first
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "not on a CUDA device" in gpu.GpuIteration.why_not(torch.ones(3, 3), 1)
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    assert gpu.GpuIteration.why_not(torch.ones(20, 20), 8) is None
    assert "float64" in gpu.GpuIteration.why_not(torch.ones(3, 3).double(), 1)
    assert "shape (3,)" in gpu.GpuIteration.why_not(torch.ones(3), 1)
    assert "shape (0, 3)" in gpu.GpuIteration.why_not(torch.ones(0, 3), 1)
    assert "sparse" in gpu.GpuIteration.why_not(torch.ones(3, 3).to_sparse(), 1)
    assert "1 to 16" in gpu.GpuIteration.why_not(torch.ones(20, 20), 17)
    # A block is never larger than the shorter side.
    assert gpu.GpuIteration.why_not(torch.ones(3, 20), 17) is None
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in gpu.GpuIteration.why_not(torch.ones(3, 3), 1)


def test_an_object_refuses_what_it_cannot_serve(monkeypatch):
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "3.3.0")  # an older one is refused first
    with pytest.raises(ValueError, match="cannot serve a weight of shape"):
        gpu.GpuIteration([torch.ones(3, 3)], [torch.eye(3)])
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    with pytest.raises(ValueError, match="one dtype on one device"):
        gpu.GpuIteration([torch.ones(3, 3), torch.ones(3, 3).half()], [torch.eye(3)] * 2)


def test_importing_the_backend_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import lightning_lip.kernels.gpu.iteration"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_an_old_triton_is_a_reason(monkeypatch):
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "3.2.0")
    reason = gpu.GpuIteration.why_not(torch.ones(3, 3), 1)
    assert reason == "Triton 3.3 is needed (it comes with PyTorch 2.7), found 3.2.0"
