import itertools
import math
from fractions import Fraction

import pytest
import torch
from support.truth import norm

from lightning_lip.constants.modules import GELU, SILU
from lightning_lip.rigorous import chain as chain_bounds
from lightning_lip.rigorous.chain import chain_cost, combettes_pesquet, eclipse_fast, product_bound
from lightning_lip.rigorous.matrix import certified_matrix_norm

RELU = (0.0, 1.0)
# The tighter bounds are never above the product in exact arithmetic; their rounding terms are below this here.
SLACK = 1 + 1e-9

TINY = [(1, 1, 1), (3, 5, 2), (2, 6, 1), (4, 3, 3, 2), (1, 4, 5, 3), (5, 4, 3, 2, 2), (2, 2, 2, 2, 2, 2)]


def random_chain(sizes, seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(m, n, generator=generator, dtype=torch.float64)).to(dtype)
        for n, m in itertools.pairwise(sizes)
    ]


def largest_pattern(weights, slopes):
    """Return the largest norm of W_n D_{n-1} .. D_1 W_1 over diagonal D_i with entries at the ends of the slopes.

    Every Jacobian of the network is such a product or a convex combination of them, layer by layer. With two layers,
    generic biases and no more hidden units than inputs every pattern occurs: it is the Lipschitz constant then.
    """
    largest = 0.0
    sizes = [weight.shape[0] for weight in weights[:-1]]
    for pattern in itertools.product(*(itertools.product(s, repeat=n) for s, n in zip(slopes, sizes, strict=True))):
        jacobian = weights[0].double()
        for weight, diagonal in zip(weights[1:], pattern, strict=True):
            jacobian = weight.double() @ (torch.tensor(diagonal, dtype=torch.float64)[:, None] * jacobian)
        largest = max(largest, norm(jacobian))
    return largest


@pytest.mark.parametrize("sizes", TINY)
@pytest.mark.parametrize("slopes", [RELU, (0.1, 1.0), (0.0, 0.25), (0.5, 2.0)])
def test_between_all_activation_patterns_and_the_product(sizes, slopes):
    for seed in range(3):
        weights, all_slopes = random_chain(sizes, seed), [slopes] * (len(sizes) - 2)
        product = product_bound(weights, all_slopes)
        exact = largest_pattern(weights, all_slopes)
        for bound in (combettes_pesquet, eclipse_fast):
            assert exact * (1 - 1e-13) <= bound(weights, all_slopes) <= product * SLACK


@pytest.mark.parametrize("slopes", [(1 - GELU, GELU), (1 - SILU, SILU), (-1.0, 0.5), (-2.0, -1.0), (-1.0, 1.0)])
def test_combettes_pesquet_with_negative_slopes(slopes):
    for sizes in TINY[:5]:
        weights, all_slopes = random_chain(sizes, 7), [slopes] * (len(sizes) - 2)
        bound = combettes_pesquet(weights, all_slopes)
        assert largest_pattern(weights, all_slopes) * (1 - 1e-13) <= bound
        assert bound <= product_bound(weights, all_slopes) * SLACK


@pytest.mark.parametrize("dims", [(6, 3), (6, 6), (4, 2)])
def test_two_layers_dominate_the_exact_constant_that_inputs_attain(dims):
    # No more hidden units than inputs: the pattern with the largest norm is attained at some input.
    n, hidden = dims
    w1, w2 = random_chain((n, hidden, 2), 11)
    exact = largest_pattern([w1, w2], [RELU])
    attained = 0.0
    for pattern in itertools.product((-1.0, 1.0), repeat=hidden):
        x = torch.linalg.lstsq(w1.double(), torch.tensor(pattern, dtype=torch.float64)).solution
        gates = (w1.double() @ x > 0).double()
        attained = max(attained, norm(w2.double() @ (gates[:, None] * w1.double())))
    assert attained == pytest.approx(exact, rel=1e-12)
    for bound in (combettes_pesquet, eclipse_fast):
        assert bound([w1, w2], [RELU]) >= attained * (1 - 1e-13)


def test_dominate_the_jacobians_of_a_network():
    sizes = (20, 30, 25, 10)
    weights = random_chain(sizes, 3, scale=0.3)
    generator = torch.Generator().manual_seed(0)
    measured = 0.0
    for _ in range(50):
        jacobian = weights[0].double()
        x = jacobian @ torch.randn(20, generator=generator, dtype=torch.float64)
        for weight in weights[1:]:
            jacobian = weight.double() @ ((x > 0)[:, None] * jacobian)
            x = weight.double() @ x.relu()
        measured = max(measured, norm(jacobian))
    product = product_bound(weights, [RELU] * 2)
    for bound in (combettes_pesquet, eclipse_fast):
        # Worth its name on a random network: clearly below the product.
        assert measured < bound(weights, [RELU] * 2) < 0.8 * product


