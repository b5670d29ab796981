"""The benchmark's plots, made without pyplot: no window system and no global state is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_lip.bench.steps.growth import DEPTH_OF_WIDTHS, WIDTH_OF_DEPTHS
from lightning_lip.reporting.documents import replacing
from lightning_lip.reporting.extras import extra

COLOURS = {1: "#E69F00", 8: "#0072B2", "step": "#000000", "floor": "#999999", "peer": "#777777"}
"""Okabe and Ito's, by block size and role."""

TICKS = (0.8, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)
"""Ratios that are marked: a logarithmic axis' own marks are powers of ten, of which most panels hold one."""

FIGURE: dict[str, Any] = {"dpi": 150, "layout": "constrained"}

Figure = Any


def write_figures(found: dict[str, Any], folder: Path) -> list[str]:
    """Write the plots of a document of :func:`~lightning_lip.bench.steps.tables.document` as PNG.

    Returns:
        The files, relative to `folder`.
    """
    by_depth = [point for point in found["growth"] if point["width"] == WIDTH_OF_DEPTHS]
    by_width = [point for point in found["growth"] if point["depth"] == DEPTH_OF_WIDTHS]
    figures = {
        "steps.png": steps(found["models"]),
        "growth_depth.png": growth(by_depth, "depth", f"layers of width {WIDTH_OF_DEPTHS}"),
        "growth_width.png": growth(by_width, "width", f"width of {DEPTH_OF_WIDTHS} layers"),
    }
    for name, figure in figures.items():
        with replacing(folder / name) as beside:
            figure.savefig(beside)
    return list(figures)


def steps(models: list[dict[str, Any]]) -> Figure:
    """Draw each contender's step over the plain training's, with p20 and p80, one panel a model."""
    heights = [len(model["rows"]) - 1 for model in models]
    ticker = extra("matplotlib.ticker", "bench")
    figure = extra("matplotlib.figure", "bench").Figure((8.0, 1.0 + 0.3 * sum(heights) + 0.5 * len(models)), **FIGURE)
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, model in zip(panels, models, strict=True):
        rows = [row for row in model["rows"] if row["contender"] != "plain"][::-1]
        for y, row in enumerate(rows):
            p20, p50, p80 = row["ratio"]
            colour = COLOURS[8] if row["own_ms"] is not None else COLOURS["peer"]
            spread = [[p50 - p20], [p80 - p50]]
            axes.errorbar(p50, y, xerr=spread, color=colour, marker="o", markersize=5, capsize=2)
            axes.annotate(f"{p50:.3g}", (p50, y), (0, 4), textcoords="offset points", fontsize=6, ha="center")
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.2)
        axes.axvline(1.0, color=COLOURS["step"], linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.FixedLocator(TICKS))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_title(f"{model['model_title']}; batch {model['batch_size']}", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
    panels[-1].set_xlabel("time of a training step over the plain training's: median, p20 to p80", fontsize=8)
    return figure


def growth(points: list[dict[str, Any]], key: str, label: str) -> Figure:
    """Draw the time of a step without the penalty, the penalty's own, and the floor of memory traffic."""
    figure = extra("matplotlib.figure", "bench").Figure((6.4, 4.4), **FIGURE)
    axes = figure.subplots()
    for block_size in sorted({point["block_size"] for point in points}):
        chosen = [point for point in points if point["block_size"] == block_size]
        sizes = [point[key] for point in chosen]
        if block_size == 8:
            axes.plot(sizes, [p["step_ms"] for p in chosen], color=COLOURS["step"], label="training step without it")
            floor = {"color": COLOURS["floor"], "linestyle": "--"}
            axes.plot(sizes, [p["floor_ms"] for p in chosen], label="floor: memory traffic of one pass", **floor)
        own = [point["own_ms"] for point in chosen]
        axes.plot(sizes, own, color=COLOURS[block_size], marker="o", markersize=4, label=f"penalty, r = {block_size}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel=label, ylabel="milliseconds a step", yscale="log")
    axes.set_title("batch 256", fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return figure
