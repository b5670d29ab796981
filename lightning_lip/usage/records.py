"""What is recorded of a forward pass: weights, what their products went into, and normalisations."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_lip.usage.functions import Layout
from lightning_lip.usage.values import Value


@dataclass(eq=False, repr=False)
class Normalisation:
    """One call of a normalisation.

    Attributes:
        module: The module that holds its tensors; None if it has none.
        gain: gamma, or None.
        variance: Its running variance; None if it divides by the size of its own input.
        eps: What is added to the variance.
        output: The output of a layer that it normalises, or None.
        fits: Whether its channels are the layer's outputs, one by one, so that both are one operator.
    """

    module: nn.Module | None
    gain: Value | None
    variance: Value | None
    eps: float
    output: Output | None = None
    fits: bool = False

    @property
    def identity(self) -> Hashable:
        """The same for every call of one normalisation."""
        value = self.variance or self.gain
        return None if value is None else value.identity


@dataclass(eq=False, repr=False)
class Output:
    """What one call of a layer returned, and all that was done with it: normalisations, and None for anything else."""

    use: Use
    consumers: list[Normalisation | None] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Use:
    """A weight that multiplied activations.

    Attributes:
        weight: Its value: a whole parameter, where slices of that multiply; else what is computed from parameters.
        layouts: How it multiplied.
        outputs: What its calls returned.
        is_seen: Whether each call's output was seen, so that its consumers are all there are.
        convolution: For a kernel: the function's name and settings, and the shape of one input.
    """

    weight: Value
    layouts: set[Layout] = field(default_factory=set)
    outputs: list[Output] = field(default_factory=list)
    is_seen: bool = True
    convolution: tuple[str, dict[str, Any], tuple[int, ...]] | None = None
