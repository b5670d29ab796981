"""Projections of spectra onto a budget for the network's Lipschitz bound: the joint one, and simpler baselines.

All functions are pure: singular values in, one cap c_l per layer out (NumPy, float64). Whoever holds the weights then
replaces layer l's singular values above c_l by c_l, which gives the nearest matrices in the (weighted) Frobenius norm
(Mirsky, 1960), or multiplies a layer that can only be scaled by ``c_l / sigma_l1``.

The set of weights with ``prod_l ||W_l||_2^k_l <= M`` is not convex: N. Couellan (2019) calls its projection difficult.
In the logarithms ``u_l = log(sigma_l1 / c_l)`` the constraint is linear, and the distance is convex up to log 2: see
:mod:`lightning_lip.projection.clipping`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from lightning_lip.checks import check_callable, is_finite_number, shown
from lightning_lip.projection.clipping import LOG_2, FloatArray
from lightning_lip.projection.spectra import Metric, Spectra, per_layer

LogBound = Callable[[FloatArray], tuple[float, FloatArray]]
"""``log_bound(log_sigma) -> (value, elasticities)``, (L,) -> (), (L,): the logarithm of the bound, and its gradient."""

_MAX_CUTS = 100


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

    *Exact* (the nearest point of the set, to a relative 1e-9 of the squared distance, or to the rounding of log M where
    the product exceeds M by less than a millionth) where ``Caps.exact`` says so; always if the product exceeds M by a
    factor of at most ``2^min(k)``. Beyond, the nearest point may collapse one layer; the *non-collapsing* projection is
    returned instead: rounds of the same convex problem, each of which takes no layer below half its norm; every round
    but the last halves every layer.

    Guaranteed for the floats returned: ``math.fsum(k * math.log(c) for k, c in zip(multiplicities, caps)) <=
    log_target``, or a cap is 0. Projecting what was projected changes nothing, bit for bit.

    Args:
        spectra: Singular values of every layer, in any order, >= 0, shapes (r_l,). Of a long spectrum the largest
            values suffice if no cap lies below the smallest of them.
        log_target: log M, finite.
        metric: w_l: ``"relative"`` (1 / sigma_l1^2; in every round the norm at its start), ``"euclidean"`` (1), or one
            positive number per layer.
        multiplicities: k_l > 0: how often layer l is applied. Default: 1.
        frobenius: Frobenius norms f_l > 0 of the layers that can only be scaled, None for those that can be clipped:
            layer l then costs ``w_l f_l^2 (1 - c_l / sigma_l1)^2``, and only its largest singular value is used.

    Raises:
        ValueError: If an argument has another shape or range than stated, or the caps underflow.
    """
    layers = Spectra(spectra, metric, frobenius)
    k = _multiplicities(multiplicities, len(layers.norms))
    excess = _excess(layers.norms, k, _finite(log_target))
    if excess <= 0.0:
        return _result(layers, layers.norms, rounds=0, exact=True)
    # The last round is never empty.
    full_rounds = math.ceil(excess / (LOG_2 * k.sum())) - 1
    start = np.ldexp(layers.norms, -full_rounds)
    _refuse_underflow(start, layers.norms, log_target)
    rest = _excess(start, k, log_target)
    if rest <= 0.0:
        return _result(layers, start, rounds=full_rounds, exact=False)
    problem = layers.problem(start)
    u, _ = problem.solve(k, rest)
    caps = _lowered(_clip(start, u), k, log_target, int(u.argmax()))
    return _result(layers, caps, rounds=full_rounds + 1, exact=full_rounds == 0 and problem.is_global(u))


