import math

import numpy as np
import pytest

from lightning_lip.projection.caps import bound_caps, joint_caps, log_clip_caps, per_layer_caps, scale_factors

LOG_2 = math.log(2)


def log_norms(spectra):
    return np.log([np.max(spectrum) for spectrum in spectra])


def random_spectra(rng, n_layers):
    """Flat, repeated, steep and single spectra over many scales."""
    spectra = []
    for _ in range(n_layers):
        r = int(rng.integers(1, 30))
        kind = rng.integers(4)
        spectrum = rng.gamma(2, 1, r) if kind == 0 else 1 + rng.uniform(0, 0.2, r)
        if kind == 2:
            spectrum = np.full(r, 1.5)
        if kind == 3:
            spectrum = np.exp(-0.7 * np.arange(r))
        spectra.append(rng.permutation(spectrum) * np.exp(rng.normal(0, 1.5)))
    return spectra


def weights(spectra, metric):
    return np.array([1 / np.max(s) ** 2 if metric == "relative" else 1.0 for s in spectra])


def distance(spectra, caps, w):
    return math.fsum(x * math.fsum(np.maximum(s - c, 0) ** 2) for s, c, x in zip(spectra, caps, w, strict=True))


def lower_bound(spectra, w, D, k):
    """A lower bound of the squared distance to ``sum k u >= D`` (weak duality), without any use of convexity.

    Every layer's ``w phi(u) - lambda k u`` is minimised over [0, D / k] by comparing all its stationary points; any
    lambda gives a bound, the best one is found by bisection.
    """
    layers = []
    for spectrum, weight, multiplicity in zip(spectra, w, k, strict=True):
        s = np.sort(spectrum)[::-1]
        layers.append((s, np.append(s[1:], 0), np.cumsum(s), np.arange(1, len(s) + 1), weight, multiplicity))

    def dual(multiplier):
        total, used = multiplier * D, 0.0
        for s, below, sums, counts, weight, multiplicity in layers:
            root = np.sqrt(np.maximum(sums**2 - 2 * counts * multiplier * multiplicity / weight, 0))
            c = np.concatenate([(sums + root) / (2 * counts), (sums - root) / (2 * counts)])
            inside = (c >= np.tile(below, 2) * (1 - 1e-9)) & (c <= np.tile(s, 2) * (1 + 1e-9)) & (c > 0)
            u = np.clip(np.concatenate([[0.0, D], np.log(s[0] / c[inside])]), 0, D / multiplicity)
            clipped = np.maximum(s - s[0] * np.exp(-u)[:, None], 0)
            values = weight * (clipped**2).sum(1) - multiplier * multiplicity * u
            total += values.min()
            used += multiplicity * u[values.argmin()]
        return total, used

    low, high, best = 0.0, max(4 * weight * s[0] * sums[-1] / m for s, _, sums, _, weight, m in layers), 0.0
    for _ in range(100):
        middle = (low + high) / 2
        value, used = dual(middle)
        best = max(best, value)
        low, high = (middle, high) if used < D else (low, middle)
    return best


@pytest.mark.parametrize("metric", ["relative", "euclidean", "own"])
def test_joint_caps_are_the_global_optimum_up_to_an_excess_of_two(metric):
    """With weights of one's own: multiplicities and layers that are scaled as well."""
    rng = np.random.default_rng(0)
    for trial in range(120):
        n_layers = int(rng.integers(2, 7))
        spectra = random_spectra(rng, n_layers)
        norms = np.exp(log_norms(spectra))
        D = LOG_2 * (1, rng.uniform(0.001, 1))[trial % 5 > 0]
        w, k, frobenius = weights(spectra, metric), np.ones(n_layers), [None] * n_layers
        if metric == "own":
            w, k = rng.uniform(0.1, 10, n_layers), rng.uniform(1, 4, n_layers)
            frobenius = [float(rng.uniform(0.5, 3) * norm) if rng.random() < 0.5 else None for norm in norms]
        target = float(k @ np.log(norms)) - D
        chosen = list(w) if metric == "own" else metric
        result = joint_caps(spectra, target, metric=chosen, multiplicities=k, frobenius=frobenius)
        # A scaled layer costs what clipping its Frobenius norm, as one singular value, would.
        costs = [s if f is None else np.array([f]) for s, f in zip(spectra, frobenius, strict=True)]
        caps = [c if f is None else c / n * f for c, n, f in zip(result.caps, norms, frobenius, strict=True)]
        found = distance(costs, caps, w)
        assert (result.exact, result.rounds) == (True, 1)
        assert math.fsum(map(float.__mul__, k.tolist(), map(math.log, result.caps))) <= target
        assert result.squared_distance == pytest.approx(found, rel=1e-9)
        # The target and the norms' logarithms are rounded: D itself is known to about 1e-14.
        assert found <= lower_bound(costs, w, D, k) * (1 + 1e-9) + 1e-14 * found / D


