"""The same-budget study from a plan to its table and budget.json: does coupling the layers pay at equal bounds?

Every sentence is made from the run's own statistics: each method is compared with the uniform per-layer caps over all
budgets and noise levels, and the p-values of one case are corrected by Holm's method.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from lightning_lip.paper.budgets.training import (
    BUDGETS,
    CASES,
    CONSTRAINTS,
    MARGIN,
    BudgetRecord,
    SeedTask,
    records_from_json,
    train_seed,
)
from lightning_lip.paper.data import LOADERS, NOTE, SOURCES, UNITS, Array
from lightning_lip.paper.regimes.results import PACKAGES
from lightning_lip.paper.settings import BATCH_SIZE, EPOCHS, METRICS, NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import (
    ALPHA,
    Corrected,
    can_decide,
    compare,
    corrected,
    in_words,
    interval,
)
from lightning_lip.reporting.console import make_console, make_table, print_line
from lightning_lip.reporting.documents import versions, write_json
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.progress import map_with_progress

LABELS = {
    "joint": "joint projection",
    "joint_euclidean": "joint, Euclidean metric",
    "uniform": "per-layer caps M^(1/4)",
    "first_x0.25": "caps, first / 4, last x 4",
    "first_x0.5": "caps, first / 2, last x 2",
    "first_x2": "caps, first x 2, last / 2",
    "first_x4": "caps, first x 4, last / 4",
    "scaling": "scaling of every layer",
    "log_clip": "equal log-clip",
    "penalty": "product penalty, tuned",
}
METHOD, BASELINE = "joint", "uniform"
"""What the question is about: the coupled constraint against per-layer caps of the same product."""

PENALTY_GRID = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-16, 1))
"""The coefficients tried for the product penalty, in units of the standardised target's MSE: 1e-4 to 1."""

Table = dict[tuple[str, str, float], list[BudgetRecord]]
"""The records by case, method and budget, in the order of the seeds."""

Coefficients = dict[str, dict[float, float]]
"""The coefficient of the product penalty by case and budget."""


class BudgetPlan(NamedTuple):
    """What one call of `reproduce --budget` does.

    Attributes:
        seeds: The seeds reported.
        tuning_seeds: The seeds that the penalty's coefficients are chosen on; none of them is reported.
        epochs: The epochs of each run.
        budgets: The budgets M.
        grid: The coefficients of the product penalty.
        cases: Data sets and activations.
    """

    seeds: range
    tuning_seeds: range
    epochs: int = EPOCHS
    budgets: tuple[float, ...] = BUDGETS
    grid: tuple[float, ...] = PENALTY_GRID
    cases: tuple[str, ...] = CASES


def run_budget(plan: BudgetPlan, folder: Path, workers: int) -> dict[str, Any]:
    """Run a plan, print its report and write budget.json.

    Finished tasks stay in budget.partial.jsonl until then: the same plan goes on from there.

    Args:
        plan: What to tune, train and report.
        folder: Where budget.json goes; made if missing.
        workers: The number of processes.

    Returns:
        The contents of budget.json.

    Raises:
        RunError: If a task fails.
        DataError: If the data are not the known ones.
        OSError: If a file cannot be written.
    """
    start = time.monotonic()
    console = make_console()
    print_line(console, NOTE)
    datasets = {name: LOADERS[name]() for name in dict.fromkeys(case.split("/")[0] for case in plan.cases)}
    settings = (plan, versions(*PACKAGES, "scikit-learn", "numba"))
    finished = Finished(folder / "budget.partial.jsonl", settings, records_from_json)
    train = partial(train_seed, datasets=datasets)
    tuned = map_with_progress(console, "tuning tasks", train, tuning_tasks(plan), workers, finished)
    coefficients, products = choose_coefficients(plan, tuned)
    runs = map_with_progress(console, "tasks", train, reported_tasks(plan, coefficients), workers, finished)
    table = table_of(runs)
    document = budget_results(plan, table, coefficients, products)
    document["timing"] = {"seconds": round(time.monotonic() - start, 1), "workers": workers}
    write_json(document, folder / "budget.json")
    finished.remove()
    print_report(console, plan, table)
    for entry in document["tuning"]["at_the_edge"]:
        print_line(console, f"- {entry}: the nearest lambda is at an end of the grid.")
    print_line(console, f"budget.json is in {folder}. {document['timing']['seconds']:.0f} s on {workers} workers.")
    return document


