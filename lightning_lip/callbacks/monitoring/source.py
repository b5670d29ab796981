"""One set of layers that a monitor reports: what it measures of them, and what it remembers for its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lip.callbacks.tensorboard.history import PARTS, History, check_history
from lightning_lip.checks import check_items, check_numbers, check_type, shown
from lightning_lip.norms.frobenius import FrobeniusNorms
from lightning_lip.penalty.regularizer import LipschitzRegularizer

HEALTH = ("weight_norm", "stable_rank", "update_ratio")
"""What is measured of each weight beside its spectral norm, in the order of the table."""

WHOLE = f"{PARTS}, or that with the first and the last values by their names behind"


@dataclass
class Source:
    """One set of layers to report: a penalty's, a mixin's, or the monitor's own.

    Attributes:
        tag: Prefix of the logged names.
        regularizer: What holds the layers and their singular vectors.
        penalty: The penalty as a step adds it, for log spectral norms; None without one.
        has_health: Whether the health of the weights is measured.
        history: What the figures show.
        first: The first value of each logged name.
        last: The last value of each.
    """

    tag: str
    regularizer: LipschitzRegularizer
    penalty: Callable[[Tensor], Tensor] | None
    has_health: bool = False
    history: History = field(default_factory=History)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    _weights: FrobeniusNorms | None = field(default=None, init=False)

    @property
    def names(self) -> list[str]:
        """The layers' names; a model that is itself a layer has none of its own."""
        return [op.name or "model" for op in self.regularizer.operators]

    @property
    def bound_tag(self) -> str:
        """The name under which the bound is logged: ``<tag>/bound`` with a traced graph, else ``<tag>/product``."""
        return f"{self.tag}/{self.regularizer.bound_kind}"

    @property
    def weights(self) -> FrobeniusNorms | None:
        """What measures the health of the present layers, which the first training step may replace; None without."""
        operators = self.regularizer.operators
        if self.has_health and (self._weights is None or self._weights.operators is not operators):
            self._weights = FrobeniusNorms(operators)
        return self._weights

    def before_step(self) -> None:
        """Copy the weights, for the update ratio of the measurement to come."""
        if self.weights is not None:
            self.weights.keep()

    def forget(self) -> None:
        """Free the copies, where nothing is measured."""
        if self.weights is not None:
            self.weights.drop()

    def measure(self) -> tuple[dict[str, float], list[float], list[float]]:
        """Return what is logged, by name, the spectral norms and the log shares, with one copy from the device."""
        regularizer = self.regularizer
        with torch.inference_mode(False), torch.enable_grad():
            log_sigma = regularizer.log_sigma().requires_grad_()
            log_bound = regularizer.log_bound_of(log_sigma)
            (elasticity,) = torch.autograd.grad(log_bound, log_sigma)
        with torch.no_grad():
            log_sigma = log_sigma.detach()
            by_layer = {"spectral_norm": log_sigma.exp(), "log_share": elasticity * log_sigma}
            by_layer |= self._health(log_sigma.exp())
            scalars = {self.bound_tag: log_bound.detach().exp()}
            if regularizer.has_upper:
                log_upper = regularizer.sigma_upper().to(log_sigma).log()
                scalars[f"{self.bound_tag}_upper"] = regularizer.log_bound_of(log_upper).exp()
            if self.penalty is not None:
                scalars[f"{self.tag}/penalty"] = self.penalty(log_sigma)
            values = torch.cat([*by_layer.values(), torch.stack(list(scalars.values()))]).tolist()
        tags = [f"{self.tag}/{kind}/{name}" for kind in by_layer for name in self.names]
        metrics = dict(zip([*tags, *scalars], values, strict=True))
        self.first = metrics | self.first
        self.last |= metrics
        n = len(self.names)
        return metrics, values[:n], values[n : 2 * n]

    def _health(self, sigma: Tensor) -> dict[str, Tensor]:
        """Return the measures of :data:`HEALTH`, each of shape (L,), on the device of the spectral norms."""
        if self.weights is None:
            return {}
        norms, ratios = self.weights.measure()
        norms = norms.to(sigma)
        # A zero layer has the rank zero.
        health = {"weight_norm": norms, "stable_rank": torch.where(sigma > 0, (norms / sigma).square(), sigma)}
        return health if ratios is None else health | {"update_ratio": ratios.to(sigma)}

    def remember(self, step: int, norms: list[float], shares: list[float]) -> None:
        """Keep what the figures show of a logging step; a history of another number of layers is begun anew."""
        if not self.history.is_of(len(norms)):
            self.history = History()
        self.history.remember(step, norms, shares)

    def state(self) -> list[Any]:
        """Return what a checkpoint holds of the source."""
        return [*self.history.state(), *([self.first, self.last] if self.last else [])]

    def restore(self, state: Sequence[Any]) -> None:
        """Take over what :meth:`state` returned; in those of earlier versions there are no first and last values."""
        self.history = History.of(state[:5])
        self.first, self.last = map(dict, state[5:] or ({}, {}))


def check_sources(histories: Any) -> None:
    """Check what a checkpoint keeps of sources, by their tags.

    Raises:
        TypeError: If it is no mapping of lists, or they hold anything but numbers where numbers belong.
        ValueError: If a list has not its parts, a count is no integer, the rows do not fit the steps, or the first
            values are of other names than the last.
    """
    check_type("histories", histories, Mapping, "a mapping from tags to what was measured")
    for tag, state in histories.items():
        name = f"histories[{tag!r}]"
        parts = check_items(name, state, WHOLE)
        if len(parts) not in (5, 7):
            raise ValueError(f"Expected `{name}` to be {WHOLE}, got {shown(state)}.")
        check_history(name, parts[:5])
        for kind, values in zip(("first", "last"), parts[5:], strict=False):
            check_type(f"{name}: {kind}", values, Mapping, "a mapping from logged names to their values")
            check_numbers(f"{name}: {kind}", list(values.values()))
        if parts[5:] and set(parts[5]) != set(parts[6]):
            raise ValueError(
                f"Expected `{name}` to hold a first and a last value of the same names, got first values of "
                f"{shown(sorted(parts[5], key=str))} and last ones of {shown(sorted(parts[6], key=str))}."
            )