def test_exact_beyond_an_excess_of_two_against_a_grid():
    rng = np.random.default_rng(2)
    exact = 0
    for _ in range(60):
        spectra = random_spectra(rng, 2)
        D = rng.uniform(1, 1.6) * LOG_2
        result = joint_caps(spectra, log_norms(spectra).sum() - D)
        u = np.linspace(0, D, 20001)
        costs = sum(
            (np.maximum(s / s.max() - np.exp(-x)[:, None], 0) ** 2).sum(1)
            for s, x in zip(spectra, (u, D - u), strict=True)
        )
        if result.exact:
            exact += 1
            assert result.squared_distance <= costs.min() * (1 + 1e-9)
    assert 5 < exact < 60


def test_beyond_the_convex_range_rounds_never_take_a_layer_below_half():
    rng = np.random.default_rng(3)
    for metric in ("relative", "euclidean"):
        for _ in range(50):
            spectra = random_spectra(rng, rng.integers(2, 7))
            D = rng.uniform(0, 20)
            target = log_norms(spectra).sum() - D
            result = joint_caps(spectra, target, metric=metric)
            norms = np.exp(log_norms(spectra))
            assert result.rounds == int(D / (len(spectra) * LOG_2)) + 1
            assert math.fsum(map(math.log, result.caps)) <= target
            assert math.fsum(map(math.log, result.caps)) == pytest.approx(target, abs=1e-12)
            assert (result.caps >= norms * 0.5**result.rounds * (1 - 1e-12)).all()
            assert result.rounds == 1 or not result.exact


@pytest.mark.parametrize("project", [joint_caps, log_clip_caps])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_idempotent_bit_for_bit(project, scale):
    rng = np.random.default_rng(4)
    for _ in range(100):
        spectra = [scale * spectrum for spectrum in random_spectra(rng, rng.integers(1, 7))]
        target = log_norms(spectra).sum() - rng.choice([1e-15, 1e-9, 0.01, 0.5, 5])
        first = project(spectra, target)
        clipped = [np.minimum(s, c) for s, c in zip(spectra, first.caps, strict=True)]
        second = project(clipped, target)
        assert np.array_equal(second.caps, first.caps)
        assert (second.rounds, second.exact, second.squared_distance) == (0, True, 0.0)


@pytest.mark.parametrize("metric", ["relative", "euclidean"])
def test_nearer_than_random_feasible_matrices(metric):
    rng = np.random.default_rng(5)
    shapes = [(5, 3), (4, 5), (1, 4)]
    W = [rng.normal(size=shape) * scale for shape, scale in zip(shapes, (1, 0.2, 4), strict=True)]
    decomposed = [np.linalg.svd(A, full_matrices=False) for A in W]
    spectra = [s for _, s, _ in decomposed]
    target = log_norms(spectra).sum() - 0.6
    result = joint_caps(spectra, target, metric=metric)
    V = [(U * np.minimum(s, c)) @ Vt for (U, s, Vt), c in zip(decomposed, result.caps, strict=True)]
    w = weights(spectra, metric)

    def squared(candidate):
        return sum(x * np.sum((A - B) ** 2) for x, A, B in zip(w, W, candidate, strict=True))

    assert squared(V) == pytest.approx(result.squared_distance, rel=1e-9)
    for trial in range(1000):
        size = 10.0 ** rng.uniform(-4, 0)
        candidate = [
            (B, A)[trial % 2] + size * np.abs(B).max() * rng.normal(size=B.shape) for A, B in zip(W, V, strict=True)
        ]
        excess = sum(math.log(np.linalg.norm(B, 2)) for B in candidate) - target
        # Onto the set's boundary, the layers sharing the excess at random.
        shares = rng.dirichlet(np.ones(3))
        candidate = [B * math.exp(-excess * share) for B, share in zip(candidate, shares, strict=True)]
        assert squared(candidate) >= result.squared_distance * (1 - 1e-9)


