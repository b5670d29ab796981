"""Depthwise convolutions in closed form, against dense grids and the certificate."""

import math

import pytest
import torch
from support.symbols import norm_on_a_grid, random_geometry, random_kernel, start

from lightning_lip.kernels.symbol import state_shape, symbol_step
from lightning_lip.kernels.waves import Geometry, dense_grid_of
from lightning_lip.rigorous import certified_convolution_norm

THREE = Geometry(1, 1, 7, (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("seed", range(20))
def test_sigma_is_the_largest_value_of_all_channels(seed):
    geometry = random_geometry(seed, groups=(1, 5, 20), sides=(1,))
    kernel = random_kernel(geometry)
    step = symbol_step(kernel, start(kernel, geometry), geometry, 8)
    settings = {"stride": geometry.stride, "dilation": geometry.dilation, "groups": geometry.groups}
    assert float(step.sigma) <= (1 + 1e-6) * certified_convolution_norm(kernel, **settings)
    n = {1: 720, 2: 60, 3: 16}[len(geometry.kernel_size)]
    assert float(step.sigma) >= (1 - 1e-5) * norm_on_a_grid(kernel, geometry, n)
    left, right = step.left.view(2, -1).double(), step.right.view(2, -1).double()
    found = (left @ kernel.double().flatten(1) * right).sum()
    assert float(found) == pytest.approx(float(step.sigma), rel=1e-5)


def test_nothing_is_kept():
    kernel = random_kernel(THREE)
    state = start(kernel, THREE)
    assert state.shape == state_shape(THREE) == (1, 1)
    assert torch.equal(symbol_step(kernel, state, THREE, 8, 3).state, torch.zeros(1, 1))


@pytest.mark.parametrize("exponent", [-30, 30])
def test_extreme_scales(exponent):
    kernel = random_kernel(THREE)
    truth = float(symbol_step(kernel, start(kernel, THREE), THREE, 8).sigma)
    sigma = float(symbol_step(kernel * 10.0**exponent, start(kernel, THREE), THREE, 8).sigma)
    assert sigma / 10.0**exponent == pytest.approx(truth, rel=1e-5)


def test_zero_and_what_is_not_finite():
    kernel = torch.zeros(THREE.shape)
    step = symbol_step(kernel, start(kernel, THREE), THREE, 8)
    assert float(step.sigma) == 0
    assert not step.left.any()
    kernel[3, 0, 1, 1] = math.nan
    assert symbol_step(kernel, start(kernel, THREE), THREE, 8).sigma.isnan()


@pytest.mark.parametrize(("kernel_size", "points"), [((3, 3), 74), ((5, 5), 290), ((7, 7), 290), ((3, 3, 3), 260)])
def test_the_grid_bounds_what_lies_between_its_points(kernel_size, points):
    dims = len(kernel_size)
    geometry = Geometry(1, 1, 1, kernel_size, (1,) * dims, (1,) * dims)
    grid = dense_grid_of(geometry)
    assert len(grid.points) == points
    n = 2 * max(round(2 * math.pi / float(a)) for a in grid.points[1:].flatten() if a > 0)
    # The worst kernel: all its cosines meet between the points of the grid.
    axes = [torch.polar(torch.ones(k), torch.arange(k) * (2 * math.pi / n)).real for k in kernel_size]
    kernel = axes[0]
    for axis in axes[1:]:
        kernel = kernel[..., None] * axis
    step = symbol_step(kernel[None, None], start(kernel[None, None], geometry), geometry, 8)
    q = torch.cartesian_prod(*[torch.arange(k, dtype=torch.float64) for k in kernel_size])
    phases = torch.polar(torch.ones(1, dtype=torch.float64), grid.points @ q.T)
    on_grid = float((phases @ kernel.flatten().to(torch.complex128)).abs().max())
    assert on_grid <= float(step.sigma) * (1 + 1e-6)
    assert float(step.sigma) <= on_grid * grid.factor
