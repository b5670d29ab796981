"""What the tests of symbols share: random convolutions, and the truth about them in float64."""

import math
import random

import torch

from lightning_lip.kernels.symbol import started
from lightning_lip.kernels.waves import Geometry, waves_of


def random_geometry(seed, groups=(1, 1, 2, 4), sides=(1, 2, 4, 8)):
    """Return some convolution in one to three dimensions."""
    pick = random.Random(seed).choice
    dims = pick([1, 1, 2, 2, 2, 3])
    kernel_size, stride, dilation = (
        tuple(pick(choices) for _ in range(dims))
        for choices in ([1, 2, 3, 3, 4, 5] if dims < 3 else [1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 3])
    )
    return Geometry(pick(sides), pick(sides), pick(groups), kernel_size, stride, dilation)


def random_kernel(geometry, seed=0):
    """Return a kernel of a geometry, fp32."""
    return torch.randn(geometry.shape, generator=torch.Generator().manual_seed(seed))


def start(kernel, geometry, seed=0):
    """Return the state of a kernel that has started."""
    return started(kernel, geometry, torch.Generator().manual_seed(seed))


def symbols_at(kernel, geometry, w):
    """Return the dense complex symbols of all groups at one frequency, (groups, rows, columns * residues), float64."""
    tables = waves_of(geometry)
    taps = kernel.double().reshape(geometry.groups, geometry.rows, geometry.columns, -1)
    phases = torch.polar(torch.ones(geometry.n_taps, dtype=torch.float64), tables.exponents.double() @ w)
    # P v = sum_j K_j e^{i q_j.w} v of its residue
    found = torch.zeros(*taps.shape[:3], tables.n_residues, dtype=torch.complex128)
    found = found.index_add(3, tables.residues, taps * phases)
    return found.flatten(2)


def norm_on_a_grid(kernel, geometry, n=48):
    """Return the largest singular value of the symbols on a dense grid, which is below the supremum by O(1 / n^2)."""
    dims = len(geometry.kernel_size)
    axis = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    points = torch.cartesian_prod(*[axis] * dims).view(-1, dims)
    return max(float(torch.linalg.matrix_norm(symbols_at(kernel, geometry, w), 2).max()) for w in points)