def bound_caps(
    spectra: Sequence[ArrayLike],
    log_bound: LogBound,
    log_target: float,
    *,
    metric: Metric | Sequence[float] = "relative",
    frobenius: Sequence[float | None] | None = None,
) -> Caps:
    """Return the caps of the joint projection onto ``{log_bound(log c) <= log M}``, for a bound that is no product.

    *Exact* (to a relative 1e-9 of the squared distance, or where the bound exceeds M by less than a thousandth to a
    rounding of about 1e-13 in log M) where ``Caps.exact`` says so: a sequence of half-spaces that
    contain the feasible set (its tangents) gives nearest points from below, until one of them is feasible to rounding.
    Beyond, as in :func:`joint_caps`, the *non-collapsing* projection: while halving everything does not reach M, a
    round halves every layer whose elasticity is positive. For a linear `log_bound` this is :func:`joint_caps`.

    Guaranteed for the floats returned: ``log_bound(np.log(caps))[0] <= log_target``; so what was projected is not
    changed again.

    Args:
        spectra: As in :func:`joint_caps`.
        log_bound: Takes the logarithms of the norms, shape (L,), -inf for a zero layer; returns the bound's logarithm
            and its gradient, the elasticities, shape (L,). Must be convex and nondecreasing, as sums, maxima, products
            and ``1 + sigma`` are (in logarithms); float64, or the result is as coarse as its rounding.
        log_target: log M, finite.
        metric: As in :func:`joint_caps`.
        frobenius: As in :func:`joint_caps`.

    Raises:
        ValueError: If no caps reach the target (the message has the smallest bound that can be reached), if
            `log_bound` returns something else than stated, or as in :func:`joint_caps`.
    """
    layers = Spectra(spectra, metric, frobenius)
    log_target = _finite(log_target)
    check_callable("log_bound", log_bound, "from (L,) to (), (L,)")
    evaluate = partial(_evaluate, log_bound, log_target)
    start = layers.norms
    value, a = evaluate(start)
    rounds = 0
    # Aim below the target by more than the rounding of the bound, so that the last tangent's solution is feasible.
    logs = np.log(start, out=np.zeros_like(start), where=start > 0.0)
    aim = log_target - 2.0**-46 * (1.0 + abs(log_target) + float(a @ np.abs(logs)))
    while value > log_target and evaluate(0.5 * start)[0] > aim:
        if rounds == 0:
            _refuse_unreachable(float(log_bound(np.full_like(start, -np.inf))[0]), log_target)
        start = np.where(a > 0.0, 0.5 * start, start)
        positive = layers.norms > 0.0
        _refuse_underflow(start[positive], layers.norms[positive], log_target)
        rounds += 1
        value, a = evaluate(start)
    if value <= log_target:
        return _result(layers, start, rounds, exact=rounds == 0)

    problem = layers.problem(start)
    u = np.zeros_like(start)
    A, d, multipliers = np.empty((0, len(start))), np.empty(0), np.empty(0)
    for _ in range(_MAX_CUTS):
        A, d = np.vstack([A, a]), np.append(d, value - aim + float(a @ u))
        u, multipliers = problem.solve_all(A, d, np.append(multipliers, 0.0))
        used = multipliers > 0.0
        A, d, multipliers = A[used], d[used], multipliers[used]
        caps = _clip(start, u)
        value, a = evaluate(caps)
        if value <= log_target:
            return _result(layers, caps, rounds + 1, exact=rounds == 0 and problem.is_global(u))
    return _result(layers, _retreat(evaluate, start, u, log_target), rounds + 1, exact=False)


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
    layers = Spectra(spectra, metric, frobenius)
    k = _multiplicities(multiplicities, len(layers.norms))
    caps = layers.norms * _factor(layers.norms, k, _finite(log_target))
    feasible = np.array_equal(caps, layers.norms)
    return _result(layers, caps, rounds=0 if feasible else 1, exact=feasible)


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
    layers = Spectra(spectra, metric, frobenius)
    n_layers = len(layers.norms)
    if caps is not None:
        limits = per_layer("caps", caps, n_layers)
    else:
        k = _multiplicities(multiplicities, n_layers)
        level = math.exp(_finite(log_target) / k.sum())
        limits = np.full(n_layers, level)
        while _excess(limits, k, _finite(log_target)) > 0.0:
            limits = np.nextafter(limits, 0.0)
    clipped = np.minimum(layers.norms, limits)
    feasible = np.array_equal(clipped, layers.norms)
    return _result(layers, clipped, rounds=0 if feasible else 1, exact=True)


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
    layers = Spectra(spectra, "relative", None)
    k = _multiplicities(multiplicities, len(layers.norms))
    return np.full(len(k), _factor(layers.norms, k, _finite(log_target)))