@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_caps_are_continuous_also_where_singular_values_cross(eps):
    rng = np.random.default_rng(6)
    for _ in range(50):
        spectra = random_spectra(rng, 4)
        # A crossing: two top values that swap their order.
        spectra[0] = np.append(spectra[0], [spectra[0].max() * (1 + eps / 2)])
        target = log_norms(spectra).sum() - 0.3
        moved = [s * (1 + eps * rng.uniform(-1, 1, len(s))) for s in spectra]
        before, after = (joint_caps(s, target).caps for s in (spectra, moved))
        np.testing.assert_allclose(after, before, rtol=30 * eps)


def test_feasible_spectra_are_returned_bit_for_bit():
    spectra = [np.array([0.1, 3.0]), np.array([1 / 3])]
    for result in (
        joint_caps(spectra, 0.0),
        log_clip_caps(spectra, 0.0),
        per_layer_caps(spectra, [3.0, 1.0]),
        bound_caps(spectra, total, 1e-9),
    ):
        assert result.caps.tolist() == [3.0, 1 / 3]
        assert (result.rounds, result.exact, result.squared_distance) == (0, True, 0.0)
    assert scale_factors(spectra, 0.0).tolist() == [1.0, 1.0]


def test_zero_layers_make_the_product_feasible():
    spectra = [np.zeros(3), np.array([1e6])]
    for result in (joint_caps(spectra, -50.0), log_clip_caps(spectra, -50.0)):
        assert result.caps.tolist() == [0.0, 1e6]
        assert result.rounds == 0
    assert scale_factors(spectra, -50.0).tolist() == [1.0, 1.0]
    assert per_layer_caps(spectra, log_target=0.0).caps.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("D", [1e-12, 0.3, LOG_2, 1.0, 20.0])
def test_a_single_layer_is_clipped_at_the_target(D):
    result = joint_caps([[3.0, 2.9, 0.5]], math.log(3.0) - D)
    assert result.caps[0] == pytest.approx(3.0 * math.exp(-D), rel=1e-14)
    assert math.log(result.caps[0]) <= math.log(3.0) - D
    assert result.exact == (D <= LOG_2)


def test_scales_far_apart():
    for metric in ("relative", "euclidean"):
        for norms in ([1e-30, 1e30], [1e30, 1e30], [1e-30, 1e-30, 1.0]):
            target = sum(map(math.log, norms)) - 0.5
            result = joint_caps([[norm, norm / 2] for norm in norms], target, metric=metric)
            assert math.fsum(map(math.log, result.caps)) <= target
            assert math.fsum(map(math.log, result.caps)) == pytest.approx(target, abs=1e-12)
            # In the Euclidean metric the smallest layers pay for all: the others cost 1e60 times as much.
            if metric == "euclidean":
                paying = np.array(norms) == min(norms)
                assert result.caps[~paying].tolist() == np.array(norms)[~paying].tolist()


def test_own_layers_do_not_depend_on_the_order():
    spectra = random_spectra(np.random.default_rng(7), 5)
    target = log_norms(spectra).sum() - 0.4
    forward, backward = joint_caps(spectra, target), joint_caps(spectra[::-1], target)
    np.testing.assert_allclose(forward.caps, backward.caps[::-1], rtol=1e-12)


def test_truncated_spectra_suffice_where_no_cap_lies_below_them():
    rng = np.random.default_rng(8)
    spectra = [np.sort(rng.uniform(0.5, 1, 40))[::-1] for _ in range(3)]
    whole = joint_caps(spectra, log_norms(spectra).sum() - 0.5)
    outcomes = set()
    for r in (1, 2, 4, 8, 16, 32, 40):
        given = [spectrum[:r] for spectrum in spectra]
        result = joint_caps(given, log_norms(spectra).sum() - 0.5)
        more = [r < 40 and cap < spectrum[-1] for cap, spectrum in zip(result.caps, given, strict=True)]
        outcomes.add(any(more))
        if not any(more):
            np.testing.assert_allclose(result.caps, whole.caps, rtol=1e-12)
        else:
            assert r < 40
            assert not np.allclose(result.caps, whole.caps, rtol=1e-3)
    assert outcomes == {True, False}


