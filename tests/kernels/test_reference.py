"""Block iteration against float64 SVD, on matrices whose spectrum is known."""

import math

import pytest
import torch
from support.truth import (
    blocks,
    generator,
    geometric,
    largest_singular_value,
    matrix_of,
    nearly_dependent,
    orthonormal_columns,
)

from lightning_lip.kernels.reference import (
    gram_matrix,
    iterate,
    orthonormalise,
    power_step,
    rank_one_update_,
    rayleigh_ritz,
)
from lightning_lip.kernels.tensors import compute_dtype

# Relative to the true spectral norm.
CONVERGED = 1e-5  # what the issue asks for; reached only where (sigma_{r+1} / sigma_1)^(2k) < 1e-6
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}  # how far an estimate from below may lie above
ORTHONORMAL = {torch.float32: 5e-6, torch.float64: 1e-13}  # entries of V V^T - I


def start(weight, block_size=8, seed=7):
    return blocks([weight], block_size, seed)[0]


def check_step(weight, step, index=0):
    """Check what holds for every step on a finite weight that is not zero, converged or not."""
    dtype = compute_dtype(weight.dtype)
    truth = largest_singular_value(weight).item()
    sigma, u, v = step.sigma[index], step.left[index].double(), step.right[index].double()
    assert sigma.dtype == dtype
    assert (u.shape, v.shape) == ((weight.shape[0],), (weight.shape[1],))
    assert u.norm().item() == pytest.approx(1, abs=ROUNDING[dtype])
    assert v.norm().item() == pytest.approx(1, abs=ROUNDING[dtype])
    assert sigma.item() <= truth * (1 + ROUNDING[dtype])
    # Relative to the norm, not to sigma: before convergence u^T W v sums terms of both signs.
    assert (u @ weight.double() @ v).item() == pytest.approx(sigma.item(), abs=truth * ROUNDING[dtype])
    check_orthonormal(step.vectors[index], weight.shape, weight.dtype)


def check_orthonormal(block, shape, dtype=torch.float32):
    assert block.dtype == compute_dtype(dtype)
    assert block.shape[1] == min(shape)
    gram = block.double() @ block.double().T
    assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < ORTHONORMAL[block.dtype]