def test_against_hand_derived_values():
    w1, w2, w3 = random_chain((3, 4, 4, 2), 5, dtype=torch.float64)
    s1, s2, s3 = norm(w1), norm(w2), norm(w3)
    theta_2 = norm(w2 @ w1) / 2 + s2 * s1 / 2
    theta_3 = norm(w3 @ w2 @ w1) / 4 + norm(w3 @ w2) * s1 / 4 + s3 * theta_2 / 2
    assert combettes_pesquet([w1, w2], [RELU]) == pytest.approx(theta_2, rel=1e-10)
    assert combettes_pesquet([w1, w2, w3], [RELU] * 2) == pytest.approx(theta_3, rel=1e-10)

    # The paper's recursion, with its multipliers: X_i = l_i I - l_i^2 / 4 W X^-1 W^T, l_i = 2 / ||W X^-1 W^T||.
    x = torch.eye(3, dtype=torch.float64)
    for weight in (w1, w2):
        gram = weight @ torch.linalg.solve(x, weight.T)
        multiplier = 2 / norm(gram)
        x = multiplier * torch.eye(4, dtype=torch.float64) - multiplier**2 / 4 * gram
    expected = math.sqrt(norm(w3 @ torch.linalg.solve(x, w3.T)))
    assert eclipse_fast([w1, w2, w3], [RELU] * 2) == pytest.approx(expected, rel=1e-8)

    # Identities, slopes (1, 1): nothing is lost but the rounding.
    assert combettes_pesquet([w1, w2, w3], [(1.0, 1.0)] * 2) == pytest.approx(norm(w3 @ w2 @ w1), rel=1e-10)
    # Slopes (-b, b): c = 0, only the product is left.
    assert combettes_pesquet([w1, w2], [(-0.5, 0.5)]) == pytest.approx(s1 * s2 / 2, rel=1e-10)
    for bound in (product_bound, combettes_pesquet, eclipse_fast):
        assert bound([w1], []) == pytest.approx(s1, rel=1e-10)


@pytest.mark.parametrize("bound", [product_bound, combettes_pesquet, eclipse_fast])
def test_deep_chains_and_extreme_scales(bound):
    weights = random_chain((4,) * 61, 2, dtype=torch.float64)
    slopes = [RELU] * 60
    reference = bound(weights, slopes[:59])
    assert 0 < reference < math.inf
    # Powers of two far apart change nothing but the exponent, and cancel here.
    scaled = [w * 2.0 ** (300 if i % 2 else -300) for i, w in enumerate(weights)]
    assert bound(scaled, slopes[:59]) == reference
    assert bound([w * 1e30 for w in weights], slopes[:59]) == math.inf
    assert 0 < bound([w * 1e-30 for w in weights], slopes[:59]) < 1e-300
    assert bound([*weights[:30], torch.zeros(4, 4), *weights[31:]], slopes[:59]) == 0.0


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-30, 1e30, 1e300])
def test_subnormal_and_huge_layers(scale):
    inverse = min(1 / scale, 1e300) if scale > 1e-307 else 1e300
    weights = [torch.full((3, 2), scale, dtype=torch.float64), torch.full((2, 3), inverse, dtype=torch.float64)]
    exact = largest_pattern(weights, [RELU])
    for bound in (combettes_pesquet, eclipse_fast):
        assert exact * (1 - 1e-12) <= bound(weights, [RELU]) <= exact * (1 + 1e-6)


def test_rank_deficient_and_orthogonal_layers():
    # W_2 W_1 = 0: the linear part of Combettes-Pesquet vanishes up to its rounding terms.
    w1, w2 = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    assert 0.5 <= combettes_pesquet([w1, w2], [RELU]) < 0.5 + 1e-12
    assert eclipse_fast([w1, w2], [RELU]) <= SLACK
    ones = torch.ones(4, 4)
    for bound in (combettes_pesquet, eclipse_fast):
        assert 16 * (1 - 1e-13) <= bound([ones, ones], [RELU]) <= 16 * SLACK


def test_a_constant_activation_cuts_the_chain():
    weights = random_chain((3, 4, 2), 0)
    for bound in (product_bound, combettes_pesquet, eclipse_fast):
        assert bound(weights, [(0.0, 0.0)]) == 0.0


