"""Projections of spectra onto a budget for the network's Lipschitz bound: the joint one, and simpler baselines.

All functions are pure: singular values in, one cap c_l per layer out (NumPy, float64). Whoever holds the weights then
replaces layer l's singular values above c_l by c_l, which gives the nearest matrices in the (weighted) Frobenius norm
(Mirsky, 1960), or multiplies a layer that can only be scaled by ``c_l / sigma_l1``.

The set of weights with ``prod_l ||W_l||_2^k_l <= M`` is not convex: N. Couellan (2019) calls its projection difficult.
In the logarithms ``u_l = log(sigma_l1 / c_l)`` the constraint is linear, and the distance is convex up to log 2: see
:mod:`lightning_lip.clipping`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from lightning_lip.clipping import LOG_2, ClippingProblem, FloatArray

Metric = Literal["relative", "euclidean"]
"""Weights w_l of the squared distance ``sum_l w_l ||W_l - V_l||_F^2``: ``1 / sigma_l1^2``, or 1."""

LogBound = Callable[[FloatArray], tuple[float, FloatArray]]
"""``log_bound(log_sigma) -> (value, elasticities)``, shapes (L,) -> (), (L,): the bound's logarithm and its gradient."""


@dataclass(frozen=True, eq=False)
class Caps:
    """How far to clip every layer.

    Args:
        caps: c_l, shape (L,), float64: clip layer l's singular values at c_l. Equal to its norm, bit for bit, where
            nothing is clipped.
        squared_distance: ``sum_l w_l sum_i (sigma_li - c_l)_+^2`` over the singular values given.
        rounds: 0: feasible already; 1: one problem was solved; n > 1: n rounds, none of which took a layer below half
            its norm.
        exact: Whether the caps are *proven* to be the nearest feasible point: feasible already, or the solution of one
            convex problem that is nearer than any point with a layer below half its norm.
    """

    caps: FloatArray
    squared_distance: float
    rounds: int
    exact: bool


def joint_caps(
    spectra: Sequence[ArrayLike],
    log_target: float,
    *,
    metric: Metric | Sequence[float] = "relative",
    multiplicities: Sequence[float] | None = None,
    frobenius: Sequence[float | None] | None = None,
) -> Caps:
    """Return the caps of the joint projection onto ``{prod_l ||W_l||_2^k_l <= M}``.

    *Exact* (the nearest point of the set, to a relative 1e-9 of the squared distance) where ``Caps.exact`` says so;
    always if the product exceeds M by a factor of at most ``2^min(k)``. Beyond, the nearest point may collapse one
    layer; the *non-collapsing* projection is returned instead: rounds of the same convex problem, each of which takes
    no layer below half its norm; every round but the last halves every layer.

    Guaranteed for the floats returned: ``math.fsum(k * math.log(c) for k, c in zip(multiplicities, caps)) <=
    log_target``, or a cap is 0. Projecting what was projected changes nothing, bit for bit.

    Args:
        spectra: Singular values of every layer, in any order, >= 0, shapes (r_l,). The largest ones suffice if
            :func:`needs_more` says so afterwards.
        log_target: log M, finite.
        metric: w_l: ``"relative"`` (1 / sigma_l1^2; in every round the norm at its start), ``"euclidean"`` (1), or one
            positive number per layer.
        multiplicities: k_l > 0: how often layer l is applied. Default: 1.
        frobenius: Frobenius norms f_l > 0 of the layers that can only be scaled, None for those that can be clipped:
            layer l then costs ``w_l f_l^2 (1 - c_l / sigma_l1)^2``, and only its largest singular value is used.

    Raises:
        ValueError: If an argument has another shape or range than stated, or the caps underflow.
    """
    layers = _Layers(spectra, metric, frobenius)
    k = _multiplicities(multiplicities, len(layers.norms))
    excess = _excess(layers.norms, k, _finite(log_target))
    if excess <= 0.0:
        return layers.result(layers.norms, rounds=0, exact=True)
    full_rounds = int(excess / (LOG_2 * k.sum()))
    start = np.ldexp(layers.norms, -full_rounds)
    _refuse_underflow(start, log_target)
    rest = _excess(start, k, log_target)
    if rest <= 0.0:
        return layers.result(start, rounds=full_rounds, exact=False)
    problem = layers.problem(start)
    u, _ = problem.solve(k, rest)
    caps = _lowered(_clip(start, u), k, log_target, int(u.argmax()))
    return layers.result(caps, rounds=full_rounds + 1, exact=full_rounds == 0 and problem.is_global(u))


