"""Tier 3 of the proof without a GPU: Triton's PTX, run on host memory, with the bytes it asks for.

The executor also holds every launch to: no misaligned or out-of-bounds access, no race within a program or between
programs, no divergent barrier (tests/support/gpu/ptx.py).
"""

import os

import pytest
import torch

pytest.importorskip("triton", minversion="3.3")

from support.gpu import launch, ptx

from lightning_lip.kernels import reference
from lightning_lip.kernels.gpu import iteration as gpu
from lightning_lip.kernels.gpu import tables as gpu_tables

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing can be compiled ahead of time under the interpreter", allow_module_level=True)

SIGMA = 2e-6
ORTHONORMAL = 1e-6


def blocks(weights, size, sides=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = sides or [min(w.shape) for w in weights]
    drawn = [
        torch.randn(side, min(size, *w.shape), generator=generator) for w, side in zip(weights, sides, strict=True)
    ]
    return [torch.linalg.qr(x).Q.mT.contiguous() for x in drawn]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + shape[0] + shape[-1])).to(dtype)


def penalised(weights, size, **options):
    """Run a whole penalty step on the executor; returns the object, its memory's books and the gradients."""
    machine = launch.Machine(**options)
    iteration = launch.HostIteration(weights, blocks(weights, size), machine)
    grads = [torch.ones_like(w) for w in weights]
    for index, grad in enumerate(grads):
        machine.memory.add(f"grad{index}", grad)
    iteration.penalise_(
        weights, grads, n_iterations=1, code=1, target_log=0.5, scale=0.3, multiplicities=[1] * len(weights)
    )
    return iteration, machine.memory, grads


def n_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


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


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[("fp32", 1), ("fp32", 8), ("bf16", 1), ("bf16", 8), ("fp16", 8), ("unaligned", 1), ("unaligned", 8)],
        *[("transposed", 8), ("row_strided", 8), ("row_strided", 1), ("mixed_alignment", 2)],
    ],
)
def test_numbers_and_traffic(name, size):
    weights = CASES[name]
    start = blocks(weights, size)
    iteration, memory, grads = penalised(weights, size)
    want = reference.power_step([w.double() for w in weights], [v.double() for v in start], 1)
    torch.testing.assert_close(iteration._sigma.double(), want.sigma, rtol=SIGMA, atol=0)
    for rows in iteration.vectors:
        assert (rows @ rows.mT - torch.eye(len(rows))).abs().max() <= ORTHONORMAL
    c = iteration._factors.double()
    for index, grad in enumerate(grads):
        update = c[index] * torch.outer(want.left[index], want.right[index])
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad.double(), 1 + update, rtol=eps, atol=float(c[index]) * 5e-6)
    traffic = gpu_tables.predicted_traffic(weights, size)
    assert memory.total("weight") == (n_bytes(weights), 0)
    assert memory.total("grad") == (n_bytes(grads), n_bytes(grads))
    assert traffic[:3] == (n_bytes(weights), n_bytes(grads), n_bytes(grads))
    assert max(region.furthest_reread for region in memory.regions) == 0


def swept(weight, size, p, monkeypatch, **options):
    """Sweep a matrix whose block is on the side of `p`, even if that is the longer one: wide tiles, few bytes."""
    n_cols = weight.shape[1]
    sides = list(zip(weight.shape, weight.stride(), strict=True))
    (q, q_stride), (_, p_stride) = sides if p == n_cols else sides[::-1]
    block = gpu_tables.block_class([size])
    orientation = gpu_tables.ORIENT_P if p_stride == 1 else gpu_tables.ORIENT_Q
    tile = gpu_tables.choose_tile(p, block, weight.element_size(), orientation)
    layer = gpu_tables.Layer(q, p, q_stride, p_stride, True, tile)
    monkeypatch.setattr(gpu, "describe", lambda weight, block: layer)
    monkeypatch.setattr(gpu, "DEFAULT_PROCESSORS", 1)
    machine = launch.Machine(**options)
    (rows,) = blocks([weight], size, [p])
    iteration = launch.HostIteration([weight], [rows], machine)
    iteration.power_step([weight], 1)
    a = weight.double() if p == n_cols else weight.double().t()
    images = rows.double() @ a.t()
    vector = torch.linalg.eigh(images @ images.t()).eigenvectors[:, -1]
    t = vector @ images
    truth = (t @ a).norm() / t.norm()
    torch.testing.assert_close(iteration._sigma[0].double(), truth, rtol=SIGMA, atol=0)
    return (
        tile,
        machine.memory.total("weight")[0] / n_bytes([weight]),
        max(r.furthest_reread for r in machine.memory.regions),
    )


@pytest.mark.parametrize(
    ("size", "shape", "p", "dtype"),
    [
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
    ],
    ids=str,
)
def test_weights_are_read_once_up_to_the_limit(monkeypatch, size, shape, p, dtype):
    tile, ratio, distance = swept(random(*shape, dtype=dtype), size, p, monkeypatch)
    assert not tile.two_pass
    assert ratio == 1.0
    assert distance == 0