def test_log_clip_and_scaling_share_the_excess_equally():
    spectra = [np.array([4.0, 1.0]), np.array([2.0])]
    k = [1.0, 2.0]
    caps = log_clip_caps(spectra, math.log(4.0), multiplicities=k).caps
    np.testing.assert_allclose(caps, np.array([4.0, 2.0]) * 4 ** (-1 / 3), rtol=1e-14)
    np.testing.assert_allclose(scale_factors(spectra, math.log(4.0), multiplicities=k), 4 ** (-1 / 3), rtol=1e-14)
    joint = joint_caps(spectra, math.log(4.0), multiplicities=k)
    log_clip = log_clip_caps(spectra, math.log(4.0), multiplicities=k)
    assert joint.squared_distance < log_clip.squared_distance
    assert not log_clip.exact


def test_per_layer_caps():
    spectra = [np.array([4.0, 1.0]), np.array([0.5])]
    own = per_layer_caps(spectra, [3.0, 2.0], metric="euclidean")
    assert own.caps.tolist() == [3.0, 0.5]
    assert (own.squared_distance, own.rounds, own.exact) == (1.0, 1, True)
    shared = per_layer_caps(spectra, log_target=math.log(0.7), multiplicities=[2.0, 1.0])
    np.testing.assert_allclose(shared.caps, [0.7 ** (1 / 3), 0.5], rtol=1e-14)
    rng = np.random.default_rng(9)
    for _ in range(100):
        target = rng.normal(0, 20)
        caps = per_layer_caps([[1e30]] * 7, log_target=target).caps
        assert math.fsum(map(math.log, caps)) <= target


# Bounds as functions of log sigma: (value, elasticities).
def total(x):
    return float(x.sum()), np.ones_like(x)


def residual(x):
    """1 + prod sigma: the bound of x + f(x)."""
    return float(np.logaddexp(0, x.sum())), np.full_like(x, np.exp(x.sum() - np.logaddexp(0, x.sum())))


def blocks(x):
    """prod (1 + sigma_l)."""
    return float(np.logaddexp(0, x).sum()), np.exp(x - np.logaddexp(0, x))


def largest(x):
    """max sigma_l, branches of separate inputs: not differentiable at the solution."""
    return float(x.max()), (np.arange(len(x)) == x.argmax()).astype(float)


def added(x):
    """sum sigma_l: parallel branches."""
    value = np.logaddexp.reduce(x)
    return float(value), np.exp(x - value)


def concatenated(x):
    """sqrt(sigma_1^2 + (sigma_2 sigma_3 ..)^2)."""
    squares = np.array([2 * x[0], 2 * x[1:].sum()])
    value = np.logaddexp.reduce(squares)
    share = np.exp(squares - value)
    return float(value / 2), np.concatenate([share[:1], np.full(len(x) - 1, share[1])])


BOUNDS = [residual, blocks, largest, added, concatenated]


def feasible_target(rng, bound, spectra, D):
    target = bound(log_norms(spectra))[0] - D
    # 1 + sigma stays above 1.
    return max(target, 0.1) if bound in (residual, blocks) else target


@pytest.mark.parametrize("metric", ["relative", "euclidean"])
def test_bound_caps_of_a_product_are_joint_caps(metric):
    rng = np.random.default_rng(10)
    for _ in range(40):
        spectra = random_spectra(rng, rng.integers(1, 7))
        target = log_norms(spectra).sum() - rng.choice([1e-3, 0.1, 0.6, 3.0, 11.0])
        joint, general = joint_caps(spectra, target, metric=metric), bound_caps(spectra, total, target, metric=metric)
        np.testing.assert_allclose(general.caps, joint.caps, rtol=1e-11)
        assert (general.rounds, general.exact) == (joint.rounds, joint.exact)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("metric", ["relative", "euclidean"])
