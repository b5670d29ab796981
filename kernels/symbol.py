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

Depthwise convolutions need none of this: :mod:`~lightning_lip.kernels.scalars`.

All is real arithmetic, pairs of rows for real and imaginary parts, without a wait for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lip.kernels.frequencies import TINY, climbed, joined, on, rows_of
from lightning_lip.kernels.scalars import is_scalar, scalar_step
from lightning_lip.kernels.tensors import without_autocast
from lightning_lip.kernels.waves import Geometry, waves_of

MOMENTUM = 0.2
"""beta, below 1/4: at the optimum (sigma_2 / sigma_1)^2 / 4 momentum saves most of the steps."""

SAME_WAVE = 0.7
"""Overlap of two waves' vectors, less than a cell apart, from which on they are the same one."""

N_START_STEPS = 15
"""Steps of all cells when a layer starts."""


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
    """Return the shape of what is kept from step to step: a row a cell, group by group; of scalars one zero."""
    if is_scalar(geometry):
        return 1, 1
    side = geometry.columns * waves_of(geometry).n_residues
    return n_cells(geometry), 4 * side + len(geometry.kernel_size) + 2


def unpacked(state: Tensor, geometry: Geometry) -> Wave:
    """Return views of a state, shape :func:`state_shape`: rows of v, v before, w, sigma, turn."""
    side, dims = geometry.columns * waves_of(geometry).n_residues, len(geometry.kernel_size)
    v, before, w, sigma, turn = torch.split(state, [2 * side, 2 * side, dims, 1, 1], dim=1)
    return Wave(v.view(-1, 2, side), before.view(-1, 2, side), w, sigma[:, 0], turn[:, 0])


def random_state(geometry: Geometry, generator: torch.Generator) -> Tensor:
    """Return random unit vectors at the middles of the cells, fp32 on the CPU: the same on every device and rank."""
    state = torch.zeros(state_shape(geometry), dtype=torch.float32, device="cpu")
    if is_scalar(geometry):
        return state
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
    if is_scalar(geometry):
        found = scalar_step(kernel.to(state.dtype).reshape(geometry.groups, -1), geometry)
        return SymbolStep(*_leading(*found, geometry), state)
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
    if is_scalar(geometry):
        return state
    return symbol_step(kernel, state, geometry, n_cells(geometry), N_START_STEPS).state


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
    halves = on(waves_of(geometry).halves, wave.w)
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
    magnitude = images.abs().amax((2, 3), keepdim=True).clamp(min=TINY)
    scaled = images / magnitude
    length = scaled.flatten(2).norm(dim=2)[..., None, None]
    u = scaled / length.clamp(min=TINY)
    t_norm = (length * magnitude)[..., 0, 0]
    z = (u.view(groups, 2 * m, -1) @ matrix).view(groups, m, 2, geometry.columns, -1)
    size = z.abs().amax((2, 3, 4), keepdim=True).clamp(min=TINY)
    z = z / size
    w = climbed(z, w, on(tables.centres, w)[cells], cells, geometry)
    right, norm = joined(z, w, geometry)
    return norm * size[..., 0, 0, 0], u, w, v, right, t_norm


def _leading(sigma: Tensor, u: Tensor, w: Tensor, right: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, u and x of the strongest wave; see :class:`SymbolStep`."""
    groups, m = sigma.shape
    best = sigma.flatten().argmax()
    own = torch.arange(groups, device=sigma.device) == best // m

    def take(table: Tensor) -> Tensor:
        return table.flatten(0, 1)[best]

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
    growth = t_norm / sigma.clamp(min=TINY)
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
