"""The compiled CPU kernels against the reference and float64, over shapes, dtypes, layouts and block sizes."""

import copy
import gc
import logging
import math
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.iterations import cache_hits_and_misses, in_a_fork, penalise
from support.truth import LAYOUTS, blocks, generator, geometric, largest_singular_value, matrix_of, orthonormal_columns

from lightning_lip.kernels import reference
from lightning_lip.kernels.cpu import iteration as cpu
from lightning_lip.kernels.cpu import layout as at
from lightning_lip.kernels.cpu import loading
from lightning_lip.kernels.cpu import threads as pool
from lightning_lip.kernels.cpu.compiled import emitter, layers
from lightning_lip.kernels.cpu.iteration import CpuIteration
from lightning_lip.kernels.penalties import LARGEST_KNEE, PENALTY_CODES
from lightning_lip.penalty.penalties import get_penalty

# What is compared            bound   why
SIGMA = 2e-6  #               relative, the brief's: fp32 rounds T and Z to 1e-7 an entry
OUTER = 2e-5  #               entries of u v^T at a gap of 0.8: rounding of 1e-7 times 1 / gap^2, over 3 steps
SPAN = 2e-5  #                entries of V^T V, the same up to r = 8
SPAN_OF_16 = 1e-4  #          the 16th singular value is 0.035: Z of a random block has 1e-7 / 0.035^2 of noise there
ORTHONORMAL = 2e-6  #         entries of V V^T - I: Householder QR in fp32, whatever the rank
GRADIENT = 1e-6  #            relative to the largest entry, of an fp32 update
BF16_GRADIENT = 2**-8  #      one rounding to 8 bits
VALUE = 1e-6  #               relative, of the penalty in fp32

# 63, 65, 129: around the groups of eight rows and sixteen columns; 1 x n, n x 1: both dimensions are contiguous; 1300 x
# 1200 and 300 x 3000: several rounds; 3000: wider than a band of columns.
SHAPES = [(1, 1), (1, 7), (7, 1), (13, 20), (20, 13), (64, 64), (63, 65), (129, 31), (1300, 1200), (300, 3000), (4, 5)]
BLOCK_SIZES = [1, 2, 3, 8, 16]
DTYPES = [torch.float32, torch.bfloat16]


def matrix(m, n, seed=0, ratio=0.8, top=3.0):
    """Return a float64 matrix with singular values top, top ratio, ...: a gap after each of the first 40."""
    return matrix_of(m, n, geometric(min(m, n, 40), ratio, top), seed)


def assert_same_step(got, expected, sigma_bound=SIGMA):
    torch.testing.assert_close(got.sigma, expected.sigma.float(), rtol=sigma_bound, atol=0)
    for index, (u, v, x, y) in enumerate(zip(got.left, got.right, expected.left, expected.right, strict=True)):
        error = (torch.outer(u, v) - torch.outer(x, y)).abs().max()
        assert error <= OUTER, f"layer {index}: u v^T is off by {error}"
    for index, (v, w) in enumerate(zip(got.vectors, expected.vectors, strict=True)):
        assert_orthonormal(v)
        error = (v.T @ v - w.T @ w).abs().max()
        assert error <= (SPAN_OF_16 if len(v) == 16 else SPAN), f"layer {index}: the span is off by {error}"


def assert_orthonormal(block):
    error = (block.double() @ block.double().T - torch.eye(len(block))).abs().max()
    assert error <= ORTHONORMAL, f"not orthonormal by {error}"


def assert_step_equals_the_reference(weights, r, n_iterations):
    start = blocks(weights, r)
    got = CpuIteration(weights, start).power_step(weights, n_iterations)
    assert_same_step(got, reference.power_step(weights, start, n_iterations))


def matrices(shapes, dtype=torch.float32, layout="contiguous"):
    return [LAYOUTS[layout](matrix(m, n, seed).to(dtype)) for seed, (m, n) in enumerate(shapes)]


@pytest.mark.parametrize("n_iterations", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", BLOCK_SIZES)
def test_power_step_equals_the_reference(r, dtype, n_iterations):
    assert_step_equals_the_reference(matrices(SHAPES, dtype), r, n_iterations)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 3, 8])
