"""Figures of all layers over time: TensorBoard's own charts draw all lines of a run in one colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

MAX_LABELS = 40
"""Layers named on the axis of a heat map; of more, every n-th is."""

MAX_LEGEND = 12
"""Layers named in a legend; more share a colour bar."""


def heat_map(names: Sequence[str], steps: Sequence[int], norms: Sequence[Sequence[float]]) -> Any | None:
    """Draw spectral norms by layer and step.

    Args:
        names: The L layers, from the input to the output.
        steps: K logging steps.
        norms: K lists of L spectral norms.

    Returns:
        A matplotlib figure, or None where matplotlib is not installed or nothing was logged yet.
    """
    figure = _figure(steps, height=max(2.8, 1.4 + 0.18 * min(len(names), MAX_LABELS)))
    if figure is None:
        return None
    values = [[math.log10(n[i]) if n[i] > 0 else math.nan for n in norms] for i in range(len(names))]
    every = math.ceil(len(names) / MAX_LABELS)
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(_edges(steps), range(len(names) + 1), values, cmap="cividis", shading="flat")
    axes.set_yticks([i + 0.5 for i in range(0, len(names), every)], names[::every], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("layer, input at the top")
    axes.set_title("Spectral norms (estimates)")
    bar = figure.colorbar(mesh, ax=axes)
    bar.set_label("log10 spectral norm")
    return figure


def share_chart(names: Sequence[str], steps: Sequence[int], shares: Sequence[Sequence[float]], kind: str) -> Any | None:
    """Draw the layers' parts of the logarithm of the product or bound, stacked, by step.

    Parts above zero (spectral norms above 1) are stacked upwards, parts below zero downwards; a line shows the sum of
    all. A step at which a part is not finite (a layer that is zero) is not drawn.

    Args:
        names: The L layers, from the input to the output.
        steps: K logging steps.
        shares: K lists of L parts, ``k log sigma`` times the bound's elasticity.
        kind: ``"product"`` or ``"bound"``, what they are parts of.

    Returns:
        A matplotlib figure, or None where matplotlib is not installed or nothing was logged yet.
    """
    figure = _figure(steps, height=3.6)
    if figure is None:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    # A single step has no width: a bar of one step shows it.
    edges = _edges(steps) if len(steps) == 1 else list(steps)
    rows = list(shares) * 2 if len(steps) == 1 else list(shares)
    rows = [row if all(map(math.isfinite, row)) else [math.nan] * len(names) for row in rows]
    depth = Normalize(0, max(len(names) - 1, 1))
    colours = [colormaps["viridis"](depth(i)) for i in range(len(names))]
    axes = figure.add_subplot()
    above = [[max(row[i], 0.0) for row in rows] for i in range(len(names))]
    below = [[min(row[i], 0.0) for row in rows] for i in range(len(names))]
    # Without smoothed edges, which would leave light seams between the areas.
    axes.stackplot(edges, above, labels=names, colors=colours, antialiased=False)
    axes.stackplot(edges, below, colors=colours, antialiased=False)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.plot(edges, [math.fsum(row) for row in rows], color="black", linewidth=1.2)
    axes.margins(x=0)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"part of log {kind}")
    axes.set_title("Parts (estimates) and their sum")
    # Upwards from the input, in the order of the stack.
    if len(names) <= MAX_LEGEND:
        figure.legend(reverse=True, loc="outside right upper", fontsize="small")
    else:
        bar = figure.colorbar(ScalarMappable(depth, "viridis"), ax=axes, ticks=[0, len(names) - 1])
        bar.ax.set_yticklabels(["first", "last"])
        bar.set_label("layer")
    return figure


def certified_curve(levels: Sequence[float], shares: Sequence[float], accuracy: float) -> Any | None:
    """Draw certified accuracy against the norm of the perturbation, and the clean accuracy beside it.

    Args:
        levels: K norms eps, ascending.
        shares: The certified accuracy at each.
        accuracy: The accuracy without a perturbation.

    Returns:
        A matplotlib figure, or None where matplotlib is not installed.
    """
    figure = _figure(levels, height=3.6)
    if figure is None:
        return None
    axes = figure.add_subplot()
    axes.axhline(accuracy, color="black", linewidth=0.8, linestyle="--", label="clean accuracy")
    axes.plot(levels, shares, label="certified accuracy")
    axes.set_xlim(left=0.0)
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("eps, l2 norm of the perturbation")
    axes.set_ylabel("share of samples")
    axes.legend(loc="upper right", fontsize="small")
    return figure


def _figure(steps: Sequence[float], height: float) -> Any | None:
    """Return an empty figure; None where matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    # TensorBoard shrinks images to 350 pixels: text is large beside the figure.
    return Figure(figsize=(6.4, height), layout="constrained", dpi=130) if steps else None


def _edges(steps: Sequence[int]) -> list[float]:
    """Return the K + 1 edges of cells around K increasing steps."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middle = [(a + b) / 2 for a, b in pairwise(steps)]
    return [2 * steps[0] - middle[0], *middle, 2 * steps[-1] - middle[-1]]
