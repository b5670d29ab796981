"""What the figures show: norms and shares of the logarithm by logging step, thinned, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_lip.checks import check_integers, check_items, check_numbers, check_type, shown

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
    def of(cls, state: Any, n_layers: int) -> History:
        """Return what was kept in a state, or an empty history if that was of another number of layers."""
        steps, norms, shares, spacing, seen = state
        if any(len(row) != n_layers for row in norms):
            return cls()
        return cls(list(steps), list(norms), list(shares), spacing, seen)

    def state(self) -> list[Any]:
        """Return what goes into checkpoints."""
        return [self.steps, self.norms, self.shares, self.spacing, self.seen]

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


def check_histories(histories: Any) -> None:
    """Check what a checkpoint keeps of histories, by the tag of their layers.

    Raises:
        TypeError: If it is no mapping of lists, or their rows hold anything but numbers.
        ValueError: If a list has not its five parts, a count is no integer, or the rows do not fit the steps.
    """
    check_type("histories", histories, Mapping, "a mapping from tags to what the figures show")
    for tag, state in histories.items():
        name = f"histories[{tag!r}]"
        parts = check_items(name, state, PARTS)
        if len(parts) != 5:
            raise ValueError(f"Expected `{name}` to be {PARTS}, got {shown(state)}.")
        steps, norms, shares = (check_items(name, part, PARTS) for part in parts[:3])
        check_integers(0, **{f"{name}: steps[{index}]": step for index, step in enumerate(steps)})
        check_integers(1, **{f"{name}: spacing": parts[3]})
        check_integers(0, **{f"{name}: seen": parts[4]})
        # NaN and infinity are right: weights that were not finite had such norms.
        lengths = {len(check_numbers(f"{name}: norms and shares", row)) for row in (*norms, *shares)}
        if not len(steps) == len(norms) == len(shares) or len(lengths) > 1:
            raise ValueError(
                f"Expected `{name}` to hold a row of norms and one of shares for each step, all of one length, got "
                f"{len(steps)} steps, {len(norms)} and {len(shares)} rows, of lengths {sorted(lengths)}."
            )