SPECTRA = {
    "geometric": (40, 30, geometric(30, 0.7)),
    "wide": (30, 40, geometric(30, 0.7)),
    "repeated top value": (40, 30, [2.0] * 3 + geometric(27, 0.7)),
    "all values equal": (12, 12, [3.0] * 12),
    # More equal values than vectors: the direction is arbitrary, the value is not.
    "repeated beyond the block": (40, 30, [2.0] * 12 + [0.5] * 18),
    "rank one": (40, 30, [5.0]),
    "rank one, wide": (30, 40, [5.0]),
    "rank below the block": (40, 30, [5.0, 4.0, 3.0]),
    # 63 and 1023 are one short of the powers of two that kernels tile by.
    "ragged 63": (63, 65, geometric(63, 0.8)),
    "ragged 1023": (1023, 63, geometric(63, 0.8)),
    "1x1": (1, 1, [0.25]),
    "1xn": (1, 50, [0.25]),
    "nx1": (50, 1, [0.25]),
    "2x2": (2, 2, [1.0, 0.9]),
    "smaller than the block": (5, 7, [1.0, 0.99, 0.98, 0.97, 0.96]),
    "twelve decades": (20, 20, [10.0**-i for i in range(13)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SPECTRA)
def test_converges_to_the_float64_svd(case, dtype):
    m, n, spectrum = SPECTRA[case]
    weight = matrix_of(m, n, spectrum).to(dtype)
    # The rounded weight's own spectrum: half precision spreads values that were equal, by up to 4e-3.
    values = torch.linalg.svdvals(weight.double()) / largest_singular_value(weight).item()
    ratio = values[8].item() if len(values) > 8 else 0.0
    needed = 5 if ratio < 0.1 else math.ceil(math.log(1e-6) / (2 * math.log(min(ratio, 1 - 1e-9))))
    step = power_step([weight], [start(weight)], min(needed, 300))
    check_step(weight, step)
    # 300 iterations do not separate values so close, but leave nothing else: the estimate lies among them.
    spread = 1 - values[values > 0.98].min().item() if needed > 300 else 0.0
    assert step.sigma.item() == pytest.approx(largest_singular_value(weight).item(), rel=CONVERGED + spread)


@pytest.mark.parametrize("exponent", [-37, -30, -19, 19, 30, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["geometric", "wide", "rank one", "1x1", "1xn", "repeated top value"])
def test_scale_of_the_weights_does_not_matter(case, dtype, exponent):
    # Gram matrices of unscaled images overflow at 1e19 and vanish at 1e-19; those of Z = W^T T at 1e10.
    m, n, spectrum = SPECTRA[case]
    weight = (matrix_of(m, n, spectrum) * 10.0**exponent).to(dtype)
    for n_iterations in (1, 10):
        check_step(weight, step := power_step([weight], [start(weight)], n_iterations))
    assert step.sigma.item() == pytest.approx(largest_singular_value(weight).item(), rel=CONVERGED)
    still = power_step([weight], step.vectors, 0)
    assert still.sigma.item() == pytest.approx(largest_singular_value(weight).item(), rel=CONVERGED)


def test_float64_range():
    weight = matrix_of(20, 10, geometric(10, 0.5)) * 1e200
    step = power_step([weight], [start(weight)], 10)
    check_step(weight, step)
    assert step.sigma.item() == pytest.approx(1e200, rel=1e-12)


def test_half_precision_is_accumulated_in_float32():
    # Iterated in bf16 the estimate is off by 2e-3 (MATH.md section 1).
    weight = torch.randn(300, 200, generator=generator()).to(torch.bfloat16)
    step = power_step([weight], [start(weight, block_size=200)], 5)
    assert step.sigma.item() == pytest.approx(largest_singular_value(weight).item(), rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
def test_converges_at_the_promised_rate(block_size):
    # All wanted values alike and all others alike: the rate is sigma_{r+1} / sigma_1 and nothing else.
    ratio = 0.8
    weight = matrix_of(60, 40, [1.0] * block_size + [ratio] * (40 - block_size))
    block = start(weight, block_size)
    # tan^2 of the largest angle between the block and the top space bounds the error's constant.
    top = torch.linalg.svd(weight).Vh[:block_size]
    constant = (torch.linalg.pinv(block @ top.T) @ block @ (torch.eye(40).double() - top.T @ top)).square().sum()
    for k in (1, 2, 4, 8, 16):
        step = power_step([weight], [block], k)
        error = 1 - step.sigma.item()
        # sigma is the Rayleigh quotient of the pair half a step after the Ritz vector: (4k - 2) is safe, 4k typical.
        assert error <= constant.item() * ratio ** (4 * k - 2) + 1e-13
        check_step(weight, step)


def test_one_call_of_k_iterations_is_k_calls_of_one():
    weight = matrix_of(40, 30, geometric(30, 0.95))
    block = start(weight)
    at_once = power_step([weight], [block], 5)
    step = power_step([weight], [block], 1)
    for _ in range(4):
        step = power_step([weight], step.vectors, 1)
    torch.testing.assert_close(step.sigma, at_once.sigma, rtol=1e-12, atol=0)
    projector, expected = (s.vectors[0].T @ s.vectors[0] for s in (step, at_once))
    torch.testing.assert_close(projector, expected, rtol=0, atol=1e-12)


def test_the_estimate_grows_from_step_to_step():
    weight = matrix_of(64, 64, geometric(64, 0.99))
    block, values = start(weight, 4), []
    for _ in range(30):
        step = power_step([weight], [block], 1)
        check_step(weight, step)
        block = step.vectors[0]
        values.append(step.sigma.item())
    assert values == sorted(values)
    assert values[0] < 0.99 < values[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 1)])
def test_a_full_block_is_exact_in_one_step(shape, dtype):
    weight = torch.randn(shape, generator=generator()).to(dtype)
    for n_iterations in (0, 1):
        step = power_step([weight], [start(weight, block_size=6)], n_iterations)
        check_step(weight, step)
        truth = largest_singular_value(weight).item()
        assert step.sigma.item() == pytest.approx(truth, rel=ROUNDING[compute_dtype(dtype)])


def test_zero_iterations_leave_the_block_and_return_ritz_values():
    weight = matrix_of(40, 30, geometric(30, 0.9))
    block = start(weight)
    before = block.clone()
    step = power_step([weight], [block], 0)
    assert torch.equal(step.vectors[0], before)
    assert torch.equal(block, before)
    check_step(weight, step)
    assert step.sigma.item() == pytest.approx(torch.linalg.svdvals(weight @ block.T)[0].item(), rel=1e-12)
    # Half a step ahead of the Ritz value, never behind it.
    assert power_step([weight], [block], 1).sigma >= step.sigma


@pytest.mark.parametrize("n_iterations", [0, 1, 4])
@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (1, 1), (1, 6), (6, 1)])
def test_zero_weight(shape, n_iterations):
    weight = torch.zeros(shape)
    block = start(weight, 3)
    step = power_step([weight], [block], n_iterations)
    assert step.sigma.item() == 0
    sides = [step.left[0], step.right[0]]
    assert all(side.isfinite().all() for side in sides)
    # The image of a zero weight has no direction. It is the left vector, or the right one of a wide weight.
    image, source = sides if shape[0] >= shape[1] else reversed(sides)
    assert image.count_nonzero() == 0
    assert source.norm().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(step.vectors[0], block)