def tuning_tasks(plan: BudgetPlan) -> list[SeedTask]:
    """Return the grid for every case and tuning seed, without budgets."""
    penalised = tuple((float("inf"), coefficient) for coefficient in plan.grid)
    return [SeedTask(case, seed, plan.epochs, (), penalised) for seed in plan.tuning_seeds for case in plan.cases]


def choose_coefficients(
    plan: BudgetPlan, tuned: Sequence[Sequence[BudgetRecord]]
) -> tuple[Coefficients, dict[str, Array]]:
    """Take, for each case and budget, the coefficient whose product is nearest to the budget (in logarithms).

    So the penalty and the projections are compared at the same bound; no error is looked at.

    Args:
        plan: The plan.
        tuned: The records of each of `tuning_tasks(plan)`.

    Returns:
        The coefficients, and for each case the product of norms that each coefficient of the grid led to: the
        geometric mean over the tuning seeds.
    """
    products = {}
    for index, case in enumerate(plan.cases):
        bounds = [[record.certified for record in records] for records in tuned[index :: len(plan.cases)]]
        products[case] = np.exp(np.log(bounds).mean(axis=0))
    coefficients = {
        case: {m: plan.grid[int(np.abs(np.log(found / m)).argmin())] for m in plan.budgets}
        for case, found in products.items()
    }
    return coefficients, products


def reported_tasks(plan: BudgetPlan, coefficients: Coefficients) -> list[SeedTask]:
    """Return what is trained for the report: every method at every budget, seed by seed."""
    constrained = tuple((method, budget) for method in CONSTRAINTS for budget in plan.budgets)
    return [
        SeedTask(case, seed, plan.epochs, constrained, tuple(coefficients[case].items()))
        for seed in plan.seeds
        for case in plan.cases
    ]


def table_of(results: Sequence[Sequence[BudgetRecord]]) -> Table:
    """Arrange the records of tasks by case, method and budget; each list keeps their order."""
    table: Table = {}
    for record in chain.from_iterable(results):
        table.setdefault((record.case, record.method, record.budget), []).append(record)
    return table


def overall(plan: BudgetPlan, table: Table, case: str) -> dict[str, Corrected]:
    """Compare every method's validation MAE with the uniform caps', over all budgets and noise levels.

    The differences are in per cent: of a seed, the geometric mean of the ratios of the MAE, less one.
    """
    baseline = _validation_errors(plan, table, case, BASELINE)
    ratios = {m: _validation_errors(plan, table, case, m) / baseline for m in LABELS if m != BASELINE}
    changes = {method: 100 * np.expm1(np.log(ratio).mean(axis=(0, 1))) for method, ratio in ratios.items()}
    return corrected({method: compare(change, np.zeros_like(change)) for method, change in changes.items()})


def budget_used(table: Table, method: str) -> float:
    """Return the geometric mean of (certified bound) / M over the runs: 1 where a method uses all of its budget."""
    shares = [r.certified / r.budget for rows in table.values() for r in rows if r.method == method]
    return float(np.exp(np.log(shares).mean()))


def budget_results(
    plan: BudgetPlan, table: Table, coefficients: Coefficients, products: dict[str, Array]
) -> dict[str, Any]:
    """Collect the results; equal arguments give equal documents.

    The document's keys:

    - `schema`: 2.
    - `versions`: of Python and the packages.
    - `data`: by data set, its source and the unit of every MAE; a note on Boston housing.
    - `options`: seeds, epochs, batch size, noise levels, budgets, methods, and the margin of the last projection.
    - `tuning`: the penalty's grid, the tuning seeds, by case (`"boston/relu"`) the product that each coefficient led
      to, for each case and budget the coefficient chosen, and those at an end of the grid.
    - `methods`: for each case, method and budget, mean and half width of the 95% interval of each metric and of the
      certified bound.
    - `overall`: for each case and method, the change of the validation MAE against the uniform caps over all budgets
      and noise levels (in per cent), and the p-value after Holm's correction in the case.
    - `budget_used`: by method, the geometric mean of the certified bound over M.
    - `rebalanced`: of the jointly projected ReLU networks, rescaled to equal norms: their number, how many obey the
      uniform caps (*certified*), and the largest relative change of an output.
    - `runs`: one entry for each network reported, as :class:`~lightning_lip.paper.budgets.training.BudgetRecord`
      documents it.

    `reproduce --budget` adds `timing`.
    """
    names = sorted({case.split("/")[0] for case in plan.cases})
    chosen = [(case, budget, c) for case, row in coefficients.items() for budget, c in row.items()]
    return {
        "schema": 2,
        "versions": versions(*PACKAGES, "scikit-learn"),
        "data": {name: {"source": SOURCES[name], "unit": UNITS[name]} for name in names} | {"note": NOTE},
        "options": {
            "seeds": list(plan.seeds),
            "epochs": plan.epochs,
            "batch_size": BATCH_SIZE,
            "noise_levels": list(NOISE_LEVELS),
            "budgets": list(plan.budgets),
            "constraints": list(CONSTRAINTS),
            "margin": MARGIN,
        },
        "tuning": {
            "grid": list(plan.grid),
            "seeds": list(plan.tuning_seeds),
            "products": {case: found.tolist() for case, found in products.items()},
            "coefficients": [{"case": case, "budget": m, "coefficient": c} for case, m, c in chosen],
            "at_the_edge": [f"{case}, M = {m:g}" for case, m, c in chosen if c in (plan.grid[0], plan.grid[-1])],
        },
        "methods": [
            {
                "case": case,
                "method": method,
                "budget": budget,
                "metrics": {m: asdict(interval([record.errors[m] for record in rows])) for m in METRICS},
                "certified": asdict(interval([record.certified for record in rows])),
            }
            for (case, method, budget), rows in table.items()
        ],
        "overall": [
            {"case": case, "method": method} | asdict(found.comparison) | {"p_holm": found.p_value}
            for case in plan.cases
            for method, found in overall(plan, table, case).items()
        ],
        "budget_used": {method: budget_used(table, method) for method in LABELS},
        "rebalanced": rebalanced(table),
        "runs": [record._asdict() for rows in table.values() for record in rows],
    }


