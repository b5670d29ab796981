"""The kernels and GpuIteration under Triton's interpreter; run by tests/kernels/gpu/test_interpreter.py in its own
process.

With TRITON_INTERPRET=1 the kernels run in NumPy on CPU tensors. It is set before Triton is imported, and then nothing
can be compiled ahead of time: hence the process.
"""

import math

import pytest
import torch
from support import truth
from support.gpu import planted
from support.iterations import check_a_product_beyond_fp32, penalise
from support.truth import blocks, largest_singular_value, matrix_of, orthonormal_columns

from lightning_lip import LipschitzRegularizer
from lightning_lip.kernels import reference
from lightning_lip.kernels.gpu import iteration as gpu
from lightning_lip.kernels.penalties import LARGEST_KNEE, PENALTY_CODES
from lightning_lip.penalty import penalties

# Relative to the largest entry. fp32 sums over at most a few thousand products, taken twice: 2e-6 holds sigma, its
# vectors are as exact as the gap allows (the matrices here have ratios of at most 0.9 in sigma).
SIGMA = 2e-6
VECTORS = 5e-6
ORTHONORMAL = 1e-6
# A row of the block is as exact as fp32 sums of the size of the largest Ritz value, 1/50 of which is the smallest.
SPAN = 5e-5
SHAPES = [(1, 1), (1, 17), (23, 1), (20, 13), (20, 20), (63, 65), (257, 100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = truth.LAYOUTS | {
    "unaligned": lambda w: w.new_zeros(w.numel() + 1)[1:].view(w.shape).copy_(w),
    "strided_both": lambda w: w.new_zeros(2 * w.shape[0], 3 * w.shape[1])[::2, ::3].copy_(w),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def matrix(m, n, top=1.0, ratio=0.9, seed=0):
    """A matrix with singular values top, top * ratio, .. (at least top / 7), so that every gap is known."""
    return matrix_of(m, n, [top * max(ratio**k, 1 / 7) for k in range(min(m, n))], seed + 1000 * m + n)


def poisoned(weights, vectors):
    """An object whose buffers hold NaN wherever a step must write before it reads."""
    iteration = gpu.GpuIteration(weights, vectors)
    names = ("partials", "scales", "layer_scales", "sigma", "grams", "rotations", "scalars", "factors")
    for name in (*names, "images", "rows_z", "rows_y", "singular"):
        getattr(iteration, f"_{name}").fill_(math.nan)
    return iteration


def expected(weights, vectors, n_iterations):
    return reference.power_step([w.double() for w in weights], [v.double() for v in vectors], n_iterations)


def assert_orthonormal(rows):
    assert (rows @ rows.mT - torch.eye(len(rows))).abs().max() <= ORTHONORMAL


def assert_step_equals_the_reference(weights, block, n_iterations=1):
    """Check a step against float64; returns the iteration."""
    vectors = blocks(weights, block)
    iteration = poisoned(weights, vectors)
    assert_same(iteration.power_step(weights, n_iterations), expected(weights, vectors, n_iterations))
    return iteration


def assert_same(got, want, span=SPAN):
    assert got.sigma.dtype == torch.float32
    torch.testing.assert_close(got.sigma.double(), want.sigma, rtol=SIGMA, atol=0)
    for index in range(len(want.left)):
        have = torch.outer(got.left[index], got.right[index]).double()
        should = torch.outer(want.left[index], want.right[index])
        assert (have - should).norm() <= VECTORS, index
        block, other = got.vectors[index].double(), want.vectors[index]
        assert_orthonormal(block)
        assert (block.mT @ block - other.mT @ other).norm() <= span, index


@pytest.mark.parametrize("block", [1, 2, 3, 8, 16])
def test_one_step_equals_the_reference_in_float64(block):
    assert_step_equals_the_reference([matrix(*shape).float() for shape in SHAPES], block)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "block"), [*((d, 8) for d in DTYPES), (torch.float32, 1)], ids=str)
def test_every_dtype_and_layout(layout, dtype, block):
    # 24 x 32 is a multiple of all vector widths, so its contiguous and row-strided forms go the aligned way.
    weights = [LAYOUTS[layout](matrix(*shape).to(dtype)) for shape in [(24, 32), (32, 24), (20, 13), (1, 9)]]
    iteration = assert_step_equals_the_reference(weights, block)
    assert (iteration._plan.n_aligned_strips > 0) == (layout not in ("unaligned", "strided_both"))


@pytest.mark.parametrize("block", [1, 8])
def test_no_iteration_gives_ritz_values_and_keeps_the_block(block):
    weights = [matrix(*shape).float() for shape in SHAPES]
    vectors = blocks(weights, block)
    iteration = poisoned(weights, vectors)
    assert_same(iteration.power_step(weights, 0), expected(weights, vectors, 0), span=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(iteration.vectors, vectors, strict=True))


def test_ten_steps_reach_the_spectral_norm():
    weights = [matrix(40, 30, top=3.0).float(), matrix(17, 90, top=0.2).float()]
    iteration = gpu.GpuIteration(weights, blocks(weights, 4))
    for _ in range(10):
        got = iteration.power_step(weights, 1)
    truth = torch.stack([largest_singular_value(w) for w in weights])
    torch.testing.assert_close(got.sigma.double(), truth, rtol=SIGMA, atol=0)


@pytest.mark.parametrize("orientation", ["rows", "columns"])
@pytest.mark.parametrize("block", [1, 8])
def test_wide_layers_in_two_passes(monkeypatch, orientation, block):
    # The limit is lowered so that a small layer goes this way, with several column tiles and row blocks.
    monkeypatch.setattr("lightning_lip.kernels.gpu.tables.LIMIT", 64)
    monkeypatch.setattr("lightning_lip.kernels.gpu.tables.TWO_PASS_COLUMNS", 64)
    weights = [matrix(170, 150).float() if orientation == "rows" else matrix(150, 172).float()]
    iteration = assert_step_equals_the_reference(weights, block)
    assert iteration._plan.layers[0].tile.two_pass


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale, block):
    weights = [matrix(60, 40, top=scale).float(), matrix(30, 33, top=scale).float()]
    assert_step_equals_the_reference(weights, block, 2)