def test_layouts(r, dtype, layout):
    shapes = [(20, 13), (13, 20), (64, 64), (1, 9), (9, 1), (1030, 1100), (1500, 200)]
    assert_step_equals_the_reference(matrices(shapes, dtype, layout), r, 2)


def assert_converges_to_the_svd(weights, r):
    """Check sigma after 40 steps; returns the iteration."""
    iteration = CpuIteration(weights, blocks(weights, r))
    # (0.8^r)^(4k) < 1e-8 after k = 40 steps, at r = 1 too
    sigma = [iteration.power_step(weights).sigma for _ in range(40)][-1]
    truth = torch.stack([largest_singular_value(w) for w in weights])
    torch.testing.assert_close(sigma.double(), truth, rtol=SIGMA, atol=0)
    for block in iteration.vectors:
        assert_orthonormal(block)
    return iteration


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", BLOCK_SIZES)
def test_sigma_converges_to_the_svd(r, dtype):
    assert_converges_to_the_svd(matrices([(m, n) for m, n in SHAPES if m * n < 10_000], dtype), r)


@pytest.mark.parametrize("r", BLOCK_SIZES)
def test_zero_iterations_give_ritz_values_and_keep_the_blocks(r):
    weights = matrices(SHAPES)
    start = blocks(weights, r)
    iteration = CpuIteration(weights, start)
    got = iteration.power_step(weights, 0)
    expected = reference.power_step(weights, start, 0)
    torch.testing.assert_close(got.sigma, expected.sigma, rtol=SIGMA, atol=0)
    for w, sigma, u, v in zip(weights, got.sigma, got.left, got.right, strict=True):
        # A random block has no gap: only the Rayleigh quotient of the pair is determined.
        assert abs(u.norm() - 1) < 1e-6
        assert abs(v.norm() - 1) < 1e-6
        assert u @ w @ v == pytest.approx(float(sigma), rel=5e-6)
    assert all(torch.equal(a, b) for a, b in zip(iteration.vectors, start, strict=True))


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("exponent", [-30, 30, -36, 35])
@pytest.mark.parametrize("r", [1, 4])
def test_extreme_scales(r, exponent, along):
    weight = (matrix(40, 24) * 10.0**exponent).float()
    assert_converges_to_the_svd([weight if along == "rows" else weight.T.contiguous()], r)


@pytest.mark.parametrize("r", [1, 4])
def test_scale_that_jumps_from_step_to_step(r):
    base = matrix(30, 20)
    truth = largest_singular_value(base)
    iteration = assert_converges_to_the_svd([base.float()], r)
    for exponent in (30, -30, 0, -36, 36, 0):
        weight = (base * 10.0**exponent).float()
        sigma = iteration.power_step([weight]).sigma.double() / 10.0**exponent
        torch.testing.assert_close(sigma[0], truth, rtol=SIGMA, atol=0)


@pytest.mark.parametrize("n_iterations", [0, 1])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_zero_weight(shape, r, n_iterations):
    weight = torch.zeros(shape)
    start = blocks([weight], r)
    iteration = CpuIteration([weight], start)
    step = iteration.power_step([weight], n_iterations)
    long_side, short_side = (step.left, step.right) if shape == (12, 9) else (step.right, step.left)
    assert step.sigma.tolist() == [0.0]
    assert torch.equal(long_side[0], torch.zeros(12))
    assert torch.equal(short_side[0], start[0][0])
    assert torch.equal(iteration.vectors[0], start[0])


@pytest.mark.parametrize("r", [2, 8, 16])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (5, 5)])
@pytest.mark.parametrize("rank", [1, 2])
def test_rank_deficient_blocks_stay_orthonormal(shape, rank, r):
    weight = (matrix(*shape)[:, :1] @ matrix(*shape)[:1]).float()
    if rank == 2:
        weight += (matrix(*shape, seed=5)[:, :1] @ matrix(*shape, seed=5)[:1]).float()
    iteration = CpuIteration([weight], blocks([weight], r))
    for _ in range(5):
        step = iteration.power_step([weight])
        assert_orthonormal(iteration.vectors[0])
    truth = largest_singular_value(weight)
    torch.testing.assert_close(step.sigma[0].double(), truth, rtol=SIGMA, atol=0)


