"""The norm of a convolution's symbol by tracking plane waves, in plain PyTorch: the specification.

On the infinite grid a convolution multiplies by ``P(w) = sum_j K_j e^{i q_j.w}``, K_j a tap of the kernel, and its norm
is the largest ``|u^H P(w) v|`` over unit u, v and all frequencies w: see :mod:`~lightning_lip.kernels.waves`. It is
maximised alternately, with one read of the kernel a step. With A the kernel as a matrix (rows, columns * taps), and
``x = v (x) e^{i q.w}`` a row for a wave (two real ones, its real and its imaginary part):

1. ``t = A x``, ``u = t / |t|``, ``z_j = K_j^T u``: the two products of a linear layer's step, with two rows for each
   wave.
2. ``f(w) = |P(w)^H u|^2 = sum_d c_d e^{i d.w}`` with ``c_d`` the sum of ``<z_j, z_k>`` over taps of one residue whose
   exponents differ by d: known for *every* w. Two Newton steps in w, which never lower f.
3. ``P(w)^H u = sum_j e^{-i q_j.w} z_j``, ``sigma = |P(w)^H u|``: exactly ``u^H P(w) v`` of the returned unit vectors,
   hence never above the norm but for rounding.
4. The next v is ``P^H P v / sigma^2 - beta v_before``, the power method with momentum (Xu et al. 2018, "Accelerated
   stochastic power iteration"), normalised.

A wave stays in its local maximum of ``|P(w)|``, and others overtake it when a penalty presses it down. So half of the
torus of frequencies is cut into cells, each with a wave that climbs within it. A step works on `n_waves` of them: half
are the strongest, no two of them the same wave at a border, and half are taken in turn.
Maximising over w by Newton's method in the known polynomial needs no step size.

All is real arithmetic, pairs of rows for real and imaginary parts, without a wait for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lip.kernels.tensors import without_autocast
from lightning_lip.kernels.waves import Geometry, waves_of

MOMENTUM = 0.2
"""beta, below 1/4: at the optimum (sigma_2 / sigma_1)^2 / 4 momentum saves most of the steps."""

N_NEWTON_STEPS = 2
LONGEST_STEP = 0.5
"""Of Newton's method, in radians."""

LEAST_CURVATURE = 1e-3
"""Below this part of f, a pivot of the negative Hessian counts as not positive."""

SAME_WAVE = 0.7
"""Overlap of two waves' vectors, less than a cell apart, from which on they are the same one."""

N_START_STEPS = 15
"""Steps of all cells when a layer starts."""

_TINY = 1e-30


class Wave(NamedTuple):
    """The cells of a layer, of which one tensor is kept.

    Attributes:
        v: The right vectors, real and imaginary parts, (cells, 2, columns * residues).
        before: The vectors of the step before, of the same shape.
        w: Frequencies, (cells, dims).
        sigma: The last estimate in each cell, (cells,).
        turn: Whose turn comes next, (cells,): the same number for each.
    """

    v: Tensor
    before: Tensor
    w: Tensor
    sigma: Tensor
    turn: Tensor


def n_cells(geometry: Geometry) -> int:
    """Return the cells of all groups."""
    return geometry.groups * len(waves_of(geometry).centres)


def state_shape(geometry: Geometry) -> tuple[int, int]:
    """Return the shape of what is kept from step to step: a row a cell, group by group."""
    side = geometry.columns * waves_of(geometry).n_residues
    return n_cells(geometry), 4 * side + len(geometry.kernel_size) + 2


def unpacked(state: Tensor, geometry: Geometry) -> Wave:
    """Return views of a state, shape :func:`state_shape`: rows of v, v before, w, sigma, turn."""
    side, dims = geometry.columns * waves_of(geometry).n_residues, len(geometry.kernel_size)
    v, before, w, sigma, turn = state.split([2 * side, 2 * side, dims, 1, 1], dim=1)
    return Wave(v.unflatten(1, (2, side)), before.unflatten(1, (2, side)), w, sigma[:, 0], turn[:, 0])