def log_clip_caps(
    spectra: Sequence[ArrayLike],
    log_target: float,
    *,
    metric: Metric | Sequence[float] = "relative",
    multiplicities: Sequence[float] | None = None,
    frobenius: Sequence[float | None] | None = None,
) -> Caps:
    """Return the caps ``sigma_l1 e^(-D / K)``, K = sum k_l, D = log(product / M): every layer loses the same factor.

    *Heuristic*: feasible as in :func:`joint_caps`, whose arguments and errors it shares, but not the nearest point.
    """
    layers = _Layers(spectra, metric, frobenius)
    k = _multiplicities(multiplicities, len(layers.norms))
    caps = layers.norms * _factor(layers.norms, k, _finite(log_target))
    feasible = np.array_equal(caps, layers.norms)
    return layers.result(caps, rounds=0 if feasible else 1, exact=feasible)


def per_layer_caps(
    spectra: Sequence[ArrayLike],
    caps: Sequence[float] | None = None,
    *,
    log_target: float | None = None,
    metric: Metric | Sequence[float] = "relative",
    multiplicities: Sequence[float] | None = None,
    frobenius: Sequence[float | None] | None = None,
) -> Caps:
    """Return every layer's own cap where its norm is above it, and its norm elsewhere.

    *Exact* for its own set, ``{||W_l||_2 <= cap_l for every l}``; for the product with ``cap_l = M^(1/K)``, K = sum
    k_l, feasible as in :func:`joint_caps` but not the nearest point. Source: Gouk et al. (2018).

    Args:
        spectra: As in :func:`joint_caps`.
        caps: One positive number per layer; or
        log_target: log M, for ``M^(1/K)`` in every layer. Exactly one of the two is needed.
        metric: For the squared distance that is reported, as in :func:`joint_caps`.
        multiplicities: As in :func:`joint_caps`; used with `log_target` only.
        frobenius: As in :func:`joint_caps`.

    Raises:
        ValueError: If not exactly one of `caps` and `log_target` is given, or as in :func:`joint_caps`.
    """
    if (caps is None) == (log_target is None):
        raise ValueError("Expected exactly one of `caps` and `log_target`: one cap per layer, or log M for all.")
    layers = _Layers(spectra, metric, frobenius)
    n_layers = len(layers.norms)
    if caps is not None:
        limits = _per_layer("caps", caps, n_layers)
    else:
        k = _multiplicities(multiplicities, n_layers)
        level = math.exp(_finite(log_target) / k.sum())
        limits = np.full(n_layers, level)
        while _excess(limits, k, _finite(log_target)) > 0.0:
            limits = np.nextafter(limits, 0.0)
    clipped = np.minimum(layers.norms, limits)
    feasible = np.array_equal(clipped, layers.norms)
    return layers.result(clipped, rounds=0 if feasible else 1, exact=True)


def scale_factors(
    spectra: Sequence[ArrayLike], log_target: float, *, multiplicities: Sequence[float] | None = None
) -> FloatArray:
    """Return what to multiply every layer with, shape (L,): ``e^(-D / K)``, or 1 where the product is feasible.

    *Heuristic*, as :func:`log_clip_caps`, but all singular values shrink.

    Args:
        spectra: As in :func:`joint_caps`; only the largest value of each matters.
        log_target: log M, finite.
        multiplicities: As in :func:`joint_caps`.

    Raises:
        ValueError: As in :func:`joint_caps`.
    """
    layers = _Layers(spectra, "relative", None)
    k = _multiplicities(multiplicities, len(layers.norms))
    return np.full(len(k), _factor(layers.norms, k, _finite(log_target)))


