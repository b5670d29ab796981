"""The fronts of the same-budget experiment: validation MAE against the certified bound, and clean against noisy MAE."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_lip.paper.budgets.settings import LABELS, METHODS, UNITS, BudgetTable, Case
from lightning_lip.paper.budgets.statistics import BASELINE, METHOD, budgets, cases, errors
from lightning_lip.paper.regimes.figures import Figure, panels
from lightning_lip.paper.regimes.settings import NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import interval

STYLES: dict[str, dict[str, Any]] = {
    "joint": {"color": "#0072B2", "marker": "o", "linewidth": 1.8},
    "joint_euclidean": {"color": "#56B4E9", "marker": "v", "linestyle": "--"},
    "uniform": {"color": "#E69F00", "marker": "s", "linewidth": 1.8},
    "scaling": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "log_clip": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    "penalty": {"color": "#D55E00", "marker": "x", "linestyle": "--"},
    "first_x0.25": {"color": "0.6", "marker": ">", "linewidth": 0.8, "markersize": 6},
    "first_x0.5": {"color": "0.6", "marker": ">", "linewidth": 0.8, "markersize": 3},
    "first_x2": {"color": "0.6", "marker": "<", "linewidth": 0.8, "markersize": 3},
    "first_x4": {"color": "0.6", "marker": "<", "linewidth": 0.8, "markersize": 6},
}
"""Okabe and Ito's colours; the unequal allocations are grey, with an arrow towards the layer of the larger cap."""


def budget_figures(table: BudgetTable) -> dict[str, Figure]:
    """All figures by name: one of each case's MAE against the bound, and one of the fronts."""
    figures = {f"budget_{case.name.replace('/', '_')}": against_bound(table, case) for case in cases(table)}
    return figures | {"budget_front": fronts(table)}


def against_bound(table: BudgetTable, case: Case) -> Figure:
    """Validation MAE against the certified bound (geometric mean over seeds), a panel for each noise level.

    The bars are 95% intervals over the seeds, of the joint projection and the uniform caps only.
    """
    figure, grid = panels(2, 2, (9.0, 7.4))
    for axes, level in zip(grid.ravel(), NOISE_LEVELS, strict=True):
        for method in METHODS:
            bounds = [
                float(np.exp(np.mean([np.log(record.certified) for record in table[case, method, budget]])))
                for budget in budgets(table)
            ]
            points = [interval(errors(table, case, method, budget, validation_key(level))) for budget in budgets(table)]
            means = [point.mean for point in points]
            (line,) = axes.plot(bounds, means, label=LABELS[method], **_style(method))
            if method in (METHOD, BASELINE):
                bars = {"fmt": "none", "color": line.get_color(), "linewidth": 0.8, "capsize": 3}
                axes.errorbar(bounds, means, [point.half_width for point in points], **bars)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{case.dataset}, {case.activation}, eta = {level:g}", xlabel="certified Lipschitz bound")
        axes.set_ylabel(f"validation MAE ({UNITS[case.dataset]})")
        axes.grid(alpha=0.25)
    return _with_legend(figure, grid)


def fronts(table: BudgetTable) -> Figure:
    """Clean against noisy validation MAE along the budgets, a panel for each case; means over seeds."""
    shown = cases(table)
    figure, grid = panels((len(shown) + 1) // 2, 2, (10.0, 3.9 * ((len(shown) + 1) // 2)))
    for axes, case in zip(grid.ravel(), shown, strict=False):
        for method in METHODS:
            clean, noisy = (
                [np.mean(errors(table, case, method, budget, validation_key(level))) for budget in budgets(table)]
                for level in (NOISE_LEVELS[0], NOISE_LEVELS[-1])
            )
            axes.plot(clean, noisy, label=LABELS[method], **_style(method))
        axes.set_title(f"{case.dataset}, {case.activation}: validation MAE ({UNITS[case.dataset]})", fontsize=10)
        axes.set_xlabel(f"at eta = {NOISE_LEVELS[0]:g}")
        axes.set_ylabel(f"at eta = {NOISE_LEVELS[-1]:g}")
        axes.grid(alpha=0.25)
    for axes in grid.ravel()[len(shown) :]:
        axes.set_axis_off()
    return _with_legend(figure, grid)


def _style(method: str) -> dict[str, Any]:
    return {"markersize": 5, "linewidth": 1.1, "markerfacecolor": "none"} | STYLES[method]


def _with_legend(figure: Figure, grid: Any) -> Figure:
    handles, labels = grid.ravel()[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
