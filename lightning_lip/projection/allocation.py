"""How a budget is divided among the layers of a network: one cap for each layer that can move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_lip.graph.bound import Bound, NetworkBound
from lightning_lip.projection.caps import Caps, bound_caps, joint_caps, log_clip_caps, per_layer_caps
from lightning_lip.projection.clipping import FloatArray
from lightning_lip.projection.layers import ClippedLayer, ProjectedLayer, Triplets
from lightning_lip.projection.spectra import Metric
from lightning_lip.rigorous.rounding import exp_up

Method = Literal["joint", "log_clip", "per_layer", "scaling"]
"""How the budget is spent among the layers; see :class:`~lightning_lip.LipschitzProjector`."""

LARGEST_SHIFT = 1000.0
"""Beyond the range of fp64: a norm lowered by e^-1000 is zero."""


class Allocation:
    """The G of the L norms that can be lowered, and the bound as a function of their logarithms.

    Args:
        bound: The product or the network's bound, of L operators.
        layers: The G layers, at least one; the operators of one layer move together.
        spectra: Their singular values, or the norm alone where they are scaled; the largest is positive.
        frobenius: The Frobenius norms of those that are scaled, None where they are clipped.
        log_norms: The logarithms of all operators' norms, shape (L,).
    """

    def __init__(
        self,
        bound: Bound,
        layers: Sequence[ProjectedLayer],
        spectra: Sequence[FloatArray],
        frobenius: Sequence[float | None],
        log_norms: FloatArray,
    ) -> None:
        self._bound = bound
        self.layers = list(layers)
        self._spectra, self._frobenius = spectra, frobenius
        # Operators of one parameter move together: log_norms = constant + position of the layer's first.
        self._constant = log_norms.copy()
        self._targets = [index for layer in layers for index in layer.operators]
        self._sources = [position for position, layer in enumerate(layers) for _ in layer.operators]
        first = [layers[position].operators[0] for position in self._sources]
        self._constant[self._targets] -= log_norms[first]

    def write_(
        self, caps: Caps, triplets: Mapping[ClippedLayer, Triplets], originals: Mapping[ProjectedLayer, Tensor]
    ) -> None:
        """Write the layers' weights at their caps: clipped by their triplets, or their originals scaled."""
        for layer, cap, spectrum in zip(self.layers, caps.caps.tolist(), self._spectra, strict=True):
            if isinstance(layer, ClippedLayer):
                layer.clip_(triplets[layer], cap)
            else:
                layer.scale_(originals[layer], cap / float(spectrum[0]))

    def log_norms(self, logs: FloatArray) -> FloatArray:
        """Return the log norms of all operators, shape (L,), for those of the layers, shape (G,)."""
        log_norms: FloatArray = self._constant.copy()
        log_norms[self._targets] += logs[self._sources]
        return log_norms

    def caps(self, log_target: float, method: Method, metric: Metric) -> Caps:
        """Return the layers' caps.

        Raises:
            ValueError: If no caps reach the target.
        """
        shared: dict[str, Any] = {"metric": metric, "frobenius": self._frobenius}
        if self._bound.kind == "bound":
            return self._bound_caps(self._bound, log_target, method, shared)
        k = self._bound.multiplicities
        shared["multiplicities"] = [sum(k[i] for i in layer.operators) for layer in self.layers]
        log_target -= math.fsum(n * constant for n, constant in zip(k, self._constant, strict=True))
        if method == "joint":
            return joint_caps(self._spectra, log_target, **shared)
        if method == "per_layer":
            return per_layer_caps(self._spectra, log_target=log_target, **shared)
        return log_clip_caps(self._spectra, log_target, **shared)

    def _bound_caps(self, network: NetworkBound, log_target: float, method: Method, shared: dict[str, Any]) -> Caps:
        def log_bound(logs: FloatArray) -> tuple[float, FloatArray]:
            return self._log_bound(network, logs)

        if method == "joint":
            return bound_caps(self._spectra, log_bound, log_target, **shared)
        logs = np.log([spectrum[0] for spectrum in self._spectra])
        if method == "per_layer":
            top = float(logs.max())
            level = _smallest_shift(lambda shift: log_bound(np.minimum(logs, top - shift))[0], log_target)
            return per_layer_caps(self._spectra, np.exp(np.minimum(logs, top - level)).tolist(), **shared)
        shift = _smallest_shift(lambda shift: log_bound(logs - shift)[0], log_target)
        return per_layer_caps(self._spectra, np.exp(logs - shift).tolist(), **shared)

    def _log_bound(self, network: NetworkBound, logs: FloatArray) -> tuple[float, FloatArray]:
        """Return the logarithm of the network's bound and its gradient, shape (G,)."""
        value, slopes = network.log_bound_and_slopes(torch.from_numpy(self.log_norms(logs)))
        gradient = np.zeros(len(self.layers))
        np.add.at(gradient, self._sources, slopes.numpy()[self._targets])
        return value, gradient


def logarithms(norms: Sequence[float] | FloatArray) -> FloatArray:
    """Return the logarithms of norms >= 0, -inf for 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.asarray(norms, dtype=np.float64))


def _smallest_shift(log_bound: Callable[[float], float], log_target: float) -> float:
    """Return the smallest shift >= 0, up to rounding, at which a nonincreasing function is at most the target.

    Raises:
        ValueError: If it is above the target at every shift.
    """
    high = 1.0
    while log_bound(high) > log_target:
        high *= 2
        if high > LARGEST_SHIFT:
            smallest = exp_up(log_bound(high))
            raise ValueError(
                f"No weights of the selected layers reach the target: the smallest bound is {smallest:.6g}. "
                "Raise the target, or select more layers."
            )
    low = 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if log_bound(middle) <= log_target else (middle, high)
    return high
