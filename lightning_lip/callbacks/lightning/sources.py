"""Source: one set of layers that a monitor reports, and their history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lightning_lip.penalty.regularizer import LipschitzRegularizer

MAX_HISTORY = 512
"""Steps that the figures show: with more, every other one is dropped and the spacing doubles."""


@dataclass
class Source:
    """One set of layers to report: a penalty's, a mixin's, or the monitor's own."""

    tag: str
    regularizer: LipschitzRegularizer
    penalty: Callable[[Tensor], Tensor] | None
    steps: list[int] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    spacing: int = 1
    seen: int = 0

    @property
    def names(self) -> list[str]:
        """The layers' names; a model that is itself a layer has none of its own."""
        return [op.name or "model" for op in self.regularizer.operators]

    @property
    def bound_tag(self) -> str:
        """The name under which the bound is logged: ``<tag>/bound`` with a traced graph, else ``<tag>/product``."""
        return f"{self.tag}/{self.regularizer.bound_kind}"

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
