"""One set of layers that a monitor reports: what it measures of them, and what it remembers for its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lip.norms.frobenius import FrobeniusNorms
from lightning_lip.penalty.regularizer import LipschitzRegularizer

MAX_HISTORY = 512
"""Steps that the figures show: with more, every other one is dropped and the spacing doubles."""

HEALTH = ("weight_norm", "stable_rank", "update_ratio")
"""What is measured of each weight beside its spectral norm, in the order of the table."""


@dataclass
class Source:
    """One set of layers to report: a penalty's, a mixin's, or the monitor's own.

    Attributes:
        tag: Prefix of the logged names.
        regularizer: What holds the layers and their singular vectors.
        penalty: The penalty as a step adds it, for log spectral norms; None without one.
        weights: What measures the health of the weights; None to leave that out.
        first: The first value of each logged name.
        last: The last value of each.
    """

    tag: str
    regularizer: LipschitzRegularizer
    penalty: Callable[[Tensor], Tensor] | None
    weights: FrobeniusNorms | None = None
    steps: list[int] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    spacing: int = 1
    seen: int = 0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The layers' names; a model that is itself a layer has none of its own."""
        return [op.name or "model" for op in self.regularizer.operators]

    @property
    def bound_tag(self) -> str:
        """The name under which the bound is logged: ``<tag>/bound`` with a traced graph, else ``<tag>/product``."""
        return f"{self.tag}/{self.regularizer.bound_kind}"

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
        """Keep what the figures show of a logging step, thinned to at most `MAX_HISTORY` steps."""
        if self.seen % self.spacing == 0:
            self.steps.append(step)
            self.norms.append(norms)
            self.shares.append(shares)
        self.seen += 1
        if len(self.steps) > MAX_HISTORY:
            self.steps, self.norms, self.shares = self.steps[::2], self.norms[::2], self.shares[::2]
            self.spacing *= 2

    def state(self) -> list[Any]:
        """Return what a checkpoint holds of the history."""
        ends = [self.first, self.last] if self.last else []
        return [self.steps, self.norms, self.shares, self.spacing, self.seen, *ends]

    def restore(self, state: Sequence[Any]) -> None:
        """Take over what :meth:`state` returned; in those of earlier versions there are no first and last values."""
        steps, norms, shares, self.spacing, self.seen, *ends = state
        self.steps, self.norms, self.shares = list(steps), list(norms), list(shares)
        self.first, self.last = map(dict, ends or ({}, {}))