def test_a_block_comes_back_after_a_zero_weight():
    weight = matrix_of(40, 30, geometric(30, 0.7)).float()
    step = power_step([torch.zeros(40, 30)], [start(weight)], 3)
    step = power_step([weight], step.vectors, 6)
    assert step.sigma.item() == pytest.approx(1, rel=CONVERGED)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n_iterations", [0, 1, 3])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 1)])
def test_weights_that_are_not_finite_show_as_nan_and_spare_the_block(shape, whole, n_iterations, bad):
    weight = torch.randn(shape, generator=generator())
    weight[...] = bad if whole else weight
    weight[0, 0] = bad
    good = torch.randn(shape, generator=generator(1))
    blocks = [start(weight, 3), start(good, 3)]
    # Of one shape, so in one batch with a good weight, which must not suffer.
    step = power_step([weight, good], blocks, n_iterations)
    assert step.sigma[0].isnan()
    assert torch.equal(step.vectors[0], blocks[0])
    alone = power_step([good], blocks[1:], n_iterations)
    torch.testing.assert_close(step.sigma[1], alone.sigma[0], rtol=1e-6, atol=0)
    check_step(good, step, index=1)


def test_batching_by_shape_changes_nothing():
    shapes = [(9, 6), (6, 9), (9, 6), (9, 9), (6, 9), (1, 4), (9, 6)]
    dtypes = [torch.float32] * 2 + [torch.float64] + [torch.bfloat16] * 2 + [torch.float32] * 2
    weights = [
        torch.randn(s, generator=generator(i), dtype=torch.float64).to(d)
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    # The last weight has the first one's shape but another block size: a batch of its own.
    blocks = [start(w, 2 if i == 6 else 4, seed=i) for i, w in enumerate(weights)]
    together = power_step(weights, blocks, 2)
    assert together.sigma.dtype == torch.float64  # one weight is
    for i, (weight, block) in enumerate(zip(weights, blocks, strict=True)):
        alone = power_step([weight], [block], 2)
        tolerance = ROUNDING[block.dtype]
        torch.testing.assert_close(together.sigma[i], alone.sigma[0].double(), rtol=tolerance, atol=0)
        outer, expected = (torch.outer(s.left[j], s.right[j]) for s, j in ((together, i), (alone, 0)))
        torch.testing.assert_close(outer, expected, rtol=0, atol=100 * tolerance)
        assert together.vectors[i].shape == block.shape
        check_orthonormal(together.vectors[i], weight.shape, weight.dtype)


def test_any_strides():
    storage = torch.randn(20, 31, generator=generator())
    views = [storage.T, storage[:, ::2], storage[::3, 4:], storage[:1].expand(9, 31), storage.flip(0)]
    for view in views:
        step = power_step([view], [start(view)], 2)
        dense = power_step([view.clone(memory_format=torch.contiguous_format)], [start(view)], 2)
        torch.testing.assert_close(step.sigma, dense.sigma, rtol=1e-6, atol=0)
        check_step(view, step)


def test_inputs_are_not_written():
    weight = torch.randn(6, 5, generator=generator(), requires_grad=True)
    block = start(weight, 3)
    copies = weight.detach().clone(), block.clone()
    step = power_step([weight], [block], 3)
    assert torch.equal(weight, copies[0])
    assert torch.equal(block, copies[1])
    assert not any(t.requires_grad for t in (step.sigma, *step.left, *step.right, *step.vectors))


def test_a_block_follows_a_crossing_that_leaves_one_vector_behind():
    # MATH.md section 2: the tracked direction was pushed down, and the second value now lies 5% above it. One vector
    # was orthogonal to it but for rounding, and needs hundreds of steps; in a block the other one is there already.
    u, v = orthonormal_columns(64, 64, 1), orthonormal_columns(64, 64, 2)
    rest = [0.5] * 62
    before = ((u * torch.tensor([1.05, 1.0, *rest]).double()) @ v.T).float()
    after = ((u * torch.tensor([1.0, 1.05, *rest]).double()) @ v.T).float()

    def steps_until_found(block_size):
        block = power_step([before], [start(before, block_size)], 200).vectors[0]
        for k in range(1, 400):
            step = power_step([after], [block], 1)
            block = step.vectors[0]
            if step.sigma.item() > 1.05 * (1 - 1e-3):
                return k
        return math.inf

    assert steps_until_found(1) > 50
    assert steps_until_found(2) == 1
    assert steps_until_found(8) == 1


def test_a_block_tracks_a_weight_that_is_pushed_down_at_its_top():
    # Gradient descent on log sigma_1, whose top values meet and cross again and again.
    def errors(block_size):
        weight = torch.randn(96, 64, generator=generator(), dtype=torch.float64)
        block = power_step([weight], [start(weight, block_size)], 200).vectors[0]
        found = []
        for _ in range(150):
            step = power_step([weight], [block], 1)
            block = step.vectors[0]
            found.append(1 - step.sigma.item() / largest_singular_value(weight).item())
            weight = weight - 0.1 * torch.outer(step.left[0], step.right[0])
        return torch.tensor(found)

    one, eight = errors(1), errors(8)
    assert eight.median() < 1e-3
    assert eight.median() < one.median() / 10


def test_rayleigh_ritz_orders_from_the_largest():
    images = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    rotation, scale = rayleigh_ritz(images)
    assert scale.item() == 3
    torch.testing.assert_close((rotation @ images).norm(dim=-1), torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("images", [torch.zeros(2, 3), torch.full((2, 3), math.nan)])
def test_rayleigh_ritz_of_nothing_is_a_permutation(images):
    rotation, scale = rayleigh_ritz(images)
    assert scale.item() == 1
    assert torch.equal(rotation @ rotation.T, torch.eye(2))


def test_orthonormalise_completes_a_basis_and_falls_back():
    fallback = torch.eye(3)[:2]
    deficient = torch.tensor([[1e-30, 0.0, 0.0], [1e-30, 0.0, 0.0]])
    basis = orthonormalise(deficient, fallback)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2))
    assert basis[0].abs().tolist() == [1, 0, 0]
    for unusable in (torch.zeros(2, 3), torch.tensor([[math.nan, 0, 0], [0, 1, 0]]), torch.full((2, 3), math.inf)):
        assert torch.equal(orthonormalise(unusable, fallback), fallback)


