"""What a selection covers: the operators found, and the layers that were left out because none of theirs is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lip.operators.base import LinearOperator

ROWS = 8
"""Types of layers that the text names; the others are counted."""


@dataclass(frozen=True)
class Skipped:
    """A layer that was left out: its name, its type, and why its operator is not known."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """What the norms of a selection cover; as text, a short table.

    Attributes:
        operators: The L operators, each distinct weight once, in the model's order.
        layers: The types of the covered layers, by name.
        skipped: The layers without a known norm, which were left out.
        share: The part of the model's parameters that the covered layers hold, biases included, from 0 to 1.
        normalisations: What became of the normalisations that a forward pass showed, by count; "" if none was seen.
    """

    operators: list[LinearOperator]
    layers: Mapping[str, str]
    skipped: Sequence[Skipped]
    share: float
    normalisations: str = ""

    def __str__(self) -> str:
        covered = counted(self.layers.values())
        lines = [
            f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''} with {self.share:.1%} of the parameters:",
            f"  covered   {covered}",
            *([f"  of these  {self.normalisations}"] if self.normalisations else []),
            *(f"  left out  {row}" for row in rows(self.skipped)),
        ]
        return "\n".join(lines)


def counted(kinds: Iterable[str]) -> str:
    """Return types with their counts, the most frequent first: '20 Conv2d, 1 Linear'."""
    counts = Counter(kinds).most_common()
    named = [f"{count} {kind}" for kind, count in counts[:ROWS]]
    return ", ".join(named + ([f"{sum(n for _, n in counts[ROWS:])} of other types"] if len(counts) > ROWS else []))


def rows(skipped: Sequence[Skipped]) -> list[str]:
    """Return one line a type, the most frequent first, with the reason that the first layer of the type has."""
    counts = Counter(layer.kind for layer in skipped).most_common()
    reasons = {layer.kind: layer.reason for layer in reversed(skipped)}
    lines = [f"{count} {kind}: {reasons[kind]}" for kind, count in counts[:ROWS]]
    return lines + ([f"{sum(n for _, n in counts[ROWS:])} of other types"] if len(counts) > ROWS else [])


def share_of(model: nn.Module, operators: Iterable[LinearOperator]) -> float:
    """Return the part of a model's parameters that operators are made of; the biases of their modules count as theirs.

    Parameters without a shape yet, of lazy layers, do not count.
    """
    sizes = {id(p): 0 if is_lazy(p) else p.numel() for p in model.parameters()}
    covered: set[int] = set()
    for op in operators:
        covered |= {id(p) for p in op.parameters}
        covered |= {id(p) for key, p in op.module._parameters.items() if p is not None and key.endswith("bias")}
    total = sum(sizes.values())
    return sum(size for key, size in sizes.items() if key in covered) / total if total else 0.0
