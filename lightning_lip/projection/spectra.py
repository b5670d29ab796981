"""Singular values of all layers, checked, with the metric in which their clipping is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from lightning_lip.checks import check_array, check_items
from lightning_lip.projection.clipping import ClippingProblem, FloatArray

Metric = Literal["relative", "euclidean"]
"""Weights w_l of the squared distance ``sum_l w_l ||W_l - V_l||_F^2``: ``1 / sigma_l1^2``, or 1."""


class Spectra:
    """Checked spectra, in units of their norms.

    ``norms``: shape (L,). ``_ratios``: sigma_li / sigma_l1, shape (L, r), rows descending from 1, padded with 0.
    ``_costs``: q_l, so that the squared distance is ``sum_l q_l sum_i (sigma_li / sigma_l1 - c_l / sigma_l1)_+^2``.
    """

    def __init__(
        self, spectra: Sequence[ArrayLike], metric: Metric | Sequence[float], frobenius: Sequence[float | None] | None
    ) -> None:
        rows = [check_array("spectra", row) for row in check_items("spectra", spectra, "a sequence of vectors")]
        if not rows:
            raise ValueError("Expected `spectra` to hold the singular values of at least one layer, got none.")
        for index, row in enumerate(rows):
            if row.ndim != 1 or row.size == 0:
                raise ValueError(
                    f"`spectra`: expected layer {index}'s singular values in a non-empty vector, got {row.shape}."
                )
        values = np.zeros((len(rows), max(row.size for row in rows)))
        for index, row in enumerate(rows):
            values[index, : row.size] = row
        if not (np.isfinite(values) & (values >= 0.0)).all():
            index = int((~(np.isfinite(values) & (values >= 0.0))).any(axis=1).argmax())
            raise ValueError(
                f"Expected `spectra` to be finite and >= 0, got {values[index]} for layer {index}: look for what made "
                "its weight diverge."
            )
        values = -np.sort(-values, axis=1)
        self.norms = values[:, 0].copy()
        self._relative = isinstance(metric, str) and metric == "relative"
        with np.errstate(over="ignore"):
            costs = np.ones(len(rows)) if self._relative else _weights(metric, len(rows)) * self.norms**2
        self._ratios = values / np.where(self.norms > 0.0, self.norms, 1.0)[:, None]
        if frobenius is not None:
            frobenius = check_items("frobenius", frobenius, "a sequence of numbers and None")
            if len(frobenius) != len(rows):
                raise ValueError(f"Expected {len(rows)} entries of `frobenius`, one per layer, got {len(frobenius)}.")
            for index, norm in enumerate(frobenius):
                if norm is None:
                    continue
                f = check_array("frobenius", norm)
                if f.ndim or not (np.isfinite(f) and (f > 0.0 or f == self.norms[index])):
                    raise ValueError(
                        f"`frobenius`: expected a positive Frobenius norm, got {norm!r} for layer {index}."
                    )
                if self.norms[index] > 0.0:
                    self._ratios[index, 1:] = 0.0
                    costs[index] *= (f / self.norms[index]) ** 2
        if not np.isfinite(costs).all():
            raise ValueError("The squared distance exceeds float64: rescale the spectra, or use metric='relative'.")
        # A zero layer is never clipped, and must not look cheaper to clip than another.
        self._ratios[self.norms == 0.0] = 1.0
        self._costs = np.where(self.norms > 0.0, costs, costs.max())

    def problem(self, start: FloatArray) -> ClippingProblem:
        """Return the convex problem for the spectra clipped at `start`, shape (L,)."""
        shares = self._shares(start)
        deficits = np.maximum(1.0 - self._ratios / shares[:, None], 0.0)
        return ClippingProblem(deficits, self._costs if self._relative else self._costs * shares**2)

    def squared_distance(self, caps: FloatArray) -> float:
        """Return ``sum_l w_l sum_i (sigma_li - c_l)_+^2`` for caps of shape (L,)."""
        clipped = np.maximum(self._ratios - self._shares(caps)[:, None], 0.0)
        return float(self._costs @ np.einsum("lr,lr->l", clipped, clipped))

    def _shares(self, caps: FloatArray) -> FloatArray:
        """Return ``c_l / sigma_l1``, 1 for a zero layer; shape (L,)."""
        shares: FloatArray = np.divide(caps, self.norms, out=np.ones_like(caps), where=self.norms > 0.0)
        return shares


def per_layer(name: str, values: Sequence[float], n_layers: int) -> FloatArray:
    """Return `values` as an array, checked: one positive finite number per layer."""
    array = check_array(name, values)
    if array.shape != (n_layers,):
        raise ValueError(f"Expected {n_layers} entries of `{name}`, one per layer, got shape {array.shape}.")
    if not (np.isfinite(array) & (array > 0.0)).all():
        raise ValueError(f"Expected positive finite `{name}`, got {array}.")
    return array


def _weights(metric: Metric | Sequence[float], n_layers: int) -> FloatArray:
    if not isinstance(metric, str):
        return per_layer("metric", metric, n_layers)
    if metric != "euclidean":
        raise ValueError(f"Expected `metric` to be one of {get_args(Metric)} or one number per layer, got {metric!r}.")
    return np.ones(n_layers)
