"""The norm of a convolution's symbol by plane waves, in plain PyTorch: the specification of the compiled kernels."""

import math

import pytest
import torch
from support.symbols import norm_on_a_grid, random_geometry, random_kernel, start, symbols_at
from torch.nn import functional as F

from lightning_lip.kernels.reference import ReferenceIteration, rank_one_update_
from lightning_lip.kernels.symbol import Symbol, n_cells, random_state, state_shape, symbol_step, unpacked
from lightning_lip.kernels.waves import Geometry, waves_of
from lightning_lip.rigorous import certified_convolution_norm
from lightning_lip.rigorous.convolution import axis_of

# What is compared        bound   why
CONVERGED = 1e-5  #       relative: the acceptance of the issue
ROUNDING = 2e-6  #        relative, of an estimate from below in fp32
GRADIENT = 1e-4  #        relative to the largest entry, after 200 steps

THREE = Geometry(6, 5, 1, (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("seed", range(30))
def test_what_converged_lies_between_the_certificate_and_its_riesz_factor(seed):
    geometry = random_geometry(seed)
    kernel = random_kernel(geometry)
    step = symbol_step(kernel, start(kernel, geometry), geometry, 8, 150)
    settings = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups}
    certified = certified_convolution_norm(kernel, **settings)
    axes = zip(geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    factor = math.prod(axis_of(k, s, d, (0, 0), None, "zeros", None).factor for k, s, d in axes)
    assert (1 - CONVERGED) * certified / factor <= float(step.sigma) <= (1 + CONVERGED) * certified
    assert_is_a_triplet(step, kernel)


def assert_is_a_triplet(step, kernel):
    """Check that sigma is what the two rank-one terms give, and that both vectors are of norm one."""
    left, right = step.left.view(2, -1).double(), step.right.view(2, -1).double()
    found = (left @ kernel.double().flatten(1) * right).sum()
    assert float(found) == pytest.approx(float(step.sigma), rel=1e-5)
    assert float(left.norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "geometry",
    [
        THREE,
        THREE._replace(stride=(2, 2)),
        THREE._replace(dilation=(2, 1), stride=(3, 2)),
        THREE._replace(groups=3),
        Geometry(4, 3, 1, (1, 3), (1, 1), (1, 1)),
        Geometry(4, 3, 1, (4,), (2,), (1,)),
        Geometry(4, 3, 1, (2, 2), (2, 2), (1, 1)),
    ],
)
def test_against_a_dense_grid(geometry):
    kernel = random_kernel(geometry)
    sigma = float(symbol_step(kernel, start(kernel, geometry), geometry, 8, 150).sigma)
    on_grid = norm_on_a_grid(kernel, geometry)
    # f is a polynomial of degree 2 here: between points of a grid of 48 it rises by (2 pi / 48)^2 / 2 a dimension.
    assert on_grid * (1 - ROUNDING) <= sigma <= on_grid * 1.02


def test_a_transposed_convolution_is_the_adjoint_of_the_one_whose_kernel_lies_as_its_own():
    geometry = Geometry(3, 4, 1, (3, 3), (2, 2), (1, 1))
    kernel = random_kernel(geometry)
    sigma = float(symbol_step(kernel, start(kernel, geometry), geometry, 8, 150).sigma)
    x = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for _ in range(150):  # on a large map it comes close from below
        y = F.conv_transpose2d(x, kernel, stride=2)
        x = F.conv2d(y, kernel, stride=2)
        x = x / x.norm()
    norm = float(F.conv_transpose2d(x, kernel, stride=2).norm())
    assert 0.97 * sigma <= norm <= sigma * (1 + ROUNDING)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation"),
    [
        ((8, 8), (3, 3), (1, 1), (1, 1)),
        ((8, 6), (3, 5), (2, 1), (1, 1)),
        ((9,), (3,), (1,), (2,)),
        ((12, 9), (3, 3), (2, 3), (1, 2)),
        ((4, 4), (5, 5), (1, 1), (1, 1)),  # wider than the map
        ((6, 6), (2, 2), (2, 2), (1, 1)),
    ],
)
@pytest.mark.parametrize("depthwise", [False, True])
def test_circular_against_the_dense_circulant(size, kernel_size, stride, dilation, depthwise):
    rows, columns, groups = (1, 1, 3) if depthwise else (3, 2, 1)
    geometry = Geometry(rows, columns, groups, kernel_size, stride, dilation, size)
    kernel = random_kernel(geometry).double()
    step = symbol_step(kernel, start(kernel, geometry), geometry, 8, 300)
    dense = circulant(kernel, geometry)
    assert float(step.sigma) == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=CONVERGED)