@pytest.mark.parametrize("r", [1, 2, 8])
def test_sparse_weights_whose_images_vanish(r):
    # Rows of Z that are exactly zero: the reflections that complete the basis start from nothing.
    weight = torch.zeros(10, 8)
    weight[3, 5] = -2.0
    start = {1: torch.ones(1, 8) / math.sqrt(8), 2: torch.eye(8)[[2, 5]], 8: torch.eye(8)}
    iteration = CpuIteration([weight], [start[r]])
    step = iteration.power_step([weight])
    assert float(step.sigma) == pytest.approx(2.0, rel=SIGMA)
    assert_orthonormal(iteration.vectors[0])


@pytest.mark.parametrize("r", [1, 2, 8])
def test_repeated_top_singular_value(r):
    weight = orthonormal_columns(40, 24).float() * 2
    iteration = CpuIteration([weight], blocks([weight], r))
    step = iteration.power_step([weight])
    torch.testing.assert_close(step.sigma, torch.tensor([2.0]), rtol=SIGMA, atol=0)
    assert_orthonormal(iteration.vectors[0])
    assert step.left[0] @ weight @ step.right[0] == pytest.approx(2.0, rel=SIGMA)


@pytest.mark.parametrize("n_iterations", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite(shape, r, bad, n_iterations, dtype):
    healthy = matrix(10, 10).to(dtype)
    weight = matrix(*shape).to(dtype)
    weight[2, 3] = bad
    start = blocks([weight, healthy], r)
    iteration = CpuIteration([weight, healthy], start)
    grads = [torch.zeros(shape), torch.zeros(10, 10)]
    value = penalise(iteration, [weight, healthy], grads, "layer_sum", n_iterations)
    assert value.isnan()
    assert iteration.last_step.sigma[0].isnan()
    assert iteration.last_step.sigma[1] > 0
    assert torch.equal(iteration.vectors[0], start[0])
    # The broken layer is left alone, the other one is not.
    assert torch.equal(grads[0], torch.zeros(shape))
    assert grads[1].abs().max() > 0
    # One bad weight spoils the product for all.
    grads = [torch.zeros(shape), torch.zeros(10, 10)]
    penalise(iteration, [weight, healthy], grads, "product", n_iterations)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_every_buffer_is_written():
    # Scratch and outputs start as NaN (_build); none may come through, for odd sizes and every loop's remainder.
    weights = [torch.ones(m, n) for m in range(1, 10) for n in range(1, 10)]
    for r in (1, 2, 5):
        iteration = CpuIteration(weights, blocks(weights, r))
        iteration._band.fill_(math.nan)
        iteration._small.fill_(math.nan)
        step = iteration.power_step(weights)
        assert step.sigma.isfinite().all()
        for part in (*step.left, *step.right, *step.vectors):
            assert part.isfinite().all()


@pytest.mark.parametrize("weight_layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_rank_one_update(dtype, layout, weight_layout):
    shapes = [(20, 13), (13, 20), (16, 16), (1, 9), (9, 1), (1, 1)]
    weights = matrices(shapes, layout=weight_layout)
    iteration = CpuIteration(weights, blocks(weights, 3))
    step = iteration.power_step(weights, 2)
    coefficients = torch.tensor([0.3, -2.0, 5.0, 0.0, 1e-3, 7.0])
    before = [torch.randn(s, generator=generator(7)).to(dtype) for s in shapes]
    grads = [LAYOUTS[layout](g) for g in before]
    expected = [g.clone() for g in before]
    versions = [g._version for g in grads]
    iteration.rank_one_update_(grads, coefficients)
    reference.rank_one_update_(expected, coefficients, step.left, step.right)
    bound = BF16_GRADIENT if dtype in (torch.bfloat16, torch.float16) else GRADIENT
    for got, wanted, version in zip(grads, expected, versions, strict=True):
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound * float(wanted.abs().max()))
        # autograd is told of the write
        assert got._version > version


def test_gaps_between_the_rows_of_a_gradient_stay():
    weight = matrix(6, 5).float()
    big = torch.full((6, 8), 4.0)
    iteration = CpuIteration([weight], blocks([weight], 1))
    iteration.power_step([weight])
    iteration.rank_one_update_([big[:, 1:6]], torch.ones(1))
    assert torch.equal(big[:, [0, 6, 7]], torch.full((6, 3), 4.0))
    assert not torch.equal(big[:, 1:6], torch.full((6, 5), 4.0))


def test_bf16_gradients_round_to_nearest_even():
    weight = torch.tensor([[1.0]])
    iteration = CpuIteration([weight], [torch.ones(1, 1)])
    iteration.power_step([weight])
    numbers = torch.randn(40, generator=generator(3)).bfloat16()
    # Halves of the last place, which go to the even neighbour, and numbers beside them.
    steps = torch.tensor([2**-9, 3 * 2**-9, 2**-9 * 1.0001, -(2**-9), 0.37, 1e-30])
    for number in (*numbers.tolist(), 1.0, 1.0078125, -1.0, 3.3e38):
        for step in steps.tolist():
            grad = torch.tensor([[number]], dtype=torch.bfloat16)
            iteration.rank_one_update_([grad], torch.tensor([step]))
            assert torch.equal(grad, (torch.tensor([[number]]) + torch.tensor(step)).bfloat16())
    for number in (math.nan, math.inf, -math.inf):
        grad = torch.tensor([[number]], dtype=torch.bfloat16)
        iteration.rank_one_update_([grad], torch.ones(1))
        assert grad.isnan().all() if math.isnan(number) else grad.item() == number
    # A NaN whose low word would carry over the exponent in a plain rounding.
    nan = torch.from_numpy(np.array([[0xFFFF]], np.uint16).view(np.int16)).view(torch.bfloat16)
    iteration.rank_one_update_([nan], torch.ones(1))
    assert nan.isnan().all()


def test_expanded_gradient_is_refused_as_torch_does():
    weight = matrix(4, 4).float()
    iteration = CpuIteration([weight], blocks([weight], 1))
    iteration.power_step([weight])
    with pytest.raises(RuntimeError, match="single memory location"):
        iteration.rank_one_update_([torch.zeros(1, 4).expand(4, 4)], torch.ones(1))


NAMES = list(PENALTY_CODES)


# log P: far below, near and far above each target and knee, and beyond e^30
@pytest.mark.parametrize("log_scale", [-8.0, -0.5, 0.3, 5.0, 14.0])
@pytest.mark.parametrize(("name", "level"), [*((name, 2.5) for name in NAMES), ("product", LARGEST_KNEE)])
def test_penalties_against_autograd(name, level, log_scale):
    multiplicities = [1, 3, 2]
    weights = [(matrix(m, n, s) * math.exp(log_scale)).float() for s, (m, n) in enumerate([(9, 7), (6, 8), (5, 5)])]
    start = reference.power_step(weights, blocks(weights, 4), 30).vectors
    exact = reference.power_step(weights, start, 1)
    log_sigma = exact.sigma.double().log().requires_grad_()
    repeated = log_sigma.repeat_interleave(torch.tensor(multiplicities))
    value = get_penalty(name, level, level)(repeated, repeated.sum()) * 0.7
    (slope,) = torch.autograd.grad(value, log_sigma)
    coefficients = slope / exact.sigma.double()
    grads = [torch.zeros_like(w) for w in weights]
    got = penalise(CpuIteration(weights, start), weights, grads, name, 1, level, 0.7, multiplicities)
    assert got.shape == ()
    torch.testing.assert_close(got.double(), value.detach(), rtol=20 * VALUE, atol=1e-30)
    for grad, c, u, v in zip(grads, coefficients, exact.left, exact.right, strict=True):
        wanted = c * torch.outer(u, v)
        # sigma's rounding of 1e-7 counts seven times in the product
        torch.testing.assert_close(grad.double(), wanted.double(), rtol=0, atol=float(wanted.abs().max()) * 1e-4)
        assert grad.norm() == pytest.approx(float(c.abs()), rel=20 * VALUE, abs=1e-35)


@pytest.mark.parametrize("name", NAMES)
def test_penalise_equals_the_reference_with_zero_and_skipped_layers(name):
    weights = [matrix(9, 7).float(), torch.zeros(3, 4), matrix(5, 6, 3).float(), matrix(4, 4, 5).float()]
    start = blocks(weights, 2)
    grads = [torch.ones(9, 7), torch.ones(3, 4), None, torch.ones(4, 4)]
    expected = [None if g is None else g.clone() for g in grads]
    got, wanted = (
        penalise(kind(weights, start), weights, g, name, 2, 1.1, 2.0, [1, 1, 2, 1])
        for kind, g in ((CpuIteration, grads), (reference.ReferenceIteration, expected))
    )
    torch.testing.assert_close(got, wanted, rtol=VALUE, atol=0)
    assert torch.equal(grads[1], torch.ones(3, 4))
    for g, e in zip(grads, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_many_layers_do_not_overflow(name):
    weights = [torch.full((1, 1), 1e30)] * 60
    grads = [torch.zeros(1, 1) for _ in weights]
    value = penalise(CpuIteration(weights, [torch.ones(1, 1)] * 60), weights, grads, name)
    assert not value.isnan()
    assert all(g.isfinite().all() for g in grads)


def test_coefficients_that_overflow_count_as_zero():
    # 2 k sigma scale = inf in fp32
    weight = torch.full((1, 1), 1e30)
    grads = [torch.zeros(1, 1)]
    value = penalise(CpuIteration([weight], [torch.ones(1, 1)]), [weight], grads, "layer_sum_squares", scale=1e10)
    assert value.isinf()
    assert torch.equal(grads[0], torch.zeros(1, 1))


def test_sigma_of_earlier_steps_stays():
    weights = [matrix(9, 7).float()]
    iteration = CpuIteration(weights, blocks(weights, 1))
    iteration.power_step(weights)
    sigma = iteration.last_step.sigma
    kept = sigma.clone()
    weights[0].mul_(2)
    penalise(iteration, weights, [torch.zeros(9, 7)])
    assert torch.equal(sigma, kept)


def test_multiplicities_that_change_are_noticed():
    weights = [matrix(9, 7).float(), matrix(6, 7).float()]
    iteration = CpuIteration(weights, blocks(weights, 7))
    log_sigma = iteration.power_step(weights, 0).sigma.log()
    counts = [1, 2]
    for counts[1] in (2, 5, 5, 1):
        value = penalise(iteration, weights, [None, None], "log", 0, uses=counts)
        assert float(value) == pytest.approx(float(log_sigma[0] + counts[1] * log_sigma[1]), rel=1e-5, abs=1e-6)


def test_tables_are_refreshed_only_where_something_changed():
    weights = [matrix(m, n).float() for m, n in [(9, 7), (6, 7), (5, 5)]]
    grads = [torch.zeros_like(w) for w in weights]
    iteration = CpuIteration(weights, blocks(weights, 1))
    assert iteration.n_refreshes == 0
    penalise(iteration, weights, grads)
    assert iteration.n_refreshes == 6
    for _ in range(3):
        penalise(iteration, weights, grads)
        iteration.power_step(weights)
        iteration.rank_one_update_(grads, torch.zeros(3))
    assert iteration.n_refreshes == 6
    kept = grads[1]
    grads[1] = torch.zeros(6, 7)  # `set_to_none`: a new gradient
    untouched = kept.clone()
    penalise(iteration, weights, grads)
    assert iteration.n_refreshes == 6
    assert grads[1].abs().max() > 0
    assert torch.equal(kept, untouched)
    grads[0] = None  # a frozen layer
    penalise(iteration, weights, grads)
    assert iteration.n_refreshes == 7
    weights[2] = weights[2].clone()  # `load_state_dict(assign=True)`
    penalise(iteration, weights, grads)
    assert iteration.n_refreshes == 8


def test_same_address_with_other_strides_or_dtype_is_noticed():
    weight = matrix(6, 6).float()
    iteration = CpuIteration([weight], blocks([weight], 6))
    iteration.power_step([weight], 30)
    storage = torch.zeros(36)
    iteration.rank_one_update_([storage.view(6, 6)], torch.ones(1))
    first = storage.view(6, 6).clone()
    storage.zero_()
    iteration.rank_one_update_([storage.view(6, 6).T], torch.ones(1))
    torch.testing.assert_close(storage.view(6, 6).T, first)
    storage.zero_()
    half = storage.view(torch.bfloat16)[:36].view(6, 6)
    iteration.rank_one_update_([half], torch.ones(1))
    torch.testing.assert_close(half.float(), first, rtol=BF16_GRADIENT, atol=1e-6)


def test_a_weight_that_is_transposed_in_place_is_noticed():
    weight = matrix(6, 6).float()
    iteration = CpuIteration([weight], blocks([weight], 6))
    iteration.power_step([weight], 30)
    parameter = torch.nn.Parameter(weight)
    parameter.data = parameter.data.t()
    assert parameter.data_ptr() == weight.data_ptr()
    grad = torch.zeros(6, 6)
    penalise(iteration, [parameter], [grad])
    u, _, vh = torch.linalg.svd(parameter.detach().double())
    direction = grad.double() / grad.double().norm()
    torch.testing.assert_close(direction, torch.outer(u[:, 0], vh[0]), rtol=0, atol=1e-3)


def test_an_address_is_not_given_to_another_weight():
    # The iteration keeps an alias of each weight, so that "the same address" means "the same weight".
    memory = np.ones((6, 5), np.float32)
    alive = weakref.ref(memory)
    weight = torch.from_numpy(memory)
    iteration = CpuIteration([weight], blocks([weight], 1))
    iteration.power_step([weight])
    del weight, memory
    gc.collect()
    assert alive() is not None
    # It lets go of the old one as soon as it is given a new one.
    iteration.power_step([torch.ones(6, 5)])
    gc.collect()
    assert alive() is None


def test_weights_that_change_dtype_or_layout_between_steps():
    base = matrix(20, 13)
    start = blocks([base], 4)
    iteration = CpuIteration([base.float()], start)
    present = start
    for weight in (base.float(), base.bfloat16(), LAYOUTS["transposed"](base.float()), base.float()):
        expected = reference.power_step([weight], present, 1)
        assert_same_step(iteration.power_step([weight]), expected)
        present = [v.clone() for v in iteration.vectors]


def test_refused_changes_leave_the_object_usable():
    weight = matrix(6, 5).float()
    iteration = CpuIteration([weight], blocks([weight], 1))
    good = torch.zeros(6, 5)
    penalise(iteration, [weight], [good])
    with pytest.raises(ValueError, match=r"weight 0 to have shape \(6, 5\)"):
        iteration.power_step([torch.ones(5, 6)])
    with pytest.raises(ValueError, match=r"no longer serve weight 0: they take fp32 and bf16, not torch\.float64"):
        iteration.power_step([weight.double()])
    with pytest.raises(ValueError, match=r"gradient 0 to have shape \(6, 5\)"):
        iteration.rank_one_update_([torch.ones(5, 6)], torch.ones(1))
    with pytest.raises(ValueError, match="zip"):
        iteration.power_step([weight, weight])
    before = good.clone()
    penalise(iteration, [weight], [good])
    assert not torch.equal(good, before)


def test_parameters_and_inference_mode():
    layer = torch.nn.Linear(7, 5)
    iteration = CpuIteration([layer.weight], blocks([layer.weight], 2))
    layer.weight.grad = torch.zeros(5, 7)
    with torch.inference_mode():
        penalise(iteration, [layer.weight], [layer.weight.grad])
    value = penalise(iteration, [layer.weight], [layer.weight.grad])
    assert not value.requires_grad
    assert layer.weight.grad.abs().max() > 0


class TestThreads:
    """Several threads of torch's pool, on small matrices that are declared worth it."""

    N_THREADS = 3  # more than there are cores, maybe

    @pytest.fixture(autouse=True)
    def _everything_is_parallel(self, monkeypatch):
        monkeypatch.setattr(cpu, "PARALLEL", 1)
        monkeypatch.setattr(cpu, "PART", 64)
        monkeypatch.setattr(cpu, "GROUP", 200)
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    def steps(self, weights, r, n_threads, n_iterations):
        torch.set_num_threads(n_threads)
        iteration = CpuIteration(weights, blocks(weights, r))
        step = iteration.power_step(weights, n_iterations)
        if pool.pool_address():
            assert iteration._header[at.THREADS] == n_threads
        return step

    @pytest.mark.parametrize("n_iterations", [0, 1, 3])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("r", [1, 3, 16])
    def test_power_step_equals_that_of_one_thread(self, r, dtype, layout, n_iterations):
        shapes = [(20, 13), (5, 5), (13, 20), (41, 37), (100, 9), (9, 100), (200, 60)]
        weights = matrices(shapes, dtype, layout)
        alone = self.steps(weights, r, 1, n_iterations)
        several = self.steps(weights, r, self.N_THREADS, n_iterations)
        for one, other in zip([alone.sigma, *alone.vectors], [several.sigma, *several.vectors], strict=True):
            assert torch.equal(one, other)
        expected = reference.power_step(weights, blocks(weights, r), n_iterations)
        if n_iterations == 0:
            torch.testing.assert_close(several.sigma, expected.sigma, rtol=SIGMA, atol=0)
        else:
            assert_same_step(several, expected)

    @pytest.mark.parametrize("exponent", [-30, 30])
    @pytest.mark.parametrize("r", [1, 4])
    def test_extreme_scales_beside_others(self, r, exponent):
        weights = [(matrix(40, 24) * 10.0**exponent).float(), matrix(30, 24).float()]
        torch.set_num_threads(self.N_THREADS)
        assert_converges_to_the_svd(weights, r)

    @pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_penalise(self, grad_dtype):
        shapes = [(20, 13), (5, 5), (13, 20), (70, 50)]
        weights = [torch.nn.Parameter(weight) for weight in matrices(shapes)]
        start = blocks(weights, 3)
        grads = [torch.ones(s, dtype=grad_dtype) for s in shapes]
        torch.set_num_threads(self.N_THREADS)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the products
            got = penalise(CpuIteration(weights, start), weights, grads, n_iterations=2)
        # Against the reference's sums before they are rounded: rounding once is half a unit in the last of 8 bits.
        exact = [torch.ones(s, dtype=torch.float64) for s in shapes]
        wanted = penalise(reference.ReferenceIteration(weights, start), weights, exact, n_iterations=2)
        torch.testing.assert_close(got, wanted, rtol=10 * VALUE, atol=0)
        rounding = 2.0**-8 if grad_dtype == torch.bfloat16 else 0.0
        for g, e in zip(grads, exact, strict=True):
            torch.testing.assert_close(g.double(), e, rtol=rounding + 2e-5, atol=2e-5)

    def test_number_of_threads_may_change(self):
        weights = [matrix(40, 30).bfloat16()]
        torch.set_num_threads(1)
        iteration, twin = (CpuIteration(weights, blocks(weights, 4)) for _ in range(2))
        for n_threads in (1, self.N_THREADS, 2, 1):
            torch.set_num_threads(n_threads)
            got = iteration.power_step(weights).sigma
            torch.set_num_threads(1)
            assert torch.equal(got, twin.power_step(weights).sigma)

    def test_without_a_pool_one_thread_does_it_all(self, monkeypatch):
        weights = [matrix(40, 30).float()]
        expected = self.steps(weights, 4, self.N_THREADS, 2)
        monkeypatch.setattr(pool, "pool_address", lambda: 0)
        iteration = CpuIteration(weights, blocks(weights, 4))
        assert torch.equal(iteration.power_step(weights, 2).sigma, expected.sigma)
        assert iteration._header[at.THREADS] == 1

    @pytest.mark.parametrize("n_threads", [1, 2])
    def test_forked_process_continues_without_a_pool(self, n_threads):
        torch.set_num_threads(2)
        weights = matrices([(64, 64), (20, 30)])
        iteration = CpuIteration(weights, blocks(weights, 8))
        iteration.power_step(weights)

        def sigma_of_a_child():
            torch.set_num_threads(n_threads)
            return iteration.power_step(weights, 2).sigma.tolist()

        assert in_a_fork(sigma_of_a_child) == iteration.power_step(weights, 2).sigma.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="known of torch's builds for Linux only")
def test_torch_has_a_pool():
    assert pool.pool_address() != 0


@pytest.mark.parametrize(
    ("weight", "block_size", "reason"),
    [
        (torch.ones(3, 4, dtype=torch.float16), 1, "fp32 and bf16, not torch.float16"),
        (torch.ones(3, 4, dtype=torch.float64), 1, "fp32 and bf16, not torch.float64"),
        (torch.ones(3, 4, device="meta"), 1, "it is on meta"),
        (torch.ones(3), 1, "dense matrices"),
        (torch.ones(0, 4), 1, "dense matrices"),
        (torch.ones(3, 4).to_sparse(), 1, "dense matrices"),
        (torch.ones(8, 8)[::2, ::2], 1, "neither of its dimensions is contiguous"),
        (torch.ones(20, 17), 17, "at most 16 vectors"),
    ],
)
def test_why_not(weight, block_size, reason):
    assert reason in CpuIteration.why_not(weight, block_size)


def test_why_not_has_no_reason_against_what_is_served():
    for weight in (torch.ones(3, 4), torch.ones(4, 3).T, torch.ones(3, 4).bfloat16(), torch.ones(9, 1)[::2]):
        assert CpuIteration.why_not(weight, 16) is None
    # A block is clamped to the shorter side, so 64 vectors of a thin weight are at most 4.
    assert CpuIteration.why_not(torch.ones(100, 4), 64) is None


def test_construction_refuses():
    with pytest.raises(ValueError, match=r"cannot serve a weight of shape \(3, 4\): they take fp32 and bf16"):
        CpuIteration([torch.ones(3, 4).half()], [torch.ones(1, 3)])
    for block in (torch.ones(1, 4), torch.ones(4, 3), torch.ones(0, 3), torch.ones(3)):
        with pytest.raises(ValueError, match=r"block of shape \(r, 3\)"):
            CpuIteration([torch.ones(3, 4)], [block])


def test_starting_blocks_are_copied():
    weight = matrix(6, 5).float()
    start = blocks([weight], 2)
    kept = start[0].clone()
    CpuIteration([weight], start).power_step([weight])
    assert torch.equal(start[0], kept)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_copies_continue_from_the_same_blocks(copied):
    weights = [matrix(20, 13).float(), matrix(6, 7).bfloat16()]
    iteration = CpuIteration(weights, blocks(weights, 3))
    iteration.power_step(weights, 2)
    twin = copied(iteration)
    assert twin._header_address != iteration._header_address
    assert twin.n_refreshes == 0
    a, b = iteration.power_step(weights), twin.power_step(weights)
    assert torch.equal(a.sigma, b.sigma)
    assert all(torch.equal(v, w) for v, w in zip(iteration.vectors, twin.vectors, strict=True))


def test_threads_do_not_meet():
    shapes = [(64, 64), (30, 90), (129, 65)]

    def run(seed, out):
        weights = [matrix(m, n, seed + i).to(DTYPES[i % 2]) for i, (m, n) in enumerate(shapes)]
        iteration = CpuIteration(weights, blocks(weights, 8, seed))
        for _ in range(150):
            iteration.power_step(weights)
        out[seed] = [v.clone() for v in iteration.vectors]

    alone, together = {}, {}
    for seed in range(4):
        run(seed, alone)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(4), [together] * 4))
    for seed in range(4):
        assert all(torch.equal(v, w) for v, w in zip(alone[seed], together[seed], strict=True))