def test_the_schur_complement_is_proven():
    # Below the true Schur complement by far more than the margin, the factorisation must fail and be widened.
    generator = torch.Generator().manual_seed(4)
    lower = torch.eye(5, dtype=torch.float64) * 0.75
    matrix = torch.randn(3, 5, generator=generator, dtype=torch.float64) / 4
    upper = chain_bounds._schur_upper(lower, matrix)
    true = matrix @ matrix.mT / 0.75
    smallest = torch.linalg.eigvalsh(upper - true)[0].item()
    assert 0 < smallest < 1e-12
    # X that is not positive definite, and numbers that no shift below 1 mends.
    assert chain_bounds._schur_upper(-lower, matrix) is None
    assert chain_bounds._schur_upper(lower * 1e-17, matrix) is None


def test_no_factorisation_means_no_bound(monkeypatch):
    monkeypatch.setattr(chain_bounds, "_schur_upper", lambda lower, matrix: None)
    assert eclipse_fast(random_chain((3, 4, 2), 0), [RELU]) == math.inf


def test_rounding_terms_of_products():
    # As in test_matrix_norms: k terms of 2^-54 are lost beside a 1, in the product W_2 W_1 itself.
    n_small = 60_000
    row = torch.cat([torch.ones(1), torch.full((n_small,), 2.0**-27)]).double()[None]
    weights = [row.mT, row]
    exact = 1 + n_small * 2.0**-54  # ||W_2 W_1||, and so are both sigmas' product
    for slopes in ((1.0, 1.0), RELU):
        assert combettes_pesquet(weights, [slopes]) >= exact
    assert product_bound(weights, [RELU]) >= exact
    assert (row @ row.mT).item() < exact


def test_rounded_slopes():
    # (a + b) / 2 and (b - a) / 2 are rounded, and outwards.
    generator = torch.Generator().manual_seed(0)
    below = 0
    for low, high in torch.rand(200, 2, generator=generator, dtype=torch.float64).tolist():
        exact = (Fraction(low) + Fraction(high)) / 2
        assert exact <= Fraction(chain_bounds._half_up(low + high)) <= exact * (1 + Fraction(1, 2**50))
        below += Fraction((low + high) / 2) < exact
    assert below > 10
    assert chain_bounds._half_up(0.0) == 0.0
    weights = [torch.ones(1, 1)] * 2
    for low, high in ((0.1, 1.1), (-0.3, 0.7), (1 / 3, 2 / 3), (0.1, 0.1)):
        assert max(abs(low), abs(high)) <= combettes_pesquet(weights, [(low, high)]) < high + 1e-12


def test_cost_grows_with_the_cube():
    small, large = (chain_cost(random_chain((n,) * 4, 0)) for n in (10, 20))
    assert 7 < large / small < 9


@pytest.mark.parametrize("bound", [product_bound, combettes_pesquet, eclipse_fast])
@pytest.mark.parametrize(
    ("sizes", "slopes", "message"),
    [
        ([], [], "n >= 1 weights"),
        ([(2, 3), (4, 2)], [], "got 2 weights and 0 pairs"),
        ([(2, 3), (4, 3)], [RELU], r"got shapes \[\(2, 3\), \(4, 3\)\]"),
        ([(2, 3), (4, 2)], [(1.0, 0.0)], r"a <= b, got \(1.0, 0.0\)"),
        ([(2, 3), (4, 2)], [(0.0, math.inf)], "finite slopes"),
        ([(2, 3), (4, 2)], [(math.nan, 1.0)], "finite slopes"),
    ],
)
def test_what_is_no_chain(bound, sizes, slopes, message):
    with pytest.raises(ValueError, match=message):
        bound([torch.ones(size) for size in sizes], slopes)


def test_eclipse_refuses_negative_slopes():
    with pytest.raises(ValueError, match=r"slopes of at least 0, got \[\(-0.1, 1.0\)\]"):
        eclipse_fast(random_chain((2, 3, 1), 0), [(-0.1, 1.0)])


def test_nan_weights():
    weights = random_chain((2, 3, 1), 0)
    weights[1][0, 0] = math.nan
    for bound in (product_bound, combettes_pesquet, eclipse_fast):
        with pytest.raises(ValueError, match="NaN"):
            bound(weights, [RELU])


def test_product_is_the_product():
    weights = random_chain((3, 4, 2), 1)
    expected = certified_matrix_norm(weights[0]) * certified_matrix_norm(weights[1]) * 0.25
    assert expected <= product_bound(weights, [(0.0, 0.25)]) <= expected * (1 + 1e-14)