def _result(layers: Spectra, caps: FloatArray, rounds: int, exact: bool) -> Caps:
    return Caps(caps.copy(), layers.squared_distance(caps) if rounds else 0.0, rounds, exact)


def _multiplicities(multiplicities: Sequence[float] | None, n_layers: int) -> FloatArray:
    return np.ones(n_layers) if multiplicities is None else per_layer("multiplicities", multiplicities, n_layers)


def _finite(log_target: float | None) -> float:
    if not is_finite_number(log_target):
        raise ValueError(f"Expected a finite `log_target`, the logarithm of a target M > 0, got {shown(log_target)}.")
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


def _refuse_underflow(caps: FloatArray, norms: FloatArray, log_target: float) -> None:
    if (caps < np.finfo(np.float64).tiny * np.maximum(norms, 1.0)).any():
        raise ValueError(
            f"`log_target` = {log_target} needs a cap below 2e-308, the smallest float64, or below 2e-308 of the "
            "layer's norm: raise it."
        )


def _factor(norms: FloatArray, k: FloatArray, log_target: float) -> float:
    excess = _excess(norms, k, log_target)
    factor = 1.0
    share = max(excess, 0.0) / float(k.sum())
    step = 0.0
    while excess > 0.0:
        factor = math.exp(-share) * (1.0 - step)
        _refuse_underflow(norms * factor, norms, log_target)
        excess = _excess(norms * factor, k, log_target)
        step = 2.0 * step + 2.0**-53
    return factor


def _evaluate(log_bound: LogBound, log_target: float, norms: FloatArray) -> tuple[float, FloatArray]:
    """Return `log_bound` at the logarithms of `norms`, checked; elasticities of zero layers are 0."""
    with np.errstate(divide="ignore"):
        value, elasticities = log_bound(np.log(norms))
    value, a = float(value), np.where(norms > 0.0, np.asarray(elasticities, dtype=np.float64), 0.0)
    if a.shape != norms.shape:
        raise ValueError(
            f"Expected `log_bound` to return {len(norms)} elasticities, got shape {np.shape(elasticities)}."
        )
    if math.isnan(value) or value == math.inf:
        raise ValueError(f"Expected `log_bound` to return a finite value (or -inf), got {value} for norms {norms}.")
    if not (np.isfinite(a) & (a >= -1e-9)).all():
        raise ValueError(f"Expected `log_bound` to return elasticities >= 0, got {a} for norms {norms}.")
    a = np.maximum(a, 0.0)
    if not a.any():
        # A convex function is smallest where its gradient is 0.
        _refuse_unreachable(value, log_target)
    return value, a


def _refuse_unreachable(smallest: float, log_target: float) -> None:
    if smallest > log_target:
        raise ValueError(
            f"No caps reach the target {math.exp(log_target):.6g} (log {log_target:.6g}): the smallest bound is "
            f"{math.exp(smallest):.6g} (log {smallest:.6g}). Expected a larger `log_target`."
        )


def _retreat(
    evaluate: Callable[[FloatArray], tuple[float, FloatArray]], start: FloatArray, u: FloatArray, log_target: float
) -> FloatArray:
    """Return feasible caps on the way from `u` to halving every layer, which is feasible: bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        middle = 0.5 * (low + high)
        feasible = evaluate(_clip(start, u + middle * (LOG_2 - u)))[0] <= log_target
        low, high = (low, middle) if feasible else (middle, high)
    return _clip(start, u + high * (LOG_2 - u))