def circulant(kernel, geometry):
    """Return the dense matrix of a circular convolution, by its images of unit vectors."""
    groups, size = geometry.groups, geometry.sizes
    n_in = geometry.columns * groups * math.prod(size)
    basis = torch.eye(n_in, dtype=torch.float64).view(n_in, groups, geometry.columns, *size)
    kernels = kernel.view(groups, geometry.rows, geometry.columns, *geometry.kernel_size)
    out_size = [n // s for n, s in zip(size, geometry.stride, strict=True)]
    out = torch.zeros(n_in, groups, geometry.rows, *out_size, dtype=torch.float64)
    for tap in torch.cartesian_prod(*map(torch.arange, geometry.kernel_size)).view(-1, len(size)).tolist():
        moved = basis
        for axis, (t, s, d) in enumerate(zip(tap, geometry.stride, geometry.dilation, strict=True)):
            moved = moved.roll(-t * d, 3 + axis)
            moved = moved.index_select(3 + axis, torch.arange(0, size[axis], s))
        own = kernels[(slice(None), slice(None), slice(None), *tap)]
        out += torch.einsum("gri,ngi...->ngr...", own, moved)
    return out.flatten(1)


def test_the_gradient_is_that_of_the_dense_symbol_at_the_frequency_that_was_found():
    for geometry in (THREE, THREE._replace(stride=(2, 1)), THREE._replace(groups=2)):
        kernel = random_kernel(geometry)
        state = start(kernel, geometry)
        step = symbol_step(kernel, state, geometry, 8, 200)
        wave = unpacked(step.state, geometry)
        w = wave.w[int(wave.sigma.argmax())].double()
        parameter = kernel.double().requires_grad_()
        torch.linalg.matrix_norm(symbols_at(parameter, geometry, w), 2).max().backward()
        grad = torch.zeros_like(kernel)
        rank_one_update_([grad], torch.ones(1), [step.left], [step.right])
        torch.testing.assert_close(grad.double(), parameter.grad, rtol=0, atol=GRADIENT * parameter.grad.abs().max())


def test_sigma_of_every_step_is_never_above_the_norm():
    kernel = random_kernel(THREE)
    state = random_state(THREE, torch.Generator().manual_seed(0))
    top = float(symbol_step(kernel, start(kernel, THREE), THREE, 8, 200).sigma)
    for _ in range(20):
        step = symbol_step(kernel, state, THREE, 4)
        assert float(step.sigma) <= top * (1 + ROUNDING)
        state = step.state
    assert float(step.sigma) >= 0.99 * top


def test_every_cell_is_seen_in_turn():
    kernel = random_kernel(THREE)
    state = start(kernel, THREE)
    n, seen = n_cells(THREE), set()
    for _ in range(math.ceil(n / 2)):  # two of four waves
        after = symbol_step(kernel * 1.01, state, THREE, 4).state  # another sigma for those that are worked on
        changed = (unpacked(after, THREE).sigma != unpacked(state, THREE).sigma).nonzero().flatten().tolist()
        assert len(changed) <= 4
        seen |= set(changed)
        state = after
    assert seen == set(range(n))


def test_no_iterations_leave_the_state():
    kernel = random_kernel(THREE)
    state = start(kernel, THREE)
    kept = state.clone()
    step = symbol_step(kernel, state, THREE, 8, 0)
    assert torch.equal(state, kept)
    assert torch.equal(step.state, kept)
    assert float(step.sigma) == pytest.approx(float(symbol_step(kernel, state, THREE, 8, 1).sigma), rel=1e-2)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_kernel_that_is_zero_or_not_finite_keeps_its_vectors_and_recovers(value):
    kernel = random_kernel(THREE)
    state = start(kernel, THREE)
    before = unpacked(state, THREE)
    bad = kernel.clone() * 0 if value == 0 else kernel.clone().index_fill(0, torch.tensor([1]), value)
    step = symbol_step(bad, state, THREE, n_cells(THREE))
    after = unpacked(step.state, THREE)
    assert float(step.sigma) == 0 if value == 0 else step.sigma.isnan()
    assert torch.equal(after.v, before.v)
    assert torch.equal(after.w, before.w)
    assert not after.before.any()
    again = symbol_step(kernel, step.state, THREE, 8, 100)
    assert float(again.sigma) == pytest.approx(float(symbol_step(kernel, state, THREE, 8, 100).sigma), rel=CONVERGED)


def test_a_symbol_that_vanishes_in_cells_gives_no_nan():
    kernel = torch.ones(THREE.shape)
    step = symbol_step(kernel, start(kernel, THREE), THREE, n_cells(THREE), 20)
    assert float(step.sigma) == pytest.approx(9 * math.sqrt(30), rel=CONVERGED)
    assert step.state.isfinite().all()


@pytest.mark.parametrize("exponent", [-30, 30])
def test_extreme_scales(exponent):
    kernel = random_kernel(THREE)
    truth = float(symbol_step(kernel, start(kernel, THREE), THREE, 8, 100).sigma)
    scaled = kernel * 10.0**exponent
    sigma = float(symbol_step(scaled, start(scaled, THREE), THREE, 8, 100).sigma)
    assert sigma / 10.0**exponent == pytest.approx(truth, rel=CONVERGED)


def test_autocast_does_not_reach_the_products():
    kernel = random_kernel(THREE)
    state = start(kernel, THREE)
    wanted = symbol_step(kernel, state, THREE, 8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(symbol_step(kernel, state, THREE, 8, 2).state, wanted.state)


def test_momentum_saves_steps(monkeypatch):
    geometry = Geometry(24, 24, 1, (3, 3), (1, 1), (1, 1))
    kernel = random_kernel(geometry)
    state = random_state(geometry, torch.Generator().manual_seed(1))
    top = float(symbol_step(kernel, state, geometry, n_cells(geometry), 400).sigma)

    def error():
        return 1 - float(symbol_step(kernel, state, geometry, n_cells(geometry), 25).sigma) / top

    with_momentum = error()
    monkeypatch.setattr("lightning_lip.kernels.symbol.MOMENTUM", 0.0)
    assert with_momentum < error() / 1.5


def test_the_state_is_packed_by_cells():
    geometry = THREE._replace(groups=2, stride=(2, 2))
    state = random_state(geometry, torch.Generator().manual_seed(0))
    wave = unpacked(state, geometry)
    n = n_cells(geometry)
    assert state.shape == state_shape(geometry) == (n, 4 * 5 * 4 + 2 + 2)
    assert [tuple(part.shape) for part in wave] == [(n, 2, 20), (n, 2, 20), (n, 2), (n,), (n,)]
    torch.testing.assert_close(wave.v.flatten(1).norm(dim=1), torch.ones(n))
    assert torch.equal(wave.w, waves_of(geometry).centres.float().repeat(2, 1))
    wave.sigma.fill_(7)
    assert (state[:, -2] == 7).all(), "views"
    assert torch.equal(random_state(geometry, torch.Generator().manual_seed(0))[:, :-2], state[:, :-2])


def test_scales_of_rows_are_those_of_the_kernel_and_their_gradient_is_the_weights():
    kernel, scale = random_kernel(THREE), torch.linspace(-1, 2, 6)
    scaled = kernel * scale[:, None, None, None]
    iterations = [ReferenceIteration([k], [start(scaled, THREE)], [Symbol(THREE, 8)]) for k in (kernel, scaled)]
    got, wanted = iterations[0].power_step([kernel], 3, [scale]), iterations[1].power_step([scaled], 3)
    torch.testing.assert_close(got.sigma, wanted.sigma)
    grads = [torch.zeros_like(kernel) for _ in range(2)]
    for iteration, grad in zip(iterations, grads, strict=True):
        iteration.rank_one_update_([grad], torch.ones(1))
    torch.testing.assert_close(grads[0], grads[1] * scale[:, None, None, None])
