"""The tables and sentences of the same-budget experiment. Every sentence is made from the run's own statistics."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as Grid

from lightning_lip.paper.budgets.settings import DIGITS, LABELS, METHODS, UNITS, BudgetTable, Case
from lightning_lip.paper.budgets.statistics import (
    BASELINE,
    METHOD,
    against_uniform,
    budget_used,
    budgets,
    cases,
    errors,
    overall,
    rebalanced,
    within_uniform_caps,
)
from lightning_lip.paper.budgets.tuning import BudgetTuning
from lightning_lip.paper.regimes.report import DIRECTIONS, difference_in_words
from lightning_lip.paper.regimes.settings import NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import ALPHA, can_decide, interval


def print_report(console: Console, table: BudgetTable, tuning: BudgetTuning) -> None:
    """Print the errors, paired differences and findings of each case, and what holds over all of them."""
    for case in cases(table):
        for level in (NOISE_LEVELS[0], NOISE_LEVELS[-1]):
            console.print(_errors(table, case, level))
        console.print(_differences(table, case))
        console.print(_overall(table, case))
        for sentence in findings(table, case):
            console.print(f"- {sentence}", highlight=False)
        chosen = ", ".join(f"{c:g} (M = {budget:g})" for budget, c in tuning.coefficients[case].items())
        console.print(
            f"- lambda of the product penalty, whose product is nearest to M on other seeds: {chosen}.\n",
            highlight=False,
        )
    for entry in tuning.at_the_edge:
        console.print(f"- {entry}: the nearest lambda is at an end of the grid.", highlight=False)
    for sentence in (*conclusions(table), *rebalancing(table)):
        console.print(f"- {sentence}", highlight=False)


def findings(table: BudgetTable, case: Case) -> list[str]:
    """Compare the methods with the uniform per-layer caps in words, a direction only where a test shows one."""
    compared = against_uniform(table, case)
    by_direction: dict[str, list[str]] = {direction: [] for direction in DIRECTIONS}
    for (budget, level), (comparison, p_value) in compared.items():
        verdict = difference_in_words(comparison, p_value)
        if verdict in DIRECTIONS:
            by_direction[verdict].append(f"M = {budget:g}, eta {level:g}")
    shown = "".join(f"{direction} MAE at {', '.join(names)}; " for direction, names in by_direction.items() if names)
    rest = len(compared) - sum(map(len, by_direction.values()))
    sentences = [
        f"{LABELS[METHOD]} against {LABELS[BASELINE]}, {case.name}: {shown}"
        f"no difference shown in {rest} of {len(compared)} comparisons."
    ]
    by_verdict: dict[str, list[str]] = {}
    for method, (comparison, p_value) in overall(table, case).items():
        verdict = difference_in_words(comparison, p_value)
        by_verdict.setdefault(verdict, []).append(f"{LABELS[method]} ({comparison.difference:+.1f}%)")
    outcome = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in by_verdict.items())
    return [*sentences, f"Over all budgets and noise levels, MAE against {LABELS[BASELINE]}: {outcome}."]


def conclusions(table: BudgetTable) -> list[str]:
    """Say for which cases the joint projection gave a lower or higher MAE than the caps, over all budgets."""
    by_verdict: dict[str, list[str]] = {}
    for case in cases(table):
        verdict = difference_in_words(*overall(table, case)[METHOD])
        by_verdict.setdefault(verdict, []).append(case.name)
    outcome = "; ".join(f"{verdict} for {', '.join(names)}" for verdict, names in by_verdict.items())
    sentences = [
        "At equal certified budgets the MAE of the coupled constraint (joint projection) against per-layer caps, "
        f"over all budgets and noise levels: {outcome}."
    ]
    n_seeds = len(next(iter(table.values())))
    n_tests = len(budgets(table)) * len(NOISE_LEVELS)
    # Twice, because a two-sided p-value is at least 2^(1-n).
    if not can_decide(n_seeds, 2 * n_tests):
        sentences.append(
            f"{n_seeds} seeds are too few: no outcome could pass {n_tests} two-sided tests at {ALPHA:g} after Holm."
        )
    return sentences


def rebalancing(table: BudgetTable) -> list[str]:
    """Say whether the jointly projected ReLU networks, rescaled, obey the uniform caps as the same functions."""
    networks = rebalanced(table)
    if not networks:
        return []
    within = sum(within_uniform_caps(record) for record in networks)
    change = max(record.rebalanced.change for record in networks if record.rebalanced)
    return [
        f"Rebalancing: {within} of the {len(networks)} jointly projected ReLU networks, rescaled to equal norms, obey "
        f"the per-layer caps; their outputs change by at most {change:.1g} of the largest."
    ]


def _errors(table: BudgetTable, case: Case, level: float) -> Grid:
    n_seeds = len(next(iter(table.values())))
    grid = Grid(
        title=f"{case.name}: validation MAE in {UNITS[case.dataset]} at eta {level:g}, mean ± 95% interval over "
        f"{n_seeds} seeds, at certified budgets M"
    )
    grid.add_column("method")
    for budget in budgets(table):
        grid.add_column(f"M = {budget:g}", justify="right")
    for method in METHODS:
        values = [interval(errors(table, case, method, b, validation_key(level))) for b in budgets(table)]
        grid.add_row(LABELS[method], *(f"{value:.{DIGITS[case.dataset]}f}" for value in values))
    return grid


def _differences(table: BudgetTable, case: Case) -> Grid:
    compared = against_uniform(table, case)
    grid = Grid(
        title=f"{case.name}: MAE of {LABELS[METHOD]} minus {LABELS[BASELINE]} ± 95% interval; "
        f"p (two-sided, Holm over {len(compared)})"
    )
    grid.add_column("eta")
    for budget in budgets(table):
        grid.add_column(f"M = {budget:g}", justify="right")
    for level in NOISE_LEVELS:
        row = [compared[budget, level] for budget in budgets(table)]
        cells = (f"{t.comparison.difference:+.{DIGITS[case.dataset]}f}; {t.p_value:.2g}" for t in row)
        grid.add_row(f"{level:g}", *cells)
    return grid


def _overall(table: BudgetTable, case: Case) -> Grid:
    compared = overall(table, case)
    grid = Grid(
        title=f"{case.name}: change of the validation MAE against {LABELS[BASELINE]} over all budgets and noise levels"
    )
    grid.add_column("method")
    for column in ("change in %", f"p (two-sided, Holm over {len(compared)})", "seeds won", "bound / M"):
        grid.add_column(column, justify="right")
    for method, (comparison, p_value) in compared.items():
        cells = (f"{comparison.difference:+.1f}", f"{p_value:.2g}", f"{comparison.share_won:.0%}")
        grid.add_row(LABELS[method], *cells, f"{budget_used(table, case, method):.2f}")
    grid.add_row(LABELS[BASELINE], *["-"] * 3, f"{budget_used(table, case, BASELINE):.2f}")
    return grid