def needs_more(spectra: Sequence[ArrayLike], caps: Sequence[float] | FloatArray, lengths: Sequence[int]) -> list[bool]:
    """Return for every layer whether its caps may be wrong because not all of its singular values were given.

    Caps from the largest values of a spectrum are those of the whole spectrum if no cap lies below the smallest value
    given. Otherwise compute more of the values and project again.

    Args:
        spectra: As given to the projection.
        caps: As returned by it, shape (L,).
        lengths: How many singular values layer l has in all; 1 for a layer that can only be scaled.
    """
    return [
        n_values > np.size(spectrum) and bool(cap < np.min(np.asarray(spectrum)))
        for spectrum, cap, n_values in zip(spectra, caps, lengths, strict=True)
    ]


class _Layers:
    """Checked spectra, in units of their norms.

    ``norms``: shape (L,). ``_ratios``: sigma_li / sigma_l1, shape (L, r), rows descending from 1, padded with 0.
    ``_costs``: q_l, so that the squared distance is ``sum_l q_l sum_i (sigma_li / sigma_l1 - c_l / sigma_l1)_+^2``.
    """

    def __init__(
        self,
        spectra: Sequence[ArrayLike],
        metric: Metric | Sequence[float],
        frobenius: Sequence[float | None] | None,
    ) -> None:
        rows = [np.asarray(spectrum, dtype=np.float64) for spectrum in spectra]
        if not rows:
            raise ValueError("Expected the singular values of at least one layer, got none.")
        for index, row in enumerate(rows):
            if row.ndim != 1 or row.size == 0:
                raise ValueError(f"Expected layer {index}'s singular values in a non-empty vector, got {row.shape}.")
        values = np.zeros((len(rows), max(row.size for row in rows)))
        for index, row in enumerate(rows):
            values[index, : row.size] = row
        if not (np.isfinite(values) & (values >= 0.0)).all():
            index = int((~(np.isfinite(values) & (values >= 0.0))).any(axis=1).argmax())
            raise ValueError(
                f"Expected finite singular values >= 0, got {values[index]} for layer {index}: look for what made its "
                "weight diverge."
            )
        values = -np.sort(-values, axis=1)
        self.norms = values[:, 0].copy()
        self._relative = isinstance(metric, str) and metric == "relative"
        if self._relative:
            costs = np.ones(len(rows))
        else:
            costs = _weights(metric, len(rows)) * self.norms**2
        # A zero layer has one value, at its norm: nothing of it is ever clipped.
        self._ratios = values / np.where(self.norms > 0.0, self.norms, 1.0)[:, None]
        self._ratios[:, 0] = 1.0
        if frobenius is not None:
            if len(frobenius) != len(rows):
                raise ValueError(f"Expected {len(rows)} entries of `frobenius`, one per layer, got {len(frobenius)}.")
            for index, norm in enumerate(frobenius):
                if norm is None:
                    continue
                if not (math.isfinite(norm) and norm >= 0.0 and (norm > 0.0 or self.norms[index] == 0.0)):
                    raise ValueError(f"Expected a finite positive Frobenius norm, got {norm!r} for layer {index}.")
                self._ratios[index, 1:] = 0.0
                if self.norms[index] > 0.0:
                    costs[index] *= (norm / self.norms[index]) ** 2
        if not np.isfinite(costs).all():
            raise ValueError("The squared distance exceeds float64: rescale the spectra, or use metric='relative'.")
        self._costs = costs

    def problem(self, start: FloatArray) -> ClippingProblem:
        """Return the convex problem for the spectra clipped at `start`, shape (L,)."""
        shares = start / np.where(self.norms > 0.0, self.norms, 1.0)
        shares[self.norms == 0.0] = 1.0
        deficits = np.maximum(1.0 - self._ratios / shares[:, None], 0.0)
        return ClippingProblem(deficits, self._costs if self._relative else self._costs * shares**2)

    def result(self, caps: FloatArray, rounds: int, exact: bool) -> Caps:
        """Return the caps with their distance from the spectra."""
        if rounds == 0:
            return Caps(caps.copy(), 0.0, rounds, exact)
        shares = caps / np.where(self.norms > 0.0, self.norms, 1.0)
        clipped = np.where(self.norms[:, None] > 0.0, np.maximum(self._ratios - shares[:, None], 0.0), 0.0)
        return Caps(caps, float(self._costs @ np.einsum("lr,lr->l", clipped, clipped)), rounds, exact)


