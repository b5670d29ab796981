import math
from itertools import pairwise

import pytest
import torch
from support.truth import norm

from lightning_lip.rebalancing.least_product import LARGEST_LOG_FACTOR, evened, least_product


def matrices(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for columns, rows in pairwise(sizes)]


def rescaled(weights, logs):
    ends = [torch.zeros(weights[0].shape[1]).double(), *logs, torch.zeros(len(weights[-1])).double()]
    return [
        after.exp()[:, None] * weight * (-before).exp()
        for weight, before, after in zip(weights, ends, ends[1:], strict=False)
    ]


def log_product(weights, logs):
    return sum(math.log(norm(weight)) for weight in rescaled(weights, logs))


def zeros(weights):
    return [torch.zeros(len(weight), dtype=torch.float64) for weight in weights[:-1]]


@pytest.mark.parametrize(
    "sizes", [(5, 7, 3), (13, 20, 20, 20, 1), (1, 6, 1), (4, 1, 4), (2, 9, 1, 9, 2), (3, 40, 4, 3)]
)
def test_of_positive_weights_the_least_product_is_the_norm_of_the_matrix_product(sizes):
    # With u, v the leading singular vectors of W_n .. W_1, the factors sqrt(backward / forward) reach it.
    weights = [w.abs() for w in matrices(*sizes)]
    exact = math.log(torch.linalg.matrix_norm(torch.linalg.multi_dot(weights[::-1]), 2))
    found = log_product(weights, least_product(weights))
    assert exact - 1e-9 <= found <= exact + 1e-4


def test_of_a_row_after_a_column_the_least_product_is_the_sum_of_the_paths():
    column, row = matrices(1, 30, 1)
    exact = float((row.flatten() * column.flatten()).abs().sum())
    assert math.exp(log_product([column, row], least_product([column, row]))) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_slopes_vanish_at_a_smooth_minimum(seed):
    weights = [w.abs() for w in matrices(4, 6, 5, 3, seed=seed)]
    found = rescaled(weights, least_product(weights))
    bases = [torch.linalg.svd(w) for w in found]
    for before, after in pairwise(bases):
        assert before.S[0] > 1.2 * before.S[1]
        assert (before.U[:, 0].square() - after.Vh[0].square()).abs().max() < 1e-2


@pytest.mark.parametrize("sizes", [(13, 20, 20, 20, 1), (6, 12, 8, 5), (3, 4, 3)])
def test_no_other_factors_are_better(sizes):
    weights = matrices(*sizes)
    logs = least_product(weights)
    least = log_product(weights, logs)
    assert least < log_product(weights, zeros(weights))
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(100):
            noise = [size * torch.randn(log.shape, generator=generator, dtype=torch.float64) for log in logs]
            near = log_product(weights, [log + n for log, n in zip(logs, noise, strict=True)])
            assert least <= near + 1e-3
            assert least <= log_product(weights, noise) + 1e-3


def test_the_log_product_is_convex_in_the_log_factors():
    weights = matrices(6, 12, 8, 5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        first, second = (
            [2 * torch.randn(z.shape, generator=generator, dtype=torch.float64) for z in zeros(weights)] for _ in "ab"
        )
        middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        ends = (log_product(weights, first) + log_product(weights, second)) / 2
        assert log_product(weights, middle) <= ends + 1e-12


def test_repeated_leading_singular_values():
    # Nothing is to be gained from orthogonal layers, where every singular value is 1.
    weights = [torch.linalg.qr(w).Q for w in matrices(8, 8, 8, 8)]
    logs = least_product(weights)
    assert abs(log_product(weights, logs)) < 1e-9
    # After a rescaling, it is found again.
    disturbed = rescaled(weights, [torch.linspace(-2, 2, 8).double(), torch.linspace(1, -1, 8).double()])
    assert log_product(disturbed, least_product(disturbed)) < 1e-3 < 1 < log_product(disturbed, zeros(disturbed))


def test_units_that_lead_nowhere_get_bounded_factors():
    weights = matrices(5, 9, 7, 2)
    weights[0][:3] = 0  # from nowhere
    weights[1][:, 2:5] = 0  # to nowhere; unit 2 both
    logs = least_product(weights)
    assert log_product(weights, logs) < log_product(weights, zeros(weights))
    alive = [weights[0][5:], weights[1][:, 5:], weights[2]]
    assert log_product(weights, logs) == pytest.approx(log_product(alive, least_product(alive)), abs=1e-3)
    assert logs[0][2] == 0
    # Once their share is negligible, nothing drives them on.
    assert max(float(log.abs().max()) for log in logs) < 12


def test_a_chain_without_a_path_stays_within_the_limit():
    # Without a limit the product could be made as small as one likes.
    weights = [torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()]
    logs = least_product(weights)
    assert log_product(weights, logs) < -10
    assert float(logs[0].abs().max()) <= LARGEST_LOG_FACTOR


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_magnitudes_do_not_matter(scale):
    weights = matrices(6, 12, 8, 5)
    expected = least_product(weights)
    found = least_product([weights[0] * scale, weights[1], weights[2] / scale])
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


def test_one_layer_and_one_unit():
    assert least_product(matrices(3, 4)) == []
    assert [log.tolist() for log in least_product(matrices(3, 1, 2))] == [[0.0]]


def test_it_is_deterministic():
    weights = matrices(6, 12, 8, 5)
    assert all(torch.equal(a, b) for a, b in zip(least_product(weights), least_product(weights), strict=True))


def test_evened_norms_are_the_geometric_mean():
    weights = matrices(6, 12, 8, 5)
    weights[1] *= 1e30
    logs = evened(weights, zeros(weights))
    norms = [norm(w) for w in rescaled(weights, logs)]
    assert norms == [pytest.approx(norms[0])] * 3
    assert log_product(weights, logs) == pytest.approx(log_product(weights, zeros(weights)))
    assert all(log.unique().numel() == 1 for log in logs)


def test_with_pairs_the_least_is_the_norm_of_the_path_of_the_difference():
    # Of two classes there is one difference (4, 1): sqrt(4^2 1^2 + 1^2 3^2) = 5, against 3 sqrt(17) before.
    weights = [torch.diag(torch.tensor([1.0, 3.0])).double(), torch.tensor([[14.0, -7.0], [10.0, -8.0]]).double()]
    (logs,) = least_product(weights, of_pairs=True)
    first, last = rescaled(weights, [logs])
    assert norm(first) * (last[0] - last[1]).norm().item() == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_with_pairs_no_pair_grows_and_the_slopes_vanish(seed):
    weights = matrices(6, 12, 10, 5, seed=seed)
    logs = least_product(weights, of_pairs=True)
    ratios = []
    for *inner, last in (weights, rescaled(weights, logs)):
        ratios.append(math.prod(map(norm, inner)) * torch.pdist(last))
    worst = (ratios[1] / ratios[0]).max().item()
    assert worst < 0.95
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):  # convex: no factors nearby are better
        others = [log + 0.02 * torch.randn(log.shape, generator=generator, dtype=torch.float64) for log in logs]
        *inner, last = rescaled(weights, others)
        assert (math.prod(map(norm, inner)) * torch.pdist(last) / ratios[0]).max() > worst * (1 - 1e-3)