LONG_ROWS = 4096  # of a map of features


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", [1.0, 0.5, 0.15, 1e-2, 1e-4, 1e-9, 0.0])
def test_long_rows_are_orthonormalised_in_their_order(distance, dtype, magnitude):
    rows = nearly_dependent(distance, LONG_ROWS, 4).to(dtype)
    basis = orthonormalise(magnitude * rows, torch.full_like(rows, math.nan))
    check_orthonormal(basis, (LONG_ROWS,), dtype)
    # Each row lies in the span of the basis up to it; what has no direction of its own says nothing.
    outside = rows.double() - (rows.double() @ basis.double().T).tril() @ basis.double()
    assert outside.norm(dim=1).max() < ORTHONORMAL[dtype]


def test_gram_matrices_of_long_rows_keep_their_digits():
    # The last is the map of 64 x 112 x 112: summed in one go in fp32 it is off by 1e-5.
    for n in (1, 63, 8192, 65536, 3 * 32 * 32, 802_816):
        rows = torch.rand(2, 3, n, generator=generator())
        exact = rows.double() @ rows.double().mT
        torch.testing.assert_close(gram_matrix(rows), exact, rtol=2e-6, atol=0)


def iterate_diagonal(factors, block, n_iterations):
    """Iterate the diagonal matrix of `factors`, known by its maps."""
    return iterate(lambda rows: rows * factors, lambda rows: rows * factors, block, n_iterations)


def unit_block(r):
    return orthonormal_columns(LONG_ROWS, r, 5).T.float()


