"""A layer-by-step heat map: TensorBoard draws all lines of a run in one colour, so a deep net needs a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

MAX_LABELS = 40


def heat_map(names: Sequence[str], steps: Sequence[int], norms: Sequence[Sequence[float]]) -> Any | None:
    """Draw spectral norms by layer and step.

    Args:
        names: The L layers, from the input to the output.
        steps: K logging steps.
        norms: K lists of L spectral norms.

    Returns:
        A matplotlib figure, or None where matplotlib is not installed or nothing was logged yet.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    if not steps:
        return None
    values = [[math.log10(n[i]) if n[i] > 0 else math.nan for n in norms] for i in range(len(names))]
    every = math.ceil(len(names) / MAX_LABELS)
    figure = Figure(figsize=(9, 1.6 + 0.28 * min(len(names), MAX_LABELS)), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(_edges(steps), range(len(names) + 1), values, cmap="cividis", shading="flat")
    axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], [names[i] for i in range(0, len(names), every)])
    axes.invert_yaxis()
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("layer, input at the top")
    axes.set_title("Spectral norms (estimates from below)")
    bar = figure.colorbar(mesh, ax=axes)
    bar.set_label("log10 of the spectral norm")
    return figure


def _edges(steps: Sequence[int]) -> list[float]:
    """Return the K + 1 edges of cells around K increasing steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middle = [(a + b) / 2 for a, b in pairwise(steps)]
    return [2 * steps[0] - middle[0], *middle, 2 * steps[-1] - middle[-1]]
