"""The paper's Figures 1, 2 and 3 and the front of accuracy against robustness.

Every function returns a `matplotlib.figure.Figure` made without pyplot, so that no window system and no global
state is touched. Colours are Okabe and Ito's, one per regime everywhere; lines differ in style too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lip.paper.regimes.settings import GRID, LABELS, PAPER_SETTING, REGIMES, Setting, Table, finals
from lightning_lip.paper.regimes.tuning import Sweep, Tuning, sweeps_of
from lightning_lip.paper.settings import METRICS, NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import interval
from lightning_lip.reporting.documents import remove_events, replacing
from lightning_lip.reporting.extras import extra

COLOURS = {"none": "#000000", "layer": "#E69F00", "product": "#0072B2", "maxnorm": "#CC79A7"}
LINES = {"none": "-", "layer": "--", "product": "-", "maxnorm": ":"}
WIDTHS = {"none": 2.4, "layer": 1.4, "product": 1.2, "maxnorm": 1.2}
MARKERS = {"none": "o", "layer": "s", "product": "^", "maxnorm": "x"}

SIZES = {"none": 13, "layer": 10, "product": 8, "maxnorm": 6}

SKIPPED = 8
"""The first epochs, which the axes of errors over epochs are not scaled to."""

Figure = Any


def region() -> Figure:
    """Figure 1: the contours of |W1| |W2|, and where the product is at most 1 against the square."""
    figure, (left, right) = _panels(1, 2, (8.0, 3.9))
    axis = np.linspace(-3.0, 3.0, 601)
    product = np.abs(np.multiply.outer(axis, axis))
    levels = [0.25, 1.0, 2.0, 4.0, 6.0]
    widths = [2.2 if level == 1 else 1.1 for level in levels]
    contours = left.contour(axis, axis, product, levels=levels, colors=COLOURS["product"], linewidths=widths)
    left.clabel(contours, fmt="%g", fontsize=9, manual=[(level**0.5, level**0.5) for level in levels])
    left.set_title("contours of |W1| |W2|")
    fill = right.contourf(axis, axis, product, levels=[0.0, 1.0], colors=[COLOURS["product"]], alpha=0.3)
    right.contour(axis, axis, product, levels=[1.0], colors=[COLOURS["product"]], linewidths=1.8)
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
    style = {"color": COLOURS["layer"], "linestyle": LINES["layer"], "linewidth": 2.2}
    (outline,) = right.plot(square[:, 0], square[:, 1], **style)
    right.set_title("the feasible regions")
    for axes in (left, right):
        axes.set(xlabel="W1", ylabel="W2", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        axes.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        axes.axvline(0, color="0.8", linewidth=0.6, zorder=0)
    handles = [fill.legend_elements()[0][0], outline]
    labels = ["product: |W1| |W2| ≤ 1", "layer by layer: |W1| ≤ 1 and |W2| ≤ 1"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def training(table: Table) -> Figure:
    """Figure 2: training MAE and loss over the epochs, mean and 95% interval over the seeds."""
    figure, axes = _panels(1, 2, (8.6, 3.8))
    _curves(axes[0], table, "train_mae")
    axes[0].set(title="training MAE", ylabel="MAE (thousand dollars)")
    _curves(axes[1], table, "train_mse")
    axes[1].set(title="training loss (MSE, without the penalty)", ylabel="MSE (thousand dollars, squared)")
    return _finished(figure, axes)


def validation(table: Table) -> Figure:
    """Figure 3: validation MAE over the epochs at each noise level, mean and 95% interval over the seeds."""
    figure, grid = _panels(2, 2, (8.6, 6.6))
    axes = grid.ravel()
    for panel, level in zip(axes, NOISE_LEVELS, strict=True):
        _curves(panel, table, validation_key(level))
        panel.set(title=f"validation, eta = {level:g}", ylabel="MAE (thousand dollars)")
    return _finished(figure, axes)


def front(table: Table, sweeps: Sequence[Sweep] = ()) -> Figure:
    """Clean against noisy validation MAE: each seed, each regime's mean, and the path over the coefficients.

    Args:
        table: The records of one setting.
        sweeps: Draws the tuning seeds' means along the grid of coefficients.
    """
    figure, axes = _panels(1, 1, (6.6, 5.2))
    clean_key, noisy_key = METRICS[1], METRICS[-1]
    for regime in REGIMES:
        clean, noisy = finals(table, regime, clean_key), finals(table, regime, noisy_key)
        style = {"color": COLOURS[regime], "marker": MARKERS[regime], "linestyle": "none"}
        # Open and of different sizes, so that regimes with equal errors remain visible in one place.
        style |= {"markerfacecolor": "none"}
        axes.plot(clean, noisy, markersize=4, alpha=0.4, **style)
        x, y = interval(clean), interval(noisy)
        size = {"markersize": SIZES[regime], "markeredgewidth": 1.8}
        axes.plot(x.mean, y.mean, label=LABELS[regime], **size, **style)
        bars = {"color": COLOURS[regime], "linewidth": 0.9, "capsize": SIZES[regime] / 3, "fmt": "none"}
        axes.errorbar(x.mean, y.mean, xerr=x.half_width, yerr=y.half_width, **bars)
    for sweep in sweeps:
        path = np.asarray(sweep.validation_mae)
        label = f"{LABELS[sweep.regime]}, lambda {GRID[0]:.2g} to {GRID[-1]:.2g} (tuning seeds)"
        style = {"color": COLOURS[sweep.regime], "linestyle": LINES[sweep.regime], "marker": "."}
        axes.plot(path[:, 0], path[:, -1], label=label, linewidth=1, **style)
    axes.set(
        title="small: one seed; large: mean and 95% interval",
        xlabel="validation MAE without noise (thousand dollars)",
        ylabel=f"validation MAE at eta = {NOISE_LEVELS[-1]:g} (thousand dollars)",
    )
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2 if sweeps else 4, fontsize=8, frameon=False)
    return figure


def write_figures(tables: dict[Setting, Table], tuning: Tuning | None, folder: Path) -> list[str]:
    """Write every figure as PNG and to TensorBoard (`tensorboard/figures`).

    The figures of the paper's setting lie in `folder`, those of another setting in a folder of its name.

    Returns:
        The PNG files, relative to `folder`.
    """
    figures = {"figure_1_region": region()}
    for setting, table in tables.items():
        place = "" if setting == PAPER_SETTING else setting.name.replace("/", "_") + "/"
        figures[f"{place}figure_2_training"] = training(table)
        figures[f"{place}figure_3_validation"] = validation(table)
        figures[f"{place}figure_4_front"] = front(table, sweeps_of(tuning, setting))
    events = folder / "tensorboard" / "figures"
    remove_events(events)
    files = []
    from torch.utils.tensorboard import SummaryWriter  # here, because every command's --help imports this module

    with SummaryWriter(str(events)) as writer:
        for name, figure in figures.items():
            with replacing(folder / f"{name}.png") as beside:
                figure.savefig(beside)
            writer.add_figure(name, figure)
            files.append(f"{name}.png")
    return files


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure of `size` in inches with its array of axes, or its only axes where the grid is 1 x 1."""
    figure = extra("matplotlib.figure").Figure(figsize=size, dpi=200, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
    return figure, figure.subplots(rows, columns)


def _curves(axes: Any, table: Table, key: str) -> None:
    bounds: list[float] = []
    start = min(SKIPPED, len(table["none"][0].history[key]) - 1)
    for regime in REGIMES:
        values = np.asarray([record.history[key] for record in table[regime]])
        points = [interval(column) for column in values.T]
        mean = np.array([point.mean for point in points])
        half = np.array([point.half_width for point in points])
        epochs = np.arange(1, len(mean) + 1)
        style = {"linestyle": LINES[regime], "linewidth": WIDTHS[regime]}
        axes.plot(epochs, mean, color=COLOURS[regime], label=LABELS[regime], **style)
        axes.fill_between(epochs, mean - half, mean + half, color=COLOURS[regime], alpha=0.1, linewidth=0)
        bounds.append((mean - half)[start:].min())
        bounds.append((mean + half)[start:].max())
    # The errors fall by a factor of ten in the first epochs: with them on the axis nothing else could be seen.
    margin = 0.04 * (max(bounds) - min(bounds))
    axes.set_ylim(min(bounds) - margin, max(bounds) + margin)
    axes.set_xlabel(f"epoch (the first {start} may lie beyond the axis)" if start else "epoch")
    axes.grid(alpha=0.25)


def _finished(figure: Figure, axes: Sequence[Any]) -> Figure:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