def _per_layer(name: str, values: Sequence[float], n_layers: int) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n_layers,):
        raise ValueError(f"Expected {n_layers} entries of `{name}`, one per layer, got shape {array.shape}.")
    if not (np.isfinite(array) & (array > 0.0)).all():
        raise ValueError(f"Expected positive finite `{name}`, got {array}.")
    return array


def _multiplicities(multiplicities: Sequence[float] | None, n_layers: int) -> FloatArray:
    return np.ones(n_layers) if multiplicities is None else _per_layer("multiplicities", multiplicities, n_layers)


def _weights(metric: Metric | Sequence[float], n_layers: int) -> FloatArray:
    if not isinstance(metric, str):
        return _per_layer("metric", metric, n_layers)
    if metric != "euclidean":
        raise ValueError(f"Expected `metric` to be one of {get_args(Metric)} or one number per layer, got {metric!r}.")
    return np.ones(n_layers)


def _finite(log_target: float | None) -> float:
    if log_target is None or not math.isfinite(log_target):
        raise ValueError(f"Expected a finite `log_target`, the logarithm of a target M > 0, got {log_target!r}.")
    return float(log_target)


def _excess(norms: FloatArray, k: FloatArray, log_target: float) -> float:
    """Return ``sum_l k_l log norm_l - log_target``; its sign is that of the sum's correctly rounded value."""
    values = norms.tolist()
    if min(values) == 0.0:
        return -math.inf
    return math.fsum(map(float.__mul__, k.tolist(), map(math.log, values))) - log_target


def _clip(start: FloatArray, u: FloatArray) -> FloatArray:
    """Return ``start e^-u``; `start` itself, bit for bit, where u = 0."""
    return start + start * np.expm1(-u)


def _lowered(caps: FloatArray, k: FloatArray, log_target: float, layer: int) -> FloatArray:
    """Lower the cap of `layer` until the product is feasible as :func:`joint_caps` promises: by some roundings."""
    excess = _excess(caps, k, log_target)
    step = 2.0**-52
    while excess > 0.0:
        caps[layer] *= 1.0 - max(step, min(excess / k[layer], 0.5))
        step *= 2.0
        excess = _excess(caps, k, log_target)
    return caps


def _refuse_underflow(caps: FloatArray, log_target: float) -> None:
    if (caps < np.finfo(np.float64).tiny).any():
        raise ValueError(f"`log_target` = {log_target} needs a cap below 2e-308, the smallest float64: raise it.")


def _factor(norms: FloatArray, k: FloatArray, log_target: float) -> float:
    excess = _excess(norms, k, log_target)
    factor = 1.0
    share = max(excess, 0.0) / float(k.sum())
    step = 0.0
    while excess > 0.0:
        factor = math.exp(-share) * (1.0 - step)
        _refuse_underflow(norms * factor, log_target)
        excess = _excess(norms * factor, k, log_target)
        step = 2.0 * step + 2.0**-53
    return factor