def random_state(geometry: Geometry, generator: torch.Generator) -> Tensor:
    """Return random unit vectors at the middles of the cells, fp32 on the CPU: the same on every device and rank."""
    shape = state_shape(geometry)
    state = torch.zeros(shape, dtype=torch.float32, device="cpu")
    wave = unpacked(state, geometry)
    v = torch.randn(wave.v.shape, generator=generator, dtype=torch.float32, device="cpu")
    wave.v.copy_(v / v.flatten(1).norm(dim=1)[:, None, None])
    wave.w.copy_(waves_of(geometry).centres.repeat(geometry.groups, 1))
    return state


class Symbol(NamedTuple):
    """How a kernel is iterated as a symbol.

    Attributes:
        geometry: Of the kernel.
        n_waves: Cells a step in each group, each of which takes two real rows; at least 2 serve.
    """

    geometry: Geometry
    n_waves: int


class SymbolStep(NamedTuple):
    """What a step returns for one layer.

    Attributes:
        sigma: The estimate, shape ().
        left: u, real and imaginary part, over the rows of all groups (zeros beside the leading one), flat,
            (2 * groups * rows,).
        right: x = v (x) e^{i q.w}, real and imaginary part, flat, (2 * columns * taps,): of norm sqrt(taps a residue).
            With A the kernel as a matrix, ``sum_k left_k^T A right_k = sigma``, and the gradient of sigma in the kernel
            is the sum of the two outer products.
        state: The next state.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor
    state: Tensor


@torch.no_grad()
@without_autocast()
def symbol_step(kernel: Tensor, state: Tensor, geometry: Geometry, n_waves: int, n_iterations: int = 1) -> SymbolStep:
    """Advance the waves of a layer and return the leading one.

    Args:
        kernel: The kernel, of the geometry's shape, any floating dtype.
        state: What the last step left, in fp32 (fp64 for an fp64 kernel), on the kernel's device.
        geometry: The geometry.
        n_waves: Cells a step, in each group; at least 2 where there are more than one. ``2 n_waves`` real rows.
        n_iterations: Reads of the kernel; with 0 there is one, at the strongest cells, and the state stays.
    """
    tables = waves_of(geometry)
    n, groups = len(tables.centres), geometry.groups
    matrix = kernel.to(state.dtype).reshape(groups, geometry.rows, -1)
    n_waves = min(max(n_waves, 2), n)
    step = None
    for _ in range(max(n_iterations, 1)):
        wave = unpacked(state, geometry)
        n_turn = n_waves // 2 if n_iterations and n_waves < n else 0
        cells = _chosen(wave, geometry, n_waves, n_turn)  # (groups, m)
        sigma, u, w, v, right, t_norm = _advanced(matrix, wave, cells, geometry)
        step = _leading(sigma, u, w, right, geometry)
        if n_iterations:
            state = state.clone()
            _store(unpacked(state, geometry), cells, sigma, w, v, right, t_norm, n_turn, n)
    assert step is not None
    return SymbolStep(*step, state)


@torch.no_grad()
def started(kernel: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
    """Return the state of a layer whose cells all start at random, after 15 steps of each."""
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    state = random_state(geometry, generator).to(kernel.device, dtype)
    return symbol_step(kernel, state, geometry, n_cells(geometry), N_START_STEPS).state


def _on(table: Tensor, like: Tensor) -> Tensor:
    return table.to(like.device, like.dtype)


def _chosen(wave: Wave, geometry: Geometry, n_waves: int, n_turn: int) -> Tensor:
    """Return the cells of this step, numbered within their group, (groups, n_waves): no two the same.

    First the strongest, one after another, without those that hold a wave that is taken already; then those whose turn
    it is. Every cell is seen within ``n / n_turn`` steps.
    """
    groups = geometry.groups
    n = len(wave.sigma) // groups
    device = wave.sigma.device
    if n_waves == n:
        return torch.arange(n, device=device).expand(groups, n)
    halves = _on(waves_of(geometry).halves, wave.w)
    w, v = wave.w.view(groups, n, -1), wave.v.view(groups, n, 2, -1)
    left = torch.where(wave.sigma.isfinite(), wave.sigma, math.inf).view(groups, n)  # what is not finite is looked at
    taken = torch.zeros(groups, n, dtype=torch.bool, device=device)
    rank = left.clone()
    picks = []
    numbers = torch.arange(n, device=device)
    for _ in range(n_waves - n_turn):
        pick = rank.argmax(1, keepdim=True)
        picks.append(pick)
        taken |= numbers == pick
        own_w, own_v = _rows(w, pick), _rows(v, pick)
        rank = torch.where(_twins(w, v, own_w, own_v, halves), -1.0, rank)
        # Twins come last, where there are not enough others.
        rank = torch.where(taken, -2.0, rank)
    # Whose turn it is: the first ones from `turn` on that are not taken.
    distance = torch.remainder(numbers - wave.turn.view(groups, n)[:, :1].round().long(), n)
    distance = torch.where(taken, n + distance, distance)
    turns = distance.argsort(dim=1, stable=True)[:, :n_turn]
    return torch.cat([*picks, turns], 1)


def _rows(table: Tensor, cells: Tensor) -> Tensor:
    """Return the rows (groups, m, ...) of a table (groups, n, ...)."""
    return table[torch.arange(len(table), device=table.device)[:, None], cells]


def _twins(w: Tensor, v: Tensor, own_w: Tensor, own_v: Tensor, halves: Tensor) -> Tensor:
    """Return which waves are the same as one of them, (groups, n): near it, or near its conjugate at -w."""
    same = torch.zeros(w.shape[:2], dtype=torch.bool, device=w.device)
    for sign in (1.0, -1.0):
        away = torch.remainder(w * sign - own_w + math.pi, 2 * math.pi) - math.pi
        real = (v[:, :, 0] * own_v[:, :, 0] + sign * v[:, :, 1] * own_v[:, :, 1]).sum(-1)
        imaginary = (v[:, :, 0] * own_v[:, :, 1] - sign * v[:, :, 1] * own_v[:, :, 0]).sum(-1)
        near = ((away.abs() < halves) | (halves == 0)).all(-1)
        same |= near & (real.square() + imaginary.square() > SAME_WAVE**2)
    return same


def _advanced(matrix: Tensor, wave: Wave, cells: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    """Read the kernel once, for some cells of each group.

    Returns:
        For the m cells of each group: sigma (groups, m), u (groups, m, 2, rows), the new w (groups, m, dims), the v
        that was (groups, m, 2, side), ``P(w)^H u`` divided by sigma, of the same shape, and ``|P v|`` (groups, m).
    """
    tables = waves_of(geometry)
    groups, m = cells.shape
    n = len(tables.centres)
    v = _rows(wave.v.view(groups, n, 2, -1), cells)
    w = _rows(wave.w.view(groups, n, -1), cells)
    images = rows_of(w, v, geometry).view(groups, 2 * m, -1) @ matrix.mT
    images = images.view(groups, m, 2, -1)
    # Squares in fp32 overflow at kernels of 1e19: scaled first.
    magnitude = images.abs().amax((2, 3), keepdim=True).clamp(min=_TINY)
    scaled = images / magnitude
    length = scaled.flatten(2).norm(dim=2)[..., None, None]
    u = scaled / length.clamp(min=_TINY)
    t_norm = (length * magnitude)[..., 0, 0]
    z = (u.view(groups, 2 * m, -1) @ matrix).view(groups, m, 2, geometry.columns, -1)
    size = z.abs().amax((2, 3, 4), keepdim=True).clamp(min=_TINY)
    z = z / size
    w = _climbed(z, w, _on(tables.centres, w)[cells], cells, geometry)
    cosine, sine = _phases(w, geometry)
    # e^{-i q.w} z, the taps of a residue summed.
    joined = torch.stack([z[:, :, 0] * cosine + z[:, :, 1] * sine, z[:, :, 1] * cosine - z[:, :, 0] * sine], 2)
    right = joined.new_zeros(*joined.shape[:-1], tables.n_residues)
    right.index_add_(-1, tables.residues.to(right.device), joined)
    right = right.flatten(3)
    norm = right.flatten(2).norm(dim=2)
    return norm * size[..., 0, 0, 0], u, w, v, right / norm.clamp(min=_TINY)[..., None, None], t_norm


def _phases(w: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``q.w``, (..., 1, taps)."""
    angles = (w @ _on(waves_of(geometry).exponents, w).mT)[..., None, :]
    return angles.cos(), angles.sin()


