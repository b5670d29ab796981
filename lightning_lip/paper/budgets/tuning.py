"""The coefficient with which the product penalty spends each budget, found on seeds that are never reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lip.paper.budgets.settings import BudgetPlan, Case, SeedTask


@dataclass(frozen=True)
class BudgetTuning:
    """The outcome of the grid search.

    The coefficient of a budget is that of the nearest product (in logarithms), so that the penalty and the projections
    are compared at the same bound; no error is looked at.

    Attributes:
        coefficients: By case and budget, the coefficient chosen from the grid.
        products: By case, for each coefficient of the grid, the product of the spectral norms that it led to: the
            geometric mean over the tuning seeds, without any projection.
        grid: The coefficients tried.
        seeds: The tuning seeds.
    """

    coefficients: dict[Case, dict[float, float]]
    products: dict[Case, list[float]]
    grid: tuple[float, ...]
    seeds: range

    @property
    def at_the_edge(self) -> list[str]:
        """The cases and budgets whose coefficient lies at an end of the grid, where the nearest may be outside."""
        return [
            f"{case.name}, M = {budget:g}"
            for case, row in self.coefficients.items()
            for budget, coefficient in row.items()
            if coefficient in (self.grid[0], self.grid[-1])
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for the results file."""
        return {
            "grid": list(self.grid),
            "seeds": list(self.seeds),
            "at_the_edge": self.at_the_edge,
            "products": {case.name: row for case, row in self.products.items()},
            "coefficients": [
                {"case": case.name, "budget": budget, "coefficient": coefficient}
                for case, row in self.coefficients.items()
                for budget, coefficient in row.items()
            ],
        }


def tuning_tasks(plan: BudgetPlan) -> list[SeedTask]:
    """The grid for every case and tuning seed, without budgets."""
    penalised = tuple((float("inf"), coefficient) for coefficient in plan.grid)
    return [SeedTask(case, seed, plan.epochs, (), penalised) for seed in plan.tuning_seeds for case in plan.cases]


def choose_coefficients(plan: BudgetPlan, products: Sequence[Sequence[float]]) -> BudgetTuning:
    """Take, for each case and budget, the coefficient whose product is nearest to the budget.

    Args:
        plan: The plan.
        products: For each of `tuning_tasks(plan)`, the product that each coefficient of the grid led to.
    """
    log_products: dict[Case, list[list[float]]] = {case: [] for case in plan.cases}
    for task, row in zip(tuning_tasks(plan), products, strict=True):
        log_products[task.case].append([float(np.log(product)) for product in row])
    means = {case: np.mean(rows, axis=0) for case, rows in log_products.items()}
    coefficients = {
        case: {budget: plan.grid[int(np.abs(mean - np.log(budget)).argmin())] for budget in plan.budgets}
        for case, mean in means.items()
    }
    return BudgetTuning(
        coefficients, {case: np.exp(mean).tolist() for case, mean in means.items()}, plan.grid, plan.tuning_seeds
    )
