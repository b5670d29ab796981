"""Plots of a metric that has one value for each level: of noise, or of a perturbation's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE


def plot_levels(
    metric: Metric,
    val: Tensor | Sequence[Tensor] | None,
    ax: _AX_TYPE | None,
    levels: Sequence[float],
    symbol: str,
    meaning: str,
) -> _PLOT_OUT_TYPE:
    """Plot one value over the levels, or a list of values over steps with one line a level.

    Args:
        metric: The metric, whose ``compute`` returns a tensor of shape (L,).
        val: What ``compute`` or ``forward`` returned, or a list of these; ``compute()`` where it is None.
        ax: matplotlib axes to draw on; new ones where it is None.
        levels: The L levels.
        symbol: Name of a level, as in ``eta=0.2``.
        meaning: What a level is, for the axis.

    Returns:
        The figure (None where `ax` was given) and the axes.

    Raises:
        ModuleNotFoundError: Where matplotlib is not installed.
    """
    if val is not None and not isinstance(val, Tensor):
        names = [f"{symbol}={level:g}" for level in levels]
        return metric._plot([dict(zip(names, step, strict=True)) for step in val], ax)
    figure, axes = metric._plot(metric.compute() if val is None else val, ax)
    drawn: Any = axes
    drawn.get_xaxis().set_visible(True)
    drawn.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    drawn.set_xlabel(f"{meaning} {symbol}")
    if (legend := drawn.get_legend()) is not None:
        legend.remove()
    return figure, axes