@pytest.mark.parametrize("block", [1, 4, 8])
def test_zero_weights_keep_their_block(block):
    weights = [torch.zeros(12, 20), matrix(12, 20).float(), torch.zeros(1, 1)]
    vectors = blocks(weights, block)
    iteration = poisoned(weights, vectors)
    got = iteration.power_step(weights, 1)
    want = expected(weights, vectors, 1)
    assert got.sigma[0] == 0
    assert got.sigma[2] == 0
    torch.testing.assert_close(got.sigma.double(), want.sigma, rtol=SIGMA, atol=0)
    assert torch.equal(got.right[0], torch.zeros(20))
    assert torch.equal(got.left[0], vectors[0][0])
    assert torch.equal(iteration.vectors[0], vectors[0])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("block", [2, 8, 16])
def test_rank_deficient_weights_keep_the_block_orthonormal(rank, block):
    weights = [(matrix(m, n)[:, :rank] @ torch.randn(rank, n).double()).float() for m, n in [(50, 40), (20, 70)]]
    # Exactly rank one, without the noise that rounding adds: only one column, and only one entry.
    weights += [torch.zeros(20, 18), torch.zeros(17, 40)]
    weights[2][:, 3], weights[3][5, 7] = torch.randn(20), 3.0
    vectors = blocks(weights, block)
    iteration = poisoned(weights, vectors)
    for _ in range(2):
        got = iteration.power_step(weights, 1)
        for rows in got.vectors:
            assert_orthonormal(rows)
    truth = torch.stack([largest_singular_value(w) for w in weights])
    torch.testing.assert_close(got.sigma.double(), truth, rtol=SIGMA, atol=0)