@pytest.mark.parametrize("scale", [1.0, 1e-37, 1e-30, 1e-19, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("r", [1, 8])
def test_maps_of_long_vectors_at_any_scale(scale, r):
    factors = (scale * torch.tensor(geometric(12, 0.5) + [1e-3] * (LONG_ROWS - 12), dtype=torch.float64)).float()
    for n_iterations in (0, 1, 12):
        sigma, left, right, block = iterate_diagonal(factors, unit_block(r), n_iterations)
        truth = factors[0].double()
        assert sigma <= truth * (1 + ROUNDING[torch.float32])
        quotient = (left.double() * factors.double() * right.double()).sum()
        assert quotient.item() == pytest.approx(sigma.item(), abs=truth.item() * ROUNDING[torch.float32])
        check_orthonormal(block, (LONG_ROWS,))
    assert sigma.item() == pytest.approx(truth.item(), rel=CONVERGED)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_maps_of_long_vectors_and_low_rank(rank):
    factors = torch.zeros(LONG_ROWS)
    factors[:rank] = torch.tensor([3.0, 2.0, 1.0])[:rank]
    start_block = block = unit_block(8)
    for _ in range(10):
        sigma, left, right, block = iterate_diagonal(factors, block, 1)
        check_orthonormal(block, (LONG_ROWS,))
    assert sigma.item() == pytest.approx(3.0 if rank else 0.0, rel=ROUNDING[torch.float32])
    assert right.norm().item() == pytest.approx(1, abs=1e-6)
    if rank == 0:
        assert torch.equal(block, start_block)
        assert left.count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_maps_of_long_vectors_that_are_not_finite(bad):
    factors = torch.ones(LONG_ROWS)
    factors[7] = bad
    start_block = unit_block(4)
    sigma, _, _, block = iterate_diagonal(factors, start_block, 2)
    assert sigma.isnan()
    assert torch.equal(block, start_block)


COMPUTED_IN = {torch.float64: torch.float64} | dict.fromkeys(
    [torch.float32, torch.float16, torch.bfloat16], torch.float32
)


@pytest.mark.parametrize(("grad_dtype", "dtype"), COMPUTED_IN.items(), ids=str)
def test_rank_one_update(grad_dtype, dtype):
    shapes = [(4, 3), (1, 1), (1, 5), (5, 1)]
    grads = [torch.randn(s, generator=generator(i)).to(grad_dtype) for i, s in enumerate(shapes)]
    left = [torch.randn(m, generator=generator(i), dtype=dtype) for i, (m, _) in enumerate(shapes)]
    right = [torch.randn(n, generator=generator(i + 9), dtype=dtype) for i, (_, n) in enumerate(shapes)]
    coefficients = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    exact = [
        g.double() + c * torch.outer(u.double(), v.double())
        for g, c, u, v in zip(grads, coefficients, left, right, strict=True)
    ]
    pointers = [g.data_ptr() for g in grads]
    rank_one_update_(grads, coefficients, left, right)
    assert [g.data_ptr() for g in grads] == pointers
    # One rounding to the gradient's dtype: half an ulp, and a little for the sum in fp32.
    half_ulp = torch.finfo(grad_dtype).eps * 0.51
    for grad, expected in zip(grads, exact, strict=True):
        assert ((grad.double() - expected).abs() <= half_ulp * expected.abs() + 4 * torch.finfo(dtype).eps).all()


def test_rank_one_update_writes_into_strided_gradients():
    storage = torch.zeros(6, 8)
    rank_one_update_([storage[::2, 1::2]], torch.ones(1), [torch.ones(3)], [torch.ones(4)])
    assert storage.sum() == 12
    assert storage[::2, 1::2].sum() == 12


def test_a_zero_coefficient_adds_nothing_even_with_nan_vectors():
    grads = [torch.ones(2, 2), torch.ones(2, 2)]
    vectors = [torch.full((2,), math.nan), torch.ones(2)]
    rank_one_update_(grads, torch.tensor([0.0, 0.0]), vectors, vectors)
    assert all(torch.equal(g, torch.ones(2, 2)) for g in grads)


def test_mismatched_lists_are_an_error():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        power_step([torch.ones(2, 2)], [])


def test_compute_dtype():
    assert {dtype: compute_dtype(dtype) for dtype in COMPUTED_IN} == COMPUTED_IN
