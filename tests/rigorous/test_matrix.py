import math
from fractions import Fraction

import mpmath
import pytest
import torch

from lightning_lip.rigorous import matrix as matrix_norms
from lightning_lip.rigorous.matrix import certified_largest_eigenvalue, certified_matrix_norm, scaled_matrix

N_MATRICES = 500

SHAPES = [(1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (7, 4), (6, 6), (8, 3)]


def gaussian(m, n, generator):
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def rank_one(m, n, generator):
    return gaussian(m, 1, generator) @ gaussian(1, n, generator)


def clustered(m, n, generator):
    u, _, v = torch.linalg.svd(gaussian(m, n, generator), full_matrices=False)
    values = 1 + 1e-13 * torch.rand(min(m, n), generator=generator, dtype=torch.float64)
    return u @ torch.diag(values) @ v


def signs(m, n, generator):
    return gaussian(m, n, generator).sign()


def graded(m, n, generator):
    # Entries 300 orders of magnitude apart: the small ones underflow once the large ones are scaled to 1.
    return gaussian(m, n, generator) * 10 ** torch.linspace(150, -150, n, dtype=torch.float64)


def hilbert(m, n, generator):
    return 1 / (torch.arange(m, dtype=torch.float64)[:, None] + torch.arange(n) + 1)


def cancelling(m, n, generator):
    # Nearly parallel rows: the Gram matrix is singular to the last bit.
    return rank_one(m, n, generator) + 1e-9 * gaussian(m, n, generator)


KINDS = [gaussian, rank_one, clustered, signs, graded, hilbert, cancelling]

CASTS = {
    "fp64": lambda w: w,
    "fp64 * 1e150": lambda w: w / w.abs().max() * 1e150,
    "fp64 * 1e-150": lambda w: w / w.abs().max() * 1e-150,
    "fp64 subnormal": lambda w: w / w.abs().max() * 3e-310,
    "fp32": lambda w: w.clamp(-1e30, 1e30).float(),
    "fp32 * 1e30": lambda w: (w / w.abs().max() * 1e30).float(),
    "fp32 * 1e-30": lambda w: (w / w.abs().max() * 1e-30).float(),
    "fp32 subnormal": lambda w: (w / w.abs().max() * 1e-41).float(),
    "bf16": lambda w: w.clamp(-1e30, 1e30).bfloat16(),
    "fp16": lambda w: (w / w.abs().max()).half(),
}


def matrices(n_matrices=N_MATRICES):
    generator = torch.Generator().manual_seed(0)
    for index in range(n_matrices):
        kind = KINDS[index % len(KINDS)]
        shape = SHAPES[(index // len(KINDS)) % len(SHAPES)]
        # 500 is not a multiple of 7 * 8: the casts meet all kinds and shapes in turn.
        cast = list(CASTS)[(index // 3) % len(CASTS)]
        yield f"{kind.__name__} {shape} {cast}", CASTS[cast](kind(*shape, generator))


def true_norm(weight):
    """Return the spectral norm with 50 digits."""
    with mpmath.workdps(50):
        exact = mpmath.matrix(weight.double().tolist())
        if weight.shape[0] > weight.shape[1]:
            exact = exact.T
        gram = exact * exact.T
        return mpmath.sqrt(max(mpmath.eigsy(gram, eigvals_only=True)))


@pytest.fixture(scope="module")
def cases():
    return [(name, weight, true_norm(weight)) for name, weight in matrices()]


def test_never_below_50_digits_and_tight(cases):
    below_without_certificate = 0
    for name, weight, truth in cases:
        bound = certified_matrix_norm(weight)
        assert mpmath.mpf(bound) >= truth, name
        # 1e-11 is where the first factorisation is tried; a subnormal bound moves in steps of 5e-324.
        assert mpmath.mpf(bound) <= truth * (1 + mpmath.mpf("1.2e-11")) + 5e-323, name
        largest = torch.linalg.svdvals(weight.double())[0].item()
        below_without_certificate += mpmath.mpf(largest) < truth
    # The test is sharp enough to see that a plain fp64 decomposition is no upper bound.
    assert below_without_certificate > N_MATRICES / 4


@pytest.mark.parametrize("with_error_terms", [True, False])
def test_error_terms_are_needed_and_suffice(with_error_terms, monkeypatch):
    # 1 + k 2^-54: added to 1 one by one, every term is lost, whatever the number of partial sums.
    n_small = 60_000
    row = torch.cat([torch.ones(1), torch.full((n_small,), 2.0**-27)]).double()
    weight = torch.block_diag(row[None], row[None])
    truth_squared = 1 + Fraction(n_small, 2**54)
    monkeypatch.setattr(matrix_norms, "FIRST_TOLERANCE", 1e-16)
    if not with_error_terms:
        monkeypatch.setattr(matrix_norms, "gamma", lambda n_roundings: 0.0)
    bound = certified_matrix_norm(weight, 1.0)
    assert (Fraction(bound) ** 2 >= truth_squared) is with_error_terms
    assert bound == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("estimate", [1e-300, 0.0, -1.0, math.nan, math.inf, 1e300, 0.5, 0.99, 1.0, 1.01, 2.0])
def test_a_poor_estimate_costs_tightness_only(estimate):
    weight = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    # The truth is 1 up to rounding; the Frobenius norm, sqrt(40), is the worst that may come out.
    bound = certified_matrix_norm(weight, estimate)
    assert 1 - 1e-14 <= bound <= max(1.1, min(estimate, math.sqrt(40))) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(200, 300), (700, 170)])
def test_lanczos_finds_the_norm_of_larger_matrices(shape):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    truth = torch.linalg.svdvals(weight)[0].item()
    assert truth * (1 - 1e-14) <= certified_matrix_norm(weight) <= truth * (1 + 1e-6)


def test_lanczos_that_breaks_down_early():
    # Rank 3 at size 200: the Krylov space is exhausted after a few steps.
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(200, 3, generator=generator) @ torch.randn(3, 400, generator=generator)
    truth = torch.linalg.svdvals(weight.double())[0].item()
    assert truth * (1 - 1e-14) <= certified_matrix_norm(weight) <= truth * (1 + 1e-9)


def test_degenerate_matrices():
    assert certified_matrix_norm(torch.zeros(3, 4)) == 0.0
    assert certified_matrix_norm(torch.zeros(0, 4)) == 0.0
    assert certified_matrix_norm(torch.tensor([[-3.0]])) == 3.0
    assert certified_matrix_norm(torch.tensor([[5e-324]], dtype=torch.float64)) == 5e-324
    assert certified_matrix_norm(torch.full((4, 4), 1.7e308, dtype=torch.float64)) == math.inf
    assert certified_matrix_norm(torch.tensor([[1e308, 1e308]], dtype=torch.float64)) == pytest.approx(
        math.sqrt(2) * 1e308
    )


def test_layouts_modes_and_wrappers_change_nothing():
    weight = torch.nn.Parameter(torch.randn(5, 9, generator=torch.Generator().manual_seed(4)))
    bound = certified_matrix_norm(weight)
    # Another layout may be summed up in another order: an upper bound as well, and as tight.
    truth = true_norm(weight)
    for other in (weight.detach().clone().mT.contiguous().mT, weight.mT, weight.detach().clone().mT.contiguous()):
        assert truth <= mpmath.mpf(certified_matrix_norm(other)) <= truth * (1 + mpmath.mpf("1.2e-11"))
    with torch.inference_mode():
        assert certified_matrix_norm(weight * 1) == bound
    with torch.device("meta"):
        assert certified_matrix_norm(weight) == bound
    with torch.autocast("cpu", torch.bfloat16):
        assert certified_matrix_norm(weight) == bound
    assert weight.grad is None
    state = torch.get_rng_state()
    certified_matrix_norm(torch.ones(300, 300))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights(bad):
    weight = torch.ones(3, 3)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or an infinity: it has no spectral norm"):
        certified_matrix_norm(weight)


@pytest.mark.parametrize(
    "weight", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2) * 1j]
)
def test_what_is_no_real_matrix(weight):
    with pytest.raises(ValueError, match=r"real floating-point matrix of shape \(m, n\), got torch"):
        certified_matrix_norm(weight)


def test_flushed_subnormals_are_refused():
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    try:
        with pytest.raises(RuntimeError, match="set_flush_denormal"):
            certified_matrix_norm(torch.ones(2, 2))
    finally:
        torch.set_flush_denormal(False)


def test_scaling_is_exact():
    for scale in (5e-324, 1e-310, 1e-150, 1.0, 1e150, 1.7e308):
        weight = torch.tensor([[scale, -scale], [0.0, scale / 2]], dtype=torch.float64)
        matrix, exponent = scaled_matrix(weight)
        assert 0.5 <= matrix.abs().max() < 1
        back = [[math.ldexp(x, exponent) for x in row] for row in matrix.tolist()]
        assert back == weight.tolist()


def test_largest_eigenvalue_reads_the_lower_triangle():
    matrix = torch.tensor([[2.0, 99.0], [1.0, 2.0]], dtype=torch.float64)
    assert 3 <= certified_largest_eigenvalue(matrix) < 3 + 1e-9
    assert certified_largest_eigenvalue(matrix, estimate=3.0, sufficient=2.5) == 2.5


def test_the_factorisations_own_error_is_added():
    # No matrix was found whose factor exists below its largest eigenvalue by that much, so the formula is tested.
    matrix = torch.zeros(50, 50, dtype=torch.float64)
    matrix[0, 0] = 1.0
    attempt = 1.0 * (1 + matrix_norms.FIRST_TOLERANCE)
    error = certified_largest_eigenvalue(matrix, estimate=1.0) - attempt
    trace = 49
    assert error >= (50 + 1) * 2**-53 * trace
    assert error <= 2 * (50 + 1) * 2**-53 * trace