def test_repeated_top_singular_value():
    weights = [orthonormal_columns(30, 30).float() * 2.5, torch.eye(8)]
    got = poisoned(weights, blocks(weights, 8)).power_step(weights, 1)
    torch.testing.assert_close(got.sigma, torch.tensor([2.5, 1.0]), rtol=SIGMA, atol=0)
    for w, u, v, s in zip(weights, got.left, got.right, got.sigma, strict=True):
        torch.testing.assert_close(w @ v, u * s, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("block", [1, 8])
def test_weights_that_are_not_finite_give_nan_and_keep_their_block(bad, block):
    weights = [matrix(24, 16).float(), matrix(20, 30).float()]
    weights[0][3, 5] = bad
    vectors = blocks(weights, block)
    iteration = poisoned(weights, vectors)
    got = iteration.power_step(weights, 1)
    assert got.sigma[0].isnan()
    assert torch.equal(iteration.vectors[0], vectors[0])
    assert got.sigma[1].isfinite()


def test_repeats_bit_for_bit():
    weights = [matrix(*shape).float() for shape in [(20, 13), (257, 100)]]
    runs = [poisoned(weights, blocks(weights, 8)) for _ in range(2)]
    first, second = (run.power_step(weights, 3) for run in runs)
    assert torch.equal(first.sigma, second.sigma)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].vectors, runs[1].vectors, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_one_update(layout, dtype):
    weights = [matrix(*shape).float() for shape in [(24, 32), (40, 24), (20, 13), (1, 9)]]
    iteration = gpu.GpuIteration(weights, blocks(weights, 2))
    got = iteration.power_step(weights, 1)
    before = [torch.randn(w.shape, generator=torch.Generator().manual_seed(3)).to(dtype) for w in weights]
    grads = [LAYOUTS[layout](g) for g in before]
    grads[2] = None
    c = torch.tensor([2.0, 0.0, 1.0, math.nan])
    iteration.rank_one_update_(grads, c)
    should = before[0].double() + 2 * torch.outer(got.left[0], got.right[0]).double()
    # One rounding to the gradient's dtype, after a sum in fp32.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grads[0].double(), should, rtol=eps, atol=1e-6)
    assert torch.equal(grads[1], before[1])
    assert torch.equal(grads[3], before[3])


@pytest.mark.parametrize(("name", "level"), [*((name, 5.0) for name in PENALTY_CODES), ("product", LARGEST_KNEE)])
@pytest.mark.parametrize("top", [2.0, 40.0])
def test_penalties_equal_autograd(name, level, top):
    # 40 for each of 12 uses is S = 44: beyond e^30.
    weights = [matrix(16, 12, top=top).float(), matrix(9, 20, top=top / 3).float()]
    times = [3, 9]
    iteration = gpu.GpuIteration(weights, blocks(weights, 4))
    grads = [torch.zeros_like(w) for w in weights]
    value = penalise(iteration, weights, grads, name, 3, level, 0.01, times)
    sigma = iteration._sigma.double().requires_grad_()
    # Written out once per use: the penalties take a sum over layers.
    repeated = torch.cat([s.expand(k) for s, k in zip(sigma.log(), times, strict=True)])
    want = 0.01 * penalties.get_penalty(name, level, level)(repeated, repeated.sum())
    (slope,) = torch.autograd.grad(want, sigma)
    torch.testing.assert_close(value.double(), want.detach(), rtol=5e-6, atol=0)
    torch.testing.assert_close(iteration._factors.double(), slope, rtol=5e-6, atol=0)
    for grad, u, v, c in zip(grads, iteration._sides(True), iteration._sides(False), slope, strict=True):
        torch.testing.assert_close(grad.double(), c * torch.outer(u, v).double(), rtol=1e-5, atol=float(c.abs()) * 1e-7)


@pytest.mark.parametrize("name", PENALTY_CODES)
def test_zero_and_bad_layers_have_coefficient_zero(name):
    weights = [torch.zeros(4, 6), matrix(6, 5).float(), matrix(8, 8).float()]
    iteration = gpu.GpuIteration(weights, blocks(weights, 2))
    grads = [torch.ones_like(w) for w in weights]
    value = penalise(iteration, weights, grads, name).clone()
    assert torch.equal(grads[0], torch.ones(4, 6))
    sigma = iteration._sigma.double()
    wanted = {"log": -math.inf, "layer_sum": float(sigma.sum()), "layer_sum_squares": float(sigma.square().sum())}
    torch.testing.assert_close(float(value), wanted.get(name, 0.0), rtol=1e-6, atol=0)
    weights[1][0, 0] = math.nan
    assert penalise(iteration, weights, grads, name).isnan()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("knee", [100.0, LARGEST_KNEE])
def test_a_product_beyond_fp32_has_the_gradient_of_its_knee(knee):
    check_a_product_beyond_fp32(gpu.GpuIteration, knee)


def test_tables_are_refreshed_only_where_an_address_changed():
    weights = [matrix(24, 32).float(), matrix(20, 13).float()]
    iteration = gpu.GpuIteration(weights, blocks(weights, 2))
    grads = [torch.zeros_like(w) for w in weights]
    for _ in range(4):
        penalise(iteration, weights, grads)
        assert iteration.n_refreshes == 2
    # set_to_none: new gradients each step, the weights stay.
    kept = []
    for _ in range(3):
        kept.append([torch.zeros_like(w) for w in weights])
        penalise(iteration, weights, kept[-1])
    assert iteration.n_refreshes == 5
    assert all(step[0].abs().sum() > 0 for step in kept)
    penalise(iteration, weights, [kept[-1][0], None])
    assert iteration.n_refreshes == 6


