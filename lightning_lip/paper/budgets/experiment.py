"""The same-budget experiment from a plan to the files it leaves: does coupling the layers pay at equal bounds?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from lightning_lip.paper.budgets import report as budget_report
from lightning_lip.paper.budgets.figures import budget_figures
from lightning_lip.paper.budgets.results import budget_results
from lightning_lip.paper.budgets.settings import CONSTRAINTS, BudgetPlan, BudgetRecord, BudgetTable, SeedTask
from lightning_lip.paper.budgets.training import train_penalties, train_seed
from lightning_lip.paper.budgets.tuning import BudgetTuning, choose_coefficients, tuning_tasks
from lightning_lip.paper.data import NOTE, load_boston, load_diabetes
from lightning_lip.paper.regimes.figures import save_figures
from lightning_lip.paper.regimes.report import make_console
from lightning_lip.paper.regimes.results import write
from lightning_lip.reporting.processes import map_tasks
from lightning_lip.reporting.progress import progress

Result = TypeVar("Result")

LOADERS = {"boston": load_boston, "diabetes": load_diabetes}


def run_budget(plan: BudgetPlan, folder: Path, workers: int) -> dict[str, Any]:
    """Run a plan, print its report and write its files.

    Args:
        plan: What to tune, train and report.
        folder: Where the files go; made if missing.
        workers: The number of processes.

    Returns:
        The contents of budget.json.

    Raises:
        RunError: If a task fails.
        DataError: If the data are not the known ones.
    """
    start = time.monotonic()
    console = make_console()
    console.print(NOTE, highlight=False)
    datasets = {name: LOADERS[name]() for name in dict.fromkeys(case.dataset for case in plan.cases)}
    folder.mkdir(parents=True, exist_ok=True)

    def over_all(function: Callable[..., Result], tasks: list[SeedTask], what: str) -> list[Result]:
        with progress(console, len(tasks), what) as on_done:
            return map_tasks(partial(function, datasets=datasets), tasks, workers, on_done)

    tuning = choose_coefficients(plan, over_all(train_penalties, tuning_tasks(plan), "tuning"))
    table = table_of(over_all(train_seed, reported_tasks(plan, tuning), "runs"))

    document = budget_results(plan, table, tuning)
    document["figures"] = save_figures(budget_figures(table), folder, "budget")
    document["timing"] = {"seconds": round(time.monotonic() - start, 1), "workers": workers}
    write(document, folder / "budget.json")

    budget_report.print_report(console, table, tuning)
    console.print(
        f"\nFigures, budget.json and TensorBoard logs are in {folder} "
        f"(tensorboard --logdir {folder / 'tensorboard'}). {document['timing']['seconds']:.0f} s on {workers} workers.",
        highlight=False,
    )
    return document


def reported_tasks(plan: BudgetPlan, tuning: BudgetTuning) -> list[SeedTask]:
    """What is trained for the report: every method at every budget, seed by seed."""
    constrained = tuple((method, budget) for method in CONSTRAINTS for budget in plan.budgets)
    return [
        SeedTask(case, seed, plan.epochs, constrained, tuple(tuning.coefficients[case].items()))
        for seed in plan.seeds
        for case in plan.cases
    ]


def table_of(results: Sequence[Sequence[BudgetRecord]]) -> BudgetTable:
    """Arrange the records of tasks by case, method and budget; each list keeps their order."""
    table: BudgetTable = {}
    for record in chain.from_iterable(results):
        table.setdefault((record.case, record.method, record.budget), []).append(record)
    return table
