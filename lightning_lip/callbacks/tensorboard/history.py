"""What the figures show: norms and shares of the logarithm by logging step, thinned, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lip.checks import check_integers, check_items, check_numbers

MAX_STEPS = 512
"""Steps that are kept: with more, every other one is dropped and the spacing doubles."""

PARTS = "a list [steps, norms, shares, spacing, seen]"


@dataclass
class History:
    """The K logging steps that are kept of one set of L layers.

    Attributes:
        steps: K logging steps.
        norms: K lists of L spectral norms.
        shares: K lists of L parts of the logarithm of the product or bound.
        spacing: How many logging steps lie between two that are kept.
        seen: How many logging steps there were.
    """

    steps: list[int] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    spacing: int = 1
    seen: int = 0

    @classmethod
    def of(cls, state: Sequence[Any]) -> History:
        """Return what was kept in a state."""
        steps, norms, shares, spacing, seen = state
        return cls(list(steps), list(norms), list(shares), spacing, seen)

    def state(self) -> list[Any]:
        """Return what goes into checkpoints."""
        return [self.steps, self.norms, self.shares, self.spacing, self.seen]

    def is_of(self, n_layers: int) -> bool:
        """Whether what is kept is of so many layers, or nothing is kept."""
        return not self.norms or len(self.norms[0]) == n_layers

    def remember(self, step: int, norms: list[float], shares: list[float]) -> None:
        """Keep what the figures show of a logging step, thinned to at most `MAX_STEPS` steps."""
        if self.seen % self.spacing == 0:
            self.steps.append(step)
            self.norms.append(norms)
            self.shares.append(shares)
        self.seen += 1
        if len(self.steps) > MAX_STEPS:
            self.steps, self.norms, self.shares = self.steps[::2], self.norms[::2], self.shares[::2]
            self.spacing *= 2


def check_history(name: str, state: Sequence[Any]) -> None:
    """Check what a checkpoint keeps of one history.

    Args:
        name: What the state is called.
        state: Its five parts.

    Raises:
        TypeError: If a part is no list, or the rows hold anything but numbers.
        ValueError: If a count is no integer, or the rows do not fit the steps.
    """
    steps, norms, shares = (check_items(name, part, PARTS) for part in state[:3])
    check_integers(0, **{f"{name}: steps[{index}]": step for index, step in enumerate(steps)})
    check_integers(1, **{f"{name}: spacing": state[3]})
    check_integers(0, **{f"{name}: seen": state[4]})
    # NaN and infinity are right: weights that were not finite had such norms.
    lengths = {len(check_numbers(f"{name}: norms and shares", row)) for row in (*norms, *shares)}
    if not len(steps) == len(norms) == len(shares) or len(lengths) > 1:
        raise ValueError(
            f"Expected `{name}` to hold a row of norms and one of shares for each step, all of one length, got "
            f"{len(steps)} steps, {len(norms)} and {len(shares)} rows, of lengths {sorted(lengths)}."
        )