def test_bound_caps_of_two_layers_against_a_grid(bound, metric):
    rng = np.random.default_rng(11)
    exact = 0
    for _ in range(10):
        spectra = random_spectra(rng, 2)
        x = log_norms(spectra)
        target = feasible_target(rng, bound, spectra, rng.uniform(0.01, 0.3))
        result = bound_caps(spectra, bound, target, metric=metric)
        assert bound(np.log(result.caps))[0] <= target
        if not result.exact:
            continue
        exact += 1
        w = weights(spectra, metric)
        best = math.inf
        centre = x - np.log(result.caps)
        for first in np.concatenate([np.linspace(0, 3, 100), centre[0] * np.linspace(0.999, 1.001, 41)]):
            low, high = 0.0, 8.0
            u = np.array([max(first, 0.0), high])
            if bound(x - u)[0] > target:
                continue
            for _ in range(48):
                u[1] = (low + high) / 2
                low, high = (low, u[1]) if bound(x - u)[0] <= target else (u[1], high)
            u[1] = high
            best = min(best, distance(spectra, np.exp(x - u), w))
        assert result.squared_distance <= best * (1 + 1e-8)
    assert exact >= 6


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("metric", ["relative", "euclidean"])
def test_bound_caps_of_several_layers_against_feasible_points_around_them(bound, metric):
    rng = np.random.default_rng(12)
    exact = 0
    for _ in range(15):
        spectra = random_spectra(rng, rng.integers(3, 7))
        x, w = log_norms(spectra), weights(spectra, metric)
        target = feasible_target(rng, bound, spectra, rng.uniform(0.01, 0.3))
        evaluations = []

        def counted(y, evaluations=evaluations):
            evaluations.append(y)
            return bound(y)

        result = bound_caps(spectra, counted, target, metric=metric)
        assert bound(np.log(result.caps))[0] <= target
        assert len(evaluations) < 60
        exact += result.exact
        u_found = x - np.log(result.caps)
        for _ in range(60):
            u = np.maximum(u_found + 10.0 ** rng.uniform(-5, -1) * rng.normal(size=len(x)), 0)
            low, high = 0.0, 5.0
            while high - low > 1e-12:
                middle = (low + high) / 2
                low, high = (low, middle) if bound(x - u - middle)[0] <= target else (middle, high)
            if (u + high > LOG_2).any():
                continue
            assert distance(spectra, np.exp(x - u - high), w) >= result.squared_distance * (1 - 1e-9)
    assert exact >= 2


def largest_of_two(x):
    value, elasticities = largest(x[:2])
    return value, np.append(elasticities, 0.0)


def test_layers_without_elasticity_are_left_alone():
    spectra = [[8.0, 1.0], [0.5], [3.0]]
    result = bound_caps(spectra, largest_of_two, 0.0)
    np.testing.assert_allclose(result.caps, [1.0, 0.5, 3.0], rtol=1e-12)
    assert result.caps[1:].tolist() == [0.5, 3.0]
    assert result.rounds >= 3


def test_bound_caps_with_a_zero_layer_and_with_a_scaled_one():
    result = bound_caps([[0.0, 0.0], [4.0, 3.9]], blocks, math.log(3.5))
    np.testing.assert_allclose(result.caps, [0.0, 2.5], rtol=1e-12)
    assert result.exact
    assert bound_caps([[0.0, 0.0], [4.0, 3.9]], blocks, math.log(4.0), metric="euclidean").exact
    # Two equal layers, but one of them is scaled and its Frobenius norm is large: the other one pays.
    result = bound_caps([[2.0], [2.0]], added, math.log(3.0), frobenius=[200.0, None])
    assert result.caps[0] > 1.99
    assert result.caps.sum() == pytest.approx(3.0)


def test_unreachable_bounds_are_refused_with_the_smallest_one():
    with pytest.raises(ValueError, match=r"No caps reach the target 0\.9 .*: the smallest bound is 1 "):
        bound_caps([[2.0], [3.0]], residual, math.log(0.9))
    with pytest.raises(ValueError, match=r"the smallest bound is 2\.71828 "):
        bound_caps([[2.0]], lambda x: (1.0, np.zeros(1)), 0.5)
    # Reachable after many rounds, not within one.
    assert bound_caps([[2.0], [3.0]], residual, math.log(1.001)).rounds > 3


def test_branches_whose_layers_have_scales_far_apart():
    """The larger of two products: both tangents hold at once, and some layers end at half their norm."""
    branches = np.arange(9) < 4

    def larger(x):
        first, second = x[branches].sum(), x[~branches].sum()
        return float(max(first, second)), (branches == (first > second)).astype(float)

    rng = np.random.default_rng(14)
    both = 0
    for _ in range(60):
        spectra = [rng.gamma(2, 1, rng.integers(1, 40)) * np.exp(rng.normal(0, 2)) for _ in range(9)]
        x = log_norms(spectra)
        target = min(x[branches].sum(), x[~branches].sum()) - rng.uniform(0.1, 2)
        evaluations = []
        result = bound_caps(spectra, lambda y, e=evaluations: e.append(y) or larger(y), target, metric="euclidean")
        caps = np.log(result.caps)
        assert caps[branches].sum() == pytest.approx(target, abs=1e-11)
        assert caps[~branches].sum() == pytest.approx(target, abs=1e-11)
        assert len(evaluations) < 100
        if result.rounds == 1:
            both += 1
            # Independent branches: each is the joint projection of its own layers.
            for branch in (branches, ~branches):
                own = joint_caps([s for s, b in zip(spectra, branch, strict=True) if b], target, metric="euclidean")
                np.testing.assert_allclose(result.caps[branch], own.caps, rtol=1e-6)
    assert both > 5


