"""The statistics of the same-budget experiment, over seeds; pure functions of the table of records.

Families of tests, each corrected by Holm within one case: the joint projection against the uniform per-layer caps at
every budget and noise level, and every other method against the uniform caps over all budgets and noise levels.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from lightning_lip.paper.budgets.settings import METHODS, BudgetRecord, BudgetTable, Case
from lightning_lip.paper.data import Array
from lightning_lip.paper.regimes.settings import NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import Comparison, compare, holm

METHOD, BASELINE = "joint", "uniform"
"""What the question is about: the coupled constraint against per-layer caps of the same product."""

RIVALS = tuple(method for method in METHODS if method != BASELINE)


Key = TypeVar("Key")


class Tested(NamedTuple):
    """A paired comparison and its two-sided p-value after Holm's correction."""

    comparison: Comparison
    p_value: float


def cases(table: BudgetTable) -> list[Case]:
    """The cases of a table, in its order."""
    return list(dict.fromkeys(case for case, _, _ in table))


def budgets(table: BudgetTable) -> list[float]:
    """The budgets of a table, in its order."""
    return list(dict.fromkeys(budget for _, _, budget in table))


def errors(table: BudgetTable, case: Case, method: str, budget: float, metric: str) -> list[float]:
    """One MAE for each seed."""
    return [record.errors[metric] for record in table[case, method, budget]]


def against_uniform(table: BudgetTable, case: Case) -> dict[tuple[float, float], Tested]:
    """The joint projection's validation MAE against the uniform caps', by budget and noise level.

    The differences are in the target's units.
    """
    compared = {
        (budget, level): compare(
            *(errors(table, case, method, budget, validation_key(level)) for method in (METHOD, BASELINE))
        )
        for budget in budgets(table)
        for level in NOISE_LEVELS
    }
    return _tested(compared)


def overall(table: BudgetTable, case: Case) -> dict[str, Tested]:
    """Every rival's validation MAE against the uniform caps', over all budgets and noise levels.

    The differences are in per cent: of a seed, the geometric mean of the ratios of the MAE, less one.
    """
    baseline = _log_errors(table, case, BASELINE)
    changes = {
        rival: 100 * np.expm1((_log_errors(table, case, rival) - baseline).mean(axis=(0, 1))) for rival in RIVALS
    }
    return _tested({rival: compare(change, np.zeros_like(change)) for rival, change in changes.items()})


def budget_used(table: BudgetTable, case: Case, method: str) -> float:
    """The geometric mean of (certified bound) / M over budgets and seeds: 1 where a method spends what it may."""
    shares = [record.certified / budget for budget in budgets(table) for record in table[case, method, budget]]
    return float(np.exp(np.log(shares).mean()))


def rebalanced(table: BudgetTable) -> list[BudgetRecord]:
    """The records whose network was rescaled to equal norms."""
    return [record for rows in table.values() for record in rows if record.rebalanced is not None]


def within_uniform_caps(record: BudgetRecord) -> bool:
    """Whether a rebalanced network, the same function, obeys the uniform per-layer caps M^(1/4); *certified*."""
    if record.rebalanced is None:
        raise ValueError(f"Expected a record of a rebalanced network, got one of {record.case.name}, {record.method}.")
    return record.rebalanced.largest_norm ** len(record.sigmas) <= record.budget


def _log_errors(table: BudgetTable, case: Case, method: str) -> Array:
    """The logarithms of the validation MAE, (budgets, noise levels, seeds)."""
    rows = [
        [errors(table, case, method, budget, validation_key(level)) for level in NOISE_LEVELS]
        for budget in budgets(table)
    ]
    return np.log(np.asarray(rows, dtype=np.float64))


def _tested(compared: dict[Key, Comparison]) -> dict[Key, Tested]:
    adjusted = holm([comparison.p_two_sided for comparison in compared.values()])
    return {
        key: Tested(comparison, p_value) for (key, comparison), p_value in zip(compared.items(), adjusted, strict=True)
    }
