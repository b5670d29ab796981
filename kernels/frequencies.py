"""What is known of all frequencies at once: the phases of taps, vectors joined by them, and the way uphill in f(w)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lip.kernels.waves import Geometry, waves_of

N_NEWTON_STEPS = 2
LONGEST_STEP = 0.5
"""Of Newton's method, in radians."""

LEAST_CURVATURE = 1e-3
"""Below this part of f, a pivot of the negative Hessian counts as not positive."""

TINY = 1e-34
"""What divisors are at least."""


def on(table: Tensor, like: Tensor) -> Tensor:
    """Return a table on the device and in the dtype of another tensor."""
    return table.to(like.device, like.dtype)


def _phases(w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``q.w``, (..., 1, taps)."""
    angles = (w @ on(waves_of(geometry).exponents, w).mT)[..., None, :]
    return angles.cos(), angles.sin()


def rows_of(w: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """Return ``x = v (x) e^{i q.w}``, (..., 2, columns * taps), of w (..., dims) and v (..., 2, columns * residues)."""
    tables = waves_of(geometry)
    spread = v.view(*v.shape[:-1], geometry.columns, tables.n_residues)[..., tables.residues.to(v.device)]
    cosine, sine = _phases(w, geometry)
    real, imaginary = spread[..., 0, :, :], spread[..., 1, :, :]
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -3).flatten(-2)


def joined(z: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return ``P(w)^H u``, of norm one, and its norm, of ``z_j = K_j^T u``.

    Args:
        z: The taps' z, real and imaginary parts, (groups, m, 2, columns, taps).
        w: The frequencies, (groups, m, dims).
        geometry: The geometry.

    Returns:
        The unit vectors, (groups, m, 2, columns * residues), zero where the norm is, and the norms, (groups, m).
    """
    tables = waves_of(geometry)
    cosine, sine = _phases(w, geometry)
    # e^{-i q.w} z, the taps of a residue summed.
    turned = torch.stack([z[:, :, 0] * cosine + z[:, :, 1] * sine, z[:, :, 1] * cosine - z[:, :, 0] * sine], 2)
    right = turned.new_zeros(*turned.shape[:-1], tables.n_residues)
    right.index_add_(-1, tables.residues.to(right.device), turned)
    right = right.flatten(3)
    norm = right.flatten(2).norm(dim=2)
    return right / norm.clamp(min=TINY)[..., None, None], norm


def climbed(z: Tensor, w: Tensor, centres: Tensor, cells: Tensor, geometry: Geometry) -> Tensor:
    """Return frequencies within their cells at which f is not lower: by Newton's method, or the best of the grid's own.

    Args:
        z: The taps' ``K_j^T u``, (groups, m, 2, columns, taps).
        w: The frequencies, (groups, m, dims).
        centres: The middles of their cells, (groups, m, dims).
        cells: The numbers of the cells, (groups, m).
        geometry: The geometry.
    """
    tables = waves_of(geometry)
    if len(tables.lags) == 1:  # no taps overlap: f is constant
        return w
    real, imaginary = z[:, :, 0], z[:, :, 1]
    even = real.mT @ real + imaginary.mT @ imaginary
    odd = real.mT @ imaginary - imaginary.mT @ real
    # The sums over taps of one residue whose exponents differ by a lag; the place behind the last one is for the rest.
    places = tables.pairs.where(tables.pairs >= 0, len(tables.lags)).flatten().to(z.device)
    sums = even.new_zeros(2, *cells.shape, len(tables.lags) + 1)
    sums.index_add_(-1, places, torch.stack([even.flatten(2), odd.flatten(2)]))
    c_real, c_imaginary = sums[0, ..., :-1], sums[1, ..., :-1]
    lags = on(tables.lags, w)

    def terms(w: Tensor) -> tuple[Tensor, Tensor]:
        angles = w @ lags.mT
        cosine, sine = angles.cos(), angles.sin()
        return c_real * cosine - c_imaginary * sine, c_real * sine + c_imaginary * cosine

    if tables.points is not None:
        points = on(tables.points, w)[cells]  # (groups, m, K, dims)
        angles = points @ lags.mT
        values = c_real[..., None, :] * angles.cos() - c_imaginary[..., None, :] * angles.sin()
        best = values.sum(-1).argmax(-1)[..., None, None].expand(*cells.shape, 1, w.shape[-1])
        return points.gather(2, best)[:, :, 0]
    halves = on(tables.halves, w)
    start = f = None
    for _ in range(N_NEWTON_STEPS):
        even_terms, odd_terms = terms(w)
        f = even_terms.sum(-1)
        start = f if start is None else start
        gradient = -(odd_terms @ lags)
        curvature = torch.einsum("gmd,da,db->gmab", even_terms, lags, lags)  # the negative Hessian
        # Along a dimension without overlap f is constant, and the way there 0.
        curvature = curvature + (halves == 0).to(f).diag() * (f.abs() + 1.0)[..., None, None]
        step = _uphill(f, gradient, curvature)
        length = step.norm(dim=-1, keepdim=True)
        step = step * (LONGEST_STEP / length.clamp(min=LONGEST_STEP))
        new, less = w + step, w + step / 4
        less = torch.where((terms(less)[0].sum(-1) >= f)[..., None], less, w)
        w = torch.where((terms(new)[0].sum(-1) >= f)[..., None], new, less)
    away = torch.remainder(w - centres + math.pi, 2 * math.pi) - math.pi
    return centres + away.clamp(-halves, halves)


def _uphill(f: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
    """Return Newton's step where the negative Hessian is positive definite, and a bounded gradient step elsewhere.

    By elimination without pivots, written out for the one to three dimensions there are.
    """
    dims = gradient.shape[-1]
    least = LEAST_CURVATURE * f.abs().clamp(min=TINY)
    a = [[curvature[..., i, j] for j in range(dims)] for i in range(dims)]
    b = [gradient[..., i] for i in range(dims)]
    is_concave = torch.ones_like(f, dtype=torch.bool)
    for i in range(dims):
        is_concave = is_concave & (a[i][i] > least)
        pivot = torch.where(a[i][i] > least, a[i][i], 1.0)
        for k in range(i + 1, dims):
            factor = a[k][i] / pivot
            a[k] = [a[k][j] - factor * a[i][j] for j in range(dims)]
            b[k] = b[k] - factor * b[i]
    newton = [torch.zeros_like(f)] * dims
    for i in reversed(range(dims)):
        rest = b[i] - sum((a[i][j] * newton[j] for j in range(i + 1, dims)), torch.zeros_like(f))
        newton[i] = rest / torch.where(a[i][i] > least, a[i][i], 1.0)
    bounded = gradient / (curvature.abs().sum(-1) + least[..., None])
    return torch.where(is_concave[..., None], torch.stack(newton, -1), bounded)
