"""Depthwise convolutions: the symbol of each channel is a number for each residue, and known at every frequency.

No vector has to be found and nothing is kept from step to step: f(w) = |P(w)|^2 of all channels is evaluated on a grid,
and Newton's method leads from its peaks there uphill.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lip.kernels.frequencies import TINY, climbed, joined, on
from lightning_lip.kernels.waves import Geometry, dense_grid_of, waves_of

N_PEAKS = 4
"""Of a channel's f on the grid, from which on it is climbed."""

ASIDE = 0.1
"""Radians from a peak where Newton's method begins: f is even, and would hold it at 0 or pi between two maxima."""

N_CLIMBS = 3
"""Times :data:`~lightning_lip.kernels.frequencies.N_NEWTON_STEPS` steps of Newton's method."""


def is_scalar(geometry: Geometry) -> bool:
    """Return whether each group has one row and one column."""
    return geometry.rows == geometry.columns == 1


def scalar_step(taps: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the largest value of each channel's symbol.

    Args:
        taps: The taps of each channel, (groups, taps).
        geometry: The geometry.

    Returns:
        sigma (groups, 1), u (groups, 1, 2, 1), which is 1, or 0 where the channel is zero, w (groups, 1, dims), and
        ``P(w)^H u`` divided by sigma (groups, 1, 2, residues).
    """
    magnitude = taps.abs().amax(1, keepdim=True).clamp(min=TINY)
    z = torch.zeros(len(taps), 1, 2, 1, taps.shape[1], dtype=taps.dtype, device=taps.device)
    z[:, 0, 0, 0] = taps / magnitude
    tables, grid = waves_of(geometry), dense_grid_of(geometry)
    among = tables.pairs.flatten() >= 0
    products = (z[:, 0, 0, 0, :, None] * z[:, 0, 0, 0, None, :]).flatten(1)[:, among.to(taps.device)]
    sums = taps.new_zeros(len(taps), len(tables.lags))
    sums.index_add_(1, tables.pairs.flatten()[among].to(taps.device), products)
    points = on(grid.points, taps)
    values = sums @ (points @ on(tables.lags, taps).mT).cos().mT
    is_peak = (values[:, grid.neighbours.to(taps.device)] <= values[..., None]).all(-1)
    peaks = torch.where(is_peak, values, -1.0).topk(min(N_PEAKS, len(points))).indices
    w, z = points[peaks], z.expand(-1, peaks.shape[1], -1, -1, -1)
    if tables.points is None:
        w = w + ASIDE
        for _ in range(N_CLIMBS):
            w = climbed(z, w, w, peaks, geometry)
    right, norm = joined(z, w, geometry)
    best = norm.argmax(1)[:, None]
    norm, w, right = (table[torch.arange(len(table), device=best.device)[:, None], best] for table in (norm, w, right))
    u = taps.new_zeros(len(taps), 1, 2, 1)
    u[:, 0, 0] = taps.any(1, keepdim=True)
    return norm * magnitude, u, w, right