def test_a_bound_in_single_precision_still_ends_feasible():
    def rounded(x):
        value, elasticities = concatenated(x)
        return float(np.float32(value)), elasticities.astype(np.float32)

    rng = np.random.default_rng(13)
    for _ in range(30):
        spectra = random_spectra(rng, 4)
        target = concatenated(log_norms(spectra))[0] - 0.2
        coarse, fine = (bound_caps(spectra, bound, target) for bound in (rounded, concatenated))
        assert rounded(np.log(coarse.caps))[0] <= target
        np.testing.assert_allclose(coarse.squared_distance, fine.squared_distance, rtol=1e-4)


def test_a_bound_that_is_not_convex_still_ends_feasible():
    def steps(x):
        return float(np.floor(x.sum() * 10) / 10), np.full_like(x, 0.01)

    result = bound_caps([[2.0], [3.0]], steps, 1.0)
    assert steps(np.log(result.caps))[0] <= 1.0
    assert not result.exact


@pytest.mark.parametrize(
    ("spectra", "arguments", "message"),
    [
        ([], {}, "at least one layer"),
        ([[1.0], []], {}, "layer 1's singular values in a non-empty vector"),
        ([[[1.0]]], {}, "layer 0's singular values in a non-empty vector"),
        ([[1.0], [2.0, math.nan]], {}, "got .* for layer 1"),
        ([[1.0], [math.inf]], {}, "got .* for layer 1"),
        ([[-1.0]], {}, "got .* for layer 0"),
        ([[1.0]], {"log_target": -math.inf}, "finite `log_target`"),
        ([[1.0]], {"log_target": math.nan}, "finite `log_target`"),
        ([[2.0]], {"log_target": -1000.0}, "smallest float64"),
        ([[1.0]], {"metric": "frobenius"}, "one of"),
        ([[1.0]], {"metric": [1.0, 2.0]}, "1 entries of `metric`"),
        ([[1.0]], {"metric": [0.0]}, "positive finite `metric`"),
        ([[1e200]], {"metric": "euclidean"}, "exceeds float64"),
        ([[1.0]], {"frobenius": []}, "1 entries of `frobenius`"),
        ([[2.0]], {"log_target": "1"}, "finite `log_target`.*got '1'"),
        ([[1e308], [1e308]], {"log_target": -1400.0}, "or below 2e-308 of the layer's norm: raise it"),
        ([[1.0]], {"frobenius": [0.0]}, "positive Frobenius norm, got 0.0 for layer 0"),
    ],
)
@pytest.mark.parametrize("project", [joint_caps, lambda spectra, **arguments: bound_caps(spectra, total, **arguments)])
def test_errors(project, spectra, arguments, message):
    with pytest.raises(ValueError, match=message):
        project(spectra, **{"log_target": 0.0, **arguments})


@pytest.mark.parametrize("multiplicities", [[0.0], [-1.0], [math.nan], [1.0, 1.0]])
def test_multiplicities_are_positive_and_one_per_layer(multiplicities):
    with pytest.raises(ValueError, match="`multiplicities`"):
        joint_caps([[1.0]], 0.0, multiplicities=multiplicities)


@pytest.mark.parametrize("arguments", [{}, {"caps": [1.0], "log_target": 0.0}])
def test_per_layer_caps_want_one_of_caps_and_target(arguments):
    with pytest.raises(ValueError, match="exactly one of `caps` and `log_target`"):
        per_layer_caps([[1.0]], **arguments)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((math.nan, [1.0]), "finite value"),
        ((1.0, [1.0, 1.0]), "1 elasticities, got"),
        ((1.0, [-1.0]), "elasticities >= 0"),
        ((1.0, [math.inf]), "elasticities >="),
    ],
)
def test_what_a_bound_returns_is_checked(answer, message):
    with pytest.raises(ValueError, match=message):
        bound_caps([[1.0]], lambda x: answer, 0.0)
