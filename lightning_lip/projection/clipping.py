"""The convex problem inside the joint projection: how far to clip every layer so that a linear constraint holds.

Clipping layer l by ``u_l = log(sigma_l1 / c_l)`` sets its singular values above c_l to c_l. Let ``delta = 1 - e^-u`` be
the depth and ``e_i = 1 - sigma_li / sigma_l1`` the deficits, both in units of the layer's norm. The cost is
``q_l phi_l(u_l)`` with ``phi(u) = sum_i (delta - e_i)_+^2``.

phi is convex for ``u <= log 2``: with k values clipped and ``S = sum_i (delta - e_i)_+``,
``phi'' = 2 (1 - delta) (k (1 - delta) - S)``, and ``S <= k delta <= k (1 - delta)``. Deficits stand for singular values
because they do not cancel where almost nothing is clipped.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

LOG_2 = math.log(2.0)

_MAX_STEPS = 100
_MAX_HALVINGS = 40


class ClippingProblem:
    """Minimise ``sum_l q_l phi_l(u_l)`` over ``0 <= u_l <= log 2`` under linear constraints ``a u >= d``, ``a >= 0``.

    Strictly convex: the solution is unique. Units: everything is relative to the layers' norms.

    Args:
        deficits: ``1 - sigma_li / sigma_l1``, shape (L, r), in [0, 1], every row ascending from 0.
        costs: q_l > 0, shape (L,). Only their ratios matter.
    """

    def __init__(self, deficits: FloatArray, costs: FloatArray) -> None:
        # No cap falls below half the norm, so smaller values are never clipped.
        self._deficits = deficits[:, : max(1, int((deficits < 0.5).sum(axis=1).max()))]
        # A floor, not to divide by zero: where a layer costs next to nothing, the box alone decides how far it goes.
        self._costs = np.maximum(costs / costs.max(), 1e-250)
        counts = np.arange(1.0, self._deficits.shape[1] + 1.0)
        self._sums = np.cumsum(self._deficits, axis=1)
        # The pressure is (1 - delta) S(delta), half the derivative of phi. Where the k-th value begins to be clipped:
        pressures = (1.0 - self._deficits) * (counts * self._deficits - self._sums)
        self._breaks = np.where(self._deficits < 0.5, pressures, np.inf)
        # At the end of the box, u = log 2:
        self._largest = 0.5 * np.maximum(0.5 - self._deficits, 0.0).sum(axis=1)
        self._rows = np.arange(len(costs))

    def respond(self, pressures: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return u(m), the solution of ``(1 - delta) S(delta) = m`` in the box, and its slope du/dm; shapes (L,).

        With k values clipped, whose deficits sum to E, it is the smaller root of
        ``k delta^2 - (k + E) delta + E + m = 0``.
        """
        m = np.minimum(pressures, self._largest)
        k = np.maximum((self._breaks <= m[:, None]).sum(axis=1), 1)
        E = self._sums[self._rows, k - 1]
        root = np.sqrt(np.maximum((k - E) ** 2 - 4.0 * k * m, 0.0))
        depths = np.minimum(2.0 * (E + m) / (k + E + root), 0.5)
        # If all values are equal, the slope is infinite at the end of the box: any large number serves there.
        slopes = np.where(pressures < self._largest, 1.0 / ((1.0 - depths) * np.maximum(root, 1e-12)), 0.0)
        u: FloatArray = -np.log1p(-depths)
        return u, slopes

    def distances(self, u: FloatArray) -> FloatArray:
        """Return ``q_l phi_l(u_l)`` for every layer, shape (L,), the q_l scaled so that the largest is 1."""
        clipped = np.maximum(-np.expm1(-u)[:, None] - self._deficits, 0.0)
        distances: FloatArray = self._costs * np.einsum("lr,lr->l", clipped, clipped)
        return distances

    def is_global(self, u: FloatArray) -> bool:
        """Return whether no point outside the box can be nearer than `u`: *exact*, up to a rounding of 1e-12.

        Outside the box some layer is clipped below half its norm, which alone costs more than clipping it to the half.
        """
        outside = self.distances(np.full(len(u), LOG_2)).min()
        return bool(self.distances(u).sum() <= outside * (1.0 + 1e-12))

    def solve(self, a: FloatArray, d: float) -> tuple[FloatArray, float]:
        """Return the solution u, shape (L,), under one constraint ``a u >= d``, and its multiplier.

        KKT: the pressure on layer l is ``mu a_l / q_l``. Safeguarded Newton on mu.

        Args:
            a: Coefficients >= 0, shape (L,), not all 0. A layer with the coefficient 0 gets u = 0 exactly.
            d: Positive. At ``log 2 sum(a)`` and above, u is log 2 wherever a > 0.
        """
        rates = a / self._costs
        used = rates > 0.0
        low, high = 0.0, float((self._largest[used] / rates[used]).max())
        if d >= LOG_2 * a.sum():
            return np.where(used, LOG_2, 0.0), high
        mu = min(d / float(a @ rates), high)
        for step in range(_MAX_STEPS):
            u, slopes = self.respond(mu * rates)
            missing = d - float(a @ u)
            slope = float(a @ (rates * slopes))
            if abs(missing) <= 1e-13 * d:
                break
            low, high = (mu, high) if missing > 0.0 else (low, mu)
            following = mu + missing / slope if slope > 0.0 else math.inf
            # Newton's steps can crawl where values begin to be clipped; the layers' scales can lie far apart.
            if not low < following < high or (step > 10 and step % 2):
                following = math.sqrt(low) * math.sqrt(high) if low > 0.0 else 0.5 * high
            if following in (low, high):
                break
            mu = following
        if slope > 0.0:
            # Near the end of the box u changes faster than mu can resolve, like a square root: the rest that is
            # missing goes to the layers whose u moves most.
            u = np.clip(u + missing * (rates * slopes / slope), 0.0, LOG_2)
        return u, mu

    def solve_all(self, A: FloatArray, d: FloatArray, multipliers: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the solution u, shape (L,), under several constraints ``A u >= d``, and their multipliers, shape (J,).

        Newton on the dual, a concave function of J multipliers >= 0, with an active set. Wherever it stops, u is the
        solution of the Lagrangian for these multipliers, so that its dual value is a lower bound of the distance.

        Args:
            A: Coefficients >= 0, shape (J, L).
            d: Shape (J,); some u in the box satisfies all constraints.
            multipliers: Where to start, >= 0, shape (J,).
        """
        alone, multiplier = self.solve(A[-1], float(d[-1]))
        if np.all(A @ alone >= d - 1e-15 * (1.0 + np.abs(d))):
            return alone, np.append(np.zeros(len(d) - 1), multiplier)
        at = multipliers
        value, u, slopes = self._dual(A, d, at)
        for _ in range(_MAX_STEPS):
            missing = d - A @ u
            free = (at > 0.0) | (missing > 0.0)
            if np.all(np.abs(missing[free]) <= 1e-15 * (1.0 + np.abs(d[free]))):
                break
            direction = self._newton(A, slopes, missing, at, free)
            falling = direction < 0.0
            to_zero = at[falling] / -direction[falling]
            length = min(1.0, to_zero.min(initial=1.0))
            gain = float(missing @ direction)
            for _ in range(_MAX_HALVINGS):
                following = np.maximum(at + length * direction, 0.0)
                if length == to_zero.min(initial=math.inf):
                    following[np.flatnonzero(falling)[to_zero.argmin()]] = 0.0
                new = self._dual(A, d, following)
                # Near the solution the slope along the direction says more than the value's last digits.
                if new[0] >= value + 0.25 * length * gain or abs((d - A @ new[1]) @ direction) <= 0.5 * gain:
                    break
                length *= 0.5
            else:
                break
            at, (value, u, slopes) = following, new
        return u, at

    def _newton(
        self, A: FloatArray, slopes: FloatArray, missing: FloatArray, at: FloatArray, free: NDArray[np.bool_]
    ) -> FloatArray:
        """Return Newton's direction, shape (J,), in the `free` multipliers that it does not push below zero."""
        while True:
            curvature = (A[free] * (slopes / self._costs)) @ A[free].T
            # Constraints that are nearly parallel make it singular.
            diagonal = np.diag(curvature)
            # With all its layers at the end of the box, a multiplier can only fall: let it be halved.
            flat = np.abs(missing[free]) / np.maximum(0.5 * at[free], 1e-300)
            curvature += np.diag(np.where(diagonal > 0.0, 1e-14 * diagonal, np.maximum(flat, 1e-300)))
            direction = np.zeros_like(at)
            direction[free] = np.linalg.solve(curvature, missing[free])
            blocked = (at == 0.0) & (direction < 0.0)
            if not blocked.any():
                return direction
            free = free & ~blocked

    def _dual(self, A: FloatArray, d: FloatArray, multipliers: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        u, slopes = self.respond((multipliers @ A) / self._costs)
        value = 0.5 * float(self.distances(u).sum()) + float(multipliers @ (d - A @ u))
        return value, u, slopes