def rebalanced(table: Table) -> dict[str, Any]:
    """Count the jointly projected ReLU networks that obey the uniform caps M^(1/4), rescaled as the same functions."""
    records = [(r, r.rebalanced) for rows in table.values() for r in rows if r.rebalanced is not None]
    return {
        "networks": len(records),
        "within_uniform_caps": sum(found["largest_norm"] ** len(r.sigmas) <= r.budget for r, found in records),
        "largest_change": max((found["change"] for _, found in records), default=0.0),
    }


def print_report(console: Console, plan: BudgetPlan, table: Table) -> None:
    """Print the table of all methods and cases, and what its tests show."""
    compared = {case: overall(plan, table, case) for case in plan.cases}
    title = (
        f"change in % of the validation MAE against {LABELS[BASELINE]}, mean over all M and noise levels ± 95% "
        f"interval over {len(plan.seeds)} seeds; *: p < {ALPHA:g} (Wilcoxon, two-sided, Holm within a column)"
    )
    grid = make_table(title, ["method"], [*plan.cases, "bound / M"])
    for method, label in LABELS.items():
        found = [compared[case].get(method) for case in plan.cases]
        cells = ["-" if t is None else f"{t.comparison.difference:+.1f}{' *' * (t.p_value < ALPHA)}" for t in found]
        grid.add_row(label, *cells, f"{budget_used(table, method):.2f}")
    console.print(grid)
    for sentence in findings(plan, table):
        print_line(console, f"- {sentence}")


def findings(plan: BudgetPlan, table: Table) -> list[str]:
    """Compare the joint projection with the uniform caps in words, a direction only where a test shows one."""
    verdicts = ((overall(plan, table, case)[METHOD].verdict, case) for case in plan.cases)
    sentences = [
        "At equal certified budgets the MAE of the coupled constraint (joint projection) against per-layer caps, "
        f"over all budgets and noise levels: {in_words(verdicts, 'for')}."
    ]
    n_seeds, n_tests = len(plan.seeds), len(LABELS) - 1
    # Twice, because a two-sided p-value is at least 2^(1-n).
    if not can_decide(n_seeds, 2 * n_tests):
        sentences.append(
            f"{n_seeds} seeds are too few: no outcome could pass {n_tests} two-sided tests at {ALPHA:g} after Holm."
        )
    balanced = rebalanced(table)
    if balanced["networks"]:
        sentences.append(
            f"Rebalancing: {balanced['within_uniform_caps']} of the {balanced['networks']} jointly projected ReLU "
            "networks, rescaled to equal norms, obey the per-layer caps; their outputs change by at most "
            f"{balanced['largest_change']:.1g} of the largest."
        )
    return sentences


def _validation_errors(plan: BudgetPlan, table: Table, case: str, method: str) -> Array:
    """Return the validation MAE, (budgets, noise levels, seeds)."""
    return np.array(
        [
            [[record.errors[validation_key(level)] for record in table[case, method, budget]] for level in NOISE_LEVELS]
            for budget in plan.budgets
        ]
    )
