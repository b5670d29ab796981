"""The results file of the same-budget experiment: every number in one JSON document."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lightning_lip.paper.budgets.settings import CONSTRAINTS, MARGIN, UNITS, BudgetPlan, BudgetTable
from lightning_lip.paper.budgets.statistics import Tested, against_uniform, overall, rebalanced, within_uniform_caps
from lightning_lip.paper.budgets.tuning import BudgetTuning
from lightning_lip.paper.data import NOTE
from lightning_lip.paper.regimes.results import PACKAGES
from lightning_lip.paper.regimes.settings import BATCH_SIZE, METRICS, NOISE_LEVELS
from lightning_lip.paper.statistics import interval

SCHEMA = 1
SOURCES = {"boston": "mlxtend.data.boston_housing_data", "diabetes": "sklearn.datasets.load_diabetes"}


def budget_results(plan: BudgetPlan, table: BudgetTable, tuning: BudgetTuning) -> dict[str, Any]:
    """Collect the results; equal arguments give equal documents.

    The document's keys:

    - `schema`: 1.
    - `versions`: of Python and the packages.
    - `data`: by data set, its source and the unit of every MAE; a note on Boston housing.
    - `options`: seeds, epochs, batch size, noise levels, budgets, methods, and the margin of the last projection.
    - `tuning`: the penalty's grid, the tuning seeds, by case (`"boston/relu"`) the product that each coefficient led
      to, and for each case and budget the coefficient chosen.
    - `methods`: for each case, method and budget, mean and half width of the 95% interval of each metric and of the
      certified bound.
    - `joint_against_uniform`: for each case, budget and noise level, the paired comparison of the joint projection
      with the uniform per-layer caps (in the target's units) and the p-value after Holm's correction in the case.
    - `overall`: for each case and method, the change of the validation MAE against the uniform caps over all budgets
      and noise levels (in per cent), and the p-value after Holm's correction in the case.
    - `rebalanced`: of the jointly projected ReLU networks, rescaled to equal norms: their number, how many obey the
      uniform caps, and the largest relative change of an output.
    - `runs`: one entry for each network reported.

    `reproduce --budget` adds `timing` and `figures`.
    """
    balanced = rebalanced(table)
    return {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, "scikit-learn")},
        "data": {
            name: {"source": SOURCES[name], "unit": UNITS[name]} for name in sorted({c.dataset for c in plan.cases})
        }
        | {"note": NOTE},
        "options": {
            "seeds": list(plan.seeds),
            "epochs": plan.epochs,
            "batch_size": BATCH_SIZE,
            "noise_levels": list(NOISE_LEVELS),
            "budgets": list(plan.budgets),
            "constraints": list(CONSTRAINTS),
            "margin": MARGIN,
        },
        "tuning": tuning.to_json(),
        "methods": [
            {
                "case": case.name,
                "method": method,
                "budget": budget,
                "metrics": {m: asdict(interval([record.errors[m] for record in rows])) for m in METRICS},
                "certified": asdict(interval([record.certified for record in rows])),
            }
            for (case, method, budget), rows in table.items()
        ],
        "joint_against_uniform": [
            {"case": case.name, "budget": budget, "noise_level": level} | _plain(tested)
            for case in plan.cases
            for (budget, level), tested in against_uniform(table, case).items()
        ],
        "overall": [
            {"case": case.name, "method": method} | _plain(tested)
            for case in plan.cases
            for method, tested in overall(table, case).items()
        ],
        "rebalanced": {
            "networks": len(balanced),
            "within_uniform_caps": sum(within_uniform_caps(record) for record in balanced),
            "largest_change": max((r.rebalanced.change for r in balanced if r.rebalanced), default=0.0),
        },
        "runs": [record.to_json() for rows in table.values() for record in rows],
    }


def _plain(tested: Tested) -> dict[str, Any]:
    return asdict(tested.comparison) | {"p_holm": tested.p_value}