def test_weights_that_change_their_layout_get_new_tables():
    weights = [matrix(24, 32).float()]
    vectors = blocks(weights, 4)
    iteration = gpu.GpuIteration(weights, vectors)
    iteration.power_step(weights, 1)
    moved = [LAYOUTS["unaligned"](w) for w in weights]
    got = iteration.power_step(moved, 1)
    assert iteration._plan.n_aligned_strips == 0
    assert_same(got, expected(weights, vectors, 2))
    with pytest.raises(ValueError, match="make a new object"):
        iteration.power_step([torch.ones(3, 3)], 1)


def test_a_compiled_step_leaves_the_iteration_to_python():
    # add_grad_ inside what torch.compile is given: a graph would hold addresses of this step's weights and gradients.
    def run(compiled):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 9))
        regularizer = LipschitzRegularizer(model, 0.1, "softplus_log", block_size=2, backend="gpu")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        inputs = torch.randn(5, 12)

        def step():
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            value = regularizer.add_grad_()
            optimizer.step()
            return value

        step = torch.compile(step, backend="aot_eager") if compiled else step
        return [float(step()) for _ in range(3)], [p.detach() for p in model.parameters()]

    (values, parameters), (expected_values, expected_parameters) = run(True), run(False)
    assert values == expected_values
    assert len(set(values)) == 3
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected_parameters, strict=True))


def test_a_capture_refuses_new_addresses(monkeypatch):
    weights = [matrix(6, 5).float()]
    iteration = gpu.GpuIteration(weights, blocks(weights, 1))
    grads = [torch.zeros(6, 5)]
    iteration.power_step(weights, 1)
    iteration.rank_one_update_(grads, torch.ones(1))
    monkeypatch.setattr(gpu, "capturing", lambda device: True)
    # The same addresses are no reason to refuse.
    iteration.power_step(weights, 1)
    iteration.rank_one_update_(grads, torch.ones(1))
    with pytest.raises(RuntimeError, match="set_to_none=False"):
        iteration.rank_one_update_([torch.zeros(6, 5)], torch.ones(1))
    with pytest.raises(RuntimeError, match="addresses of the weights"):
        iteration.power_step([w.clone() for w in weights], 1)


def test_unknown_penalty_code():
    iteration = gpu.GpuIteration([torch.eye(3)], [torch.eye(3)[:1]])
    with pytest.raises(ValueError, match="from 0 to 5"):
        iteration.penalise_([torch.eye(3)], [None], 1, 6, 1.0, 1.0, [1])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # A wrong mask: the first row of the next strip is taken too, or the last column is lost.
        ("mask = (rows < i1)[:, :, None]", "mask = (rows <= i1)[:, :, None]"),
        ("& (cols < p)[None, None, :]", "& (cols < p - 1)[None, None, :]"),
        # A partial sum that is not rescaled when the running maximum grows.
        ("z *= _as_float(top) / _as_float(raised)", "z *= 1.0"),
        # No shift: the block of a rank-one weight is no longer orthonormal.
        ("RELATIVE_SHIFT: tl.constexpr = tl.constexpr(2.0**-15)", "RELATIVE_SHIFT: tl.constexpr = tl.constexpr(0.0)"),
    ],
    ids=["row_mask", "column_mask", "rescaling", "shift"],
)  # fmt: skip
def test_planted_faults_are_caught(tmp_path, monkeypatch, old, new):
    # One strip of many tiles, each larger than the one before, so the scale has to grow within it.
    monkeypatch.setattr("lightning_lip.kernels.gpu.tables.DEFAULT_PROCESSORS", 1)
    grown = matrix(400, 12).float() * torch.linspace(0, 12, 400).exp2()[:, None]
    rank_one = torch.zeros(30, 20)
    rank_one[:, 3] = 1.0
    weights = [grown, rank_one, matrix(257, 100).float()]
    vectors = blocks(weights, 4)

    def check():
        got = poisoned(weights, vectors).power_step(weights, 1)
        want = expected(weights, vectors, 1)
        torch.testing.assert_close(got.sigma.double(), want.sigma, rtol=SIGMA, atol=0)
        for rows in got.vectors:
            assert_orthonormal(rows)

    check()
    kernels = planted.kernels_with(tmp_path, old, new)
    monkeypatch.setattr(gpu.GpuIteration, "_kernels", lambda self: kernels)
    with pytest.raises(AssertionError):
        check()