def test_compiled_code_is_cached_between_processes():
    CpuIteration([torch.ones(2, 2)], [torch.eye(2)])
    use = "import torch; from lightning_lip.kernels.cpu.iteration import CpuIteration as C"
    assert cache_hits_and_misses(f"{use}; C([torch.ones(2, 2)], [torch.eye(2)])", "layers") == (1, 0)


def test_a_change_of_any_source_makes_another_key():
    # Numba's cache takes the variables of closures into its key, and only of the file of the function its time.
    assert layers.run.py_func.__closure__[0].cell_contents == emitter.sources_checksum()
    index = layers.run._cache
    signature = layers.run.signatures[0]
    codegen = layers.run.targetctx.codegen()
    other = layers.entries(1)[0]
    assert index._index_key(signature, codegen) != other._cache._index_key(signature, codegen)


def test_slow_compilation_is_logged_once(monkeypatch, caplog):
    clock = iter([0.0, 2.5])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loading, "_loaded", set())
    with caplog.at_level(logging.INFO, "lightning_lip"):
        for _ in range(3):
            CpuIteration([torch.ones(2, 2)], [torch.eye(2)])
    assert [r.message for r in caplog.records] == ["Compiled CPU kernels in 2.5 s; cached for the next process."]
    # A fast load says nothing.
    caplog.clear()
    clock = iter([0.0, 0.5])
    monkeypatch.setattr(loading, "_loaded", set())
    CpuIteration([torch.ones(2, 2)], [torch.eye(2)])
    assert not caplog.records
