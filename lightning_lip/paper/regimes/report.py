"""The tables and sentences that the command prints. Every sentence is made from the run's own statistics."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from lightning_lip.paper.regimes.claims import HOLDS, RIVALS, Claim, comparisons, epochs_ratios, judge
from lightning_lip.paper.regimes.settings import (
    LABELS,
    MAX_NORM,
    METRICS,
    NOISE_LEVELS,
    PAPER_BOUNDS,
    PAPER_LABELS,
    PAPER_SIGMAS,
    REGIMES,
    Setting,
    Table,
    validation_key,
)
from lightning_lip.paper.regimes.tuning import Tuning
from lightning_lip.paper.statistics import ALPHA, Comparison, compare, holm, interval

METRIC_LABELS = {"train_mae": "train"} | {validation_key(level): f"eta {level:g}" for level in NOISE_LEVELS}
PAIRS = (("product", "layer"), ("product", "none"), ("layer", "none"), ("maxnorm", "none"))
DIRECTIONS = ("lower", "higher")

PLAIN_WIDTH = 120
"""Columns of the tables where there is no terminal."""


def make_console() -> Console:
    """The console that reports are printed on."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def print_setting(console: Console, setting: Setting, table: Table, lambdas: dict[str, float]) -> None:
    """Print everything on one setting: errors, norms, paired differences, findings and claims."""
    print_errors(console, setting, table, lambdas)
    console.print(_norms(table))
    console.print(_differences(table))
    for sentence in (*notes(setting, table), *findings(table)):
        console.print(f"- {sentence}", highlight=False)
    print_claims(console, judge(table))


def print_errors(console: Console, setting: Setting, table: Table, lambdas: dict[str, float]) -> None:
    """Print the table of mean absolute errors of one setting."""
    n_seeds = len(table["none"])
    grid = Grid(
        title=f"MAE in thousand dollars, mean ± 95% interval over {n_seeds} seeds "
        f"({setting.scaling} inputs, {setting.n_norms} norms, tuned on {setting.criterion} MAE)"
    )
    grid.add_column("regime")
    grid.add_column("lambda", justify="right")
    for label in METRIC_LABELS.values():
        grid.add_column(label, justify="right")
    for regime in REGIMES:
        errors = [interval([record.final(metric) for record in table[regime]]) for metric in METRICS]
        coefficient = f"{lambdas[regime]:.3g}" if regime in lambdas else "-"
        grid.add_row(LABELS[regime], coefficient, *(f"{error:.2f}" for error in errors))
    console.print(grid)


def print_claims(console: Console, claims: list[Claim]) -> None:
    """Print each claim of the paper with its verdict, its test and its figures."""
    console.print("\nThe paper's claims in this run:", highlight=False)
    for claim in claims:
        console.print(f"({claim.letter}) {claim.statement}: [bold]{claim.verdict}[/bold]", highlight=False)
        console.print(f"    {claim.figures}", highlight=False)
        console.print(f"    Test: {claim.test}.", highlight=False)
    console.print(summary(claims), highlight=False)


def print_lambdas(console: Console, tuning: Tuning) -> None:
    """Print the table of coefficients that the tuning found."""
    grid = Grid(title=f"lambda by grid search on seeds {tuning.seeds[0]} to {tuning.seeds[-1]}")
    for column in ("scaling / norms / criterion", "layer penalty", "product penalty"):
        grid.add_column(column)
    for setting, row in tuning.lambdas.items():
        grid.add_row(setting, f"{row['layer']:g}", f"{row['product']:g}")
    console.print(grid)
    for entry in tuning.at_the_edge:
        console.print(f"- {entry}: the best value is at an end of the grid.", highlight=False)


def summary(claims: list[Claim]) -> str:
    """Say in one sentence which claims hold."""
    held = [f"({claim.letter})" for claim in claims if claim.verdict == HOLDS]
    if not held:
        return f"None of the {len(claims)} claims is shown to hold in this run."
    return f"{len(held)} of {len(claims)} claims hold in this run: {', '.join(held)}."