def rows_of(w: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """Return ``x = v (x) e^{i q.w}``, (..., 2, columns * taps), of w (..., dims) and v (..., 2, columns * residues)."""
    tables = waves_of(geometry)
    spread = v.unflatten(-1, (geometry.columns, tables.n_residues))[..., tables.residues.to(v.device)]
    cosine, sine = _phases(w, geometry)
    real, imaginary = spread[..., 0, :, :], spread[..., 1, :, :]
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -3).flatten(-2)


def _climbed(z: Tensor, w: Tensor, centres: Tensor, cells: Tensor, geometry: Geometry) -> Tensor:
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
    lags = _on(tables.lags, w)

    def terms(w: Tensor) -> tuple[Tensor, Tensor]:
        angles = w @ lags.mT
        cosine, sine = angles.cos(), angles.sin()
        return c_real * cosine - c_imaginary * sine, c_real * sine + c_imaginary * cosine

    if tables.points is not None:
        points = _on(tables.points, w)[cells]  # (groups, m, K, dims)
        angles = points @ lags.mT
        values = c_real[..., None, :] * angles.cos() - c_imaginary[..., None, :] * angles.sin()
        best = values.sum(-1).argmax(-1)[..., None, None].expand(*cells.shape, 1, w.shape[-1])
        return points.gather(2, best)[:, :, 0]
    halves = _on(tables.halves, w)
    start = f = None
    for _ in range(N_NEWTON_STEPS):
        even_terms, odd_terms = terms(w)
        f = even_terms.sum(-1)
        start = f if start is None else start
        gradient = -(odd_terms @ lags)
        curvature = torch.einsum("gmd,da,db->gmab", even_terms, lags, lags)  # the negative Hessian
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
    least = LEAST_CURVATURE * f.abs().clamp(min=_TINY)
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