@pytest.mark.parametrize(
    ("size", "shape", "p", "dtype"),
    [
        (8, (20, 4096), 4096, torch.float32),
        (8, (4096, 20), 4096, torch.float32),
        (8, (20, 4096), 4096, torch.bfloat16),
        (1, (10, 17000), 17000, torch.float32),
        (1, (9216, 12), 9216, torch.float32),
    ],
    ids=str,
)
def test_wider_weights_are_read_twice_in_a_row(monkeypatch, size, shape, p, dtype):
    tile, ratio, distance = swept(random(*shape, dtype=dtype), size, p, monkeypatch)
    assert tile.two_pass
    assert ratio == 2.0
    # The second read of a row block follows on the first: 8 rows of p elements later, and never more.
    assert 0 < distance <= gpu_tables.TWO_PASS_ROWS * p * dtype.itemsize


@pytest.mark.parametrize("size", [1, 8])
def test_results_do_not_depend_on_the_order_of_programs(size):
    weights = CASES["fp32"]
    (first, _, grads), (second, _, others) = (penalised(weights, size, backwards=b) for b in (False, True))
    assert torch.equal(first._sigma, second._sigma)
    assert all(torch.equal(a, b) for a, b in zip(first.vectors, second.vectors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_no_iteration_reads_the_weights_once():
    weights = CASES["fp32"]
    machine = launch.Machine()
    iteration = launch.HostIteration(weights, blocks(weights, 8), machine)
    got = iteration.power_step(weights, 0)
    want = reference.power_step([w.double() for w in weights], [v.double() for v in blocks(weights, 8)], 0)
    torch.testing.assert_close(got.sigma.double(), want.sigma, rtol=SIGMA, atol=0)
    assert machine.memory.total("weight")[0] == n_bytes(weights)


# Planted faults: the executor must see each of them.


def without_barrier(number):
    def edit(name, text):
        if name != "sweep":
            return text
        pieces = text.split("bar.sync")
        assert len(pieces) > number + 1
        return "bar.sync".join(pieces[: number + 1]) + "// dropped" + "bar.sync".join(pieces[number + 1 :])

    return edit


def test_a_dropped_barrier_is_caught():
    text = []
    penalised([random(64, 64)], 8, edit=lambda name, ptx_text: text.append((name, ptx_text)) or ptx_text)
    n_barriers = dict(text)["sweep"].count("bar.sync")
    caught = 0
    for number in range(n_barriers):
        try:
            penalised([random(64, 64)], 8, edit=without_barrier(number), stop_after="sweep")
        except ptx.ExecutionError as error:
            assert "without a barrier" in str(error)  # noqa: PT017
            caught += 1
        except launch.Stop:
            pass
    # Triton emits some barriers that another one makes superfluous; most must be needed.
    assert caught > n_barriers / 2


def test_a_false_alignment_hint_is_caught():
    with pytest.raises(ptx.ExecutionError, match="misaligned 16-byte"):
        penalised([random(20, 13)], 8, hints={"sweep": {"ALIGNED": True}})
    with pytest.raises(ptx.ExecutionError, match="misaligned 16-byte"):
        penalised([random(20, 13)], 1, hints={"rank_one": {"ALIGNED": True}})


def test_a_wrong_mask_is_caught(tmp_path):
    # The last row of the last strip would come from behind the weight.
    old = "mask = (rows < i1)[:, :, None] & (cols < p)[None, None, :]"
    with pytest.raises(ptx.ExecutionError, match="out-of-bounds"):
        penalised([random(131, 64)], 8, source=(tmp_path, old, old.replace("rows < i1", "rows < i1 + 1")))


def test_a_second_read_of_the_weights_is_counted():
    def edit(name, text):
        lines = text.splitlines(keepends=True)
        twice = [
            line * 2 if name == "sweep" and "evict_first" in line and " ld.global" in line else line for line in lines
        ]
        return "".join(twice)

    weights = [random(64, 64)]
    _, memory, _ = penalised(weights, 8, edit=edit)
    assert memory.total("weight")[0] == 2 * n_bytes(weights)
    assert max(region.furthest_reread for region in memory.regions) > 0


def test_a_race_between_programs_is_caught(tmp_path):
    # All strips would write the partial sum of the first.
    old = "local = (index - tl.load(row + STRIP_BEGIN)) * R * ld"
    with pytest.raises(ptx.ExecutionError, match="one program of a launch and written by another"):
        penalised([random(400, 16)], 8, source=(tmp_path, old, "local = (index - index) * R * ld"))


def test_an_unknown_instruction_is_refused():
    with pytest.raises(NotImplementedError, match="frobnicate"):
        ptx.Program(".entry k()\n.reqntid 32\n{\nfrobnicate.b32 %r1, %r2;\n}\n", 0)