def notes(setting: Setting, table: Table) -> list[str]:
    """Say what the norms bound, whether MaxNorm was ever active, and how fast a low MAE was reached."""
    clipped = sum(record.n_clipped for record in table["maxnorm"])
    largest = max(record.largest_unit_norm for record in table["maxnorm"])
    active = f"rescaled a unit's weights {clipped} times" if clipped else "was never active"
    sentences = [f"MaxNorm {MAX_NORM:g} {active}; the largest norm of a unit at the end was {largest:.2f}."]
    if setting.n_norms == 3:
        sentences.append(
            "The penalties cover the three hidden layers, as the paper's Table 1 does: that bounds no network, "
            "because the output layer is free."
        )
    sentences.append(
        f"Epochs to a low MAE at eta {NOISE_LEVELS[-1]:g}, layer penalty / product penalty: "
        f"median {float(np.median(epochs_ratios(table))):.2f}."
    )
    return sentences


def findings(table: Table) -> list[str]:
    """Compare regimes in words: a direction is named only where a two-sided Wilcoxon test shows one.

    Holm's correction runs over all comparisons of the list: with ten seeds, differences between two penalties
    change sign with the rounding of the kernels, and the smallest of twenty uncorrected p-values means little.
    """
    compared = {
        (pair, metric): compare(*([record.final(metric) for record in table[regime]] for regime in pair))
        for pair in PAIRS
        for metric in METRICS
    }
    adjusted = dict(zip(compared, holm([c.p_two_sided for c in compared.values()]), strict=True))
    sentences = []
    for pair in PAIRS:
        by_verdict: dict[str, list[str]] = {}
        for metric in METRICS:
            comparison, p_value = compared[pair, metric], adjusted[pair, metric]
            verdict = difference_in_words(comparison, p_value)
            numbers = f" ({comparison.difference:+.3f}, p = {p_value:.2g})" if verdict in DIRECTIONS else ""
            by_verdict.setdefault(verdict, []).append(METRIC_LABELS[metric] + numbers)
        outcome = "; ".join(f"{verdict} in {', '.join(labels)}" for verdict, labels in by_verdict.items())
        sentences.append(f"MAE of {LABELS[pair[0]]} against {LABELS[pair[1]]}: {outcome}.")
    return sentences


def difference_in_words(comparison: Comparison, p_value: float) -> str:
    """Name a direction if `p_value` is below the level, and otherwise none."""
    if comparison.difference.mean == 0 and comparison.difference.half_width == 0:
        return "identical"
    if p_value >= ALPHA:
        return "no difference shown"
    return DIRECTIONS[comparison.difference.mean > 0]


def _norms(table: Table) -> Grid:
    grid = Grid(title="spectral norms of the final weights, mean over seeds (the paper's Table 1)")
    grid.add_column("layer")
    for regime in REGIMES:
        grid.add_column(f"{LABELS[regime]}\n({PAPER_LABELS[regime]})", justify="right")
    sigmas = {regime: np.array([record.sigmas for record in table[regime]]) for regime in REGIMES}
    for layer in range(3):
        cells = (f"{sigmas[r][:, layer].mean():.3f} ({PAPER_SIGMAS[r][layer]:.3f})" for r in REGIMES)
        grid.add_row(f"W{layer + 1}", *cells)
    products = (f"{sigmas[r][:, :3].prod(axis=1).mean():.2f} ({PAPER_BOUNDS[r]:.2f})" for r in REGIMES)
    grid.add_row("product W1 to W3", *products)
    grid.add_row("W4 (output)", *(f"{sigmas[r][:, 3].mean():.3f} (-)" for r in REGIMES))
    return grid


def _differences(table: Table) -> Grid:
    grid = Grid(title="product penalty's MAE minus the rival's ± 95% interval; p (two-sided, uncorrected); seeds won")
    grid.add_column("MAE")
    for rival in RIVALS:
        grid.add_column(f"minus {LABELS[rival]}", justify="right")
    for metric, row in comparisons(table).items():
        grid.add_row(METRIC_LABELS[metric], *_cells(row[rival] for rival in RIVALS))
    return grid


def _cells(row: Iterable[Comparison]) -> list[str]:
    return [f"{c.difference:.3f}; {c.p_two_sided:.2g}; {c.share_won:.0%}" for c in row]