def _leading(sigma: Tensor, u: Tensor, w: Tensor, right: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, u and x of the strongest wave; see :class:`SymbolStep`."""
    groups, m = sigma.shape
    best = sigma.flatten().argmax()
    group, take = best // m, (lambda table: table.flatten(0, 1)[best])
    own = torch.arange(groups, device=sigma.device) == group
    left = torch.where(own[:, None], take(u)[:, None, :], 0.0)  # (2, groups, rows)
    return take(sigma), left.flatten(), rows_of(take(w), take(right), geometry).flatten()


def _store(
    wave: Wave, cells: Tensor, sigma: Tensor, w: Tensor, v: Tensor, right: Tensor, t_norm: Tensor, n_turn: int, n: int
) -> None:
    """Write the next v, the one before, w and sigma of some cells to the state.

    A cell whose symbol is zero, or not finite, keeps its vector and loses its momentum.
    """
    groups = len(cells)
    places = cells + n * torch.arange(groups, device=cells.device)[:, None]
    before = wave.before[places]
    growth = t_norm / sigma.clamp(min=_TINY)
    mixed = growth[..., None, None] * right - MOMENTUM * before
    length = mixed.flatten(2).norm(dim=2)
    usable = (length > 1e-6) & length.isfinite() & (sigma > 0) & sigma.isfinite()
    divisor = torch.where(usable, length, 1.0)[..., None, None]
    usable = usable[..., None, None]
    wave.before[places] = torch.where(usable, v / divisor, 0.0)
    wave.v[places] = torch.where(usable, mixed / divisor, v)
    wave.w[places] = torch.where(usable[..., 0], w, wave.w[places])
    wave.sigma[places] = sigma
    # Rounds of n cells: the turn goes on by as many as were taken, and every cell is seen.
    wave.turn.copy_(torch.remainder(wave.turn + n_turn, n))
