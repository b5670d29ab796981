"""The tables and sentences that the command prints. Every sentence is made from the run's own statistics."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from lightning_lip.paper.regimes.claims import HOLDS, RIVALS, Claim, comparisons, epochs_ratios, judge
from lightning_lip.paper.regimes.settings import (
    LABELS,
    MAX_NORM,
    PAPER_BOUNDS,
    PAPER_LABELS,
    PAPER_SETTING,
    PAPER_SIGMAS,
    REGIMES,
    Lambdas,
    Setting,
    Table,
    finals,
)
from lightning_lip.paper.regimes.tuning import Tuning
from lightning_lip.paper.settings import METRICS, NOISE_LEVELS, validation_key
from lightning_lip.paper.statistics import DIRECTIONS, compare, corrected, in_words, interval
from lightning_lip.reporting.console import make_table, print_line

METRIC_LABELS = {"train_mae": "train"} | {validation_key(level): f"eta {level:g}" for level in NOISE_LEVELS}
PAIRS = (("product", "layer"), ("product", "none"), ("layer", "none"), ("maxnorm", "none"))


def print_report(console: Console, tables: dict[Setting, Table], lambdas: Lambdas, tuning: Tuning | None) -> None:
    """Print the coefficients found and every setting: the paper's in full, of the others errors and claims."""
    if tuning is not None:
        print_lambdas(console, tuning)
    for setting, table in tables.items():
        print_errors(console, setting, table, lambdas[setting.name])
        if setting == PAPER_SETTING:
            console.print(_norms(table))
            console.print(_differences(table))
            for sentence in (*notes(setting, table), *findings(table)):
                print_line(console, f"- {sentence}")
        print_claims(console, judge(table))


def print_errors(console: Console, setting: Setting, table: Table, lambdas: dict[str, float]) -> None:
    """Print the table of mean absolute errors of one setting."""
    n_seeds = len(table["none"])
    title = (
        f"MAE in thousand dollars, mean ± 95% interval over {n_seeds} seeds "
        f"({setting.scaling} inputs, {setting.n_norms} norms, tuned on {setting.criterion} MAE)"
    )
    grid = make_table(title, ["regime"], ["lambda", *METRIC_LABELS.values()])
    for regime in REGIMES:
        errors = [interval(finals(table, regime, metric)) for metric in METRICS]
        coefficient = f"{lambdas[regime]:.3g}" if regime in lambdas else "-"
        grid.add_row(LABELS[regime], coefficient, *(f"{error:.2f}" for error in errors))
    console.print(grid)


def print_claims(console: Console, claims: list[Claim]) -> None:
    """Print each claim of the paper with its verdict, its test and its figures."""
    print_line(console, "\nThe paper's claims in this run:")
    for claim in claims:
        print_line(console, f"({claim.letter}) {claim.statement}: {claim.verdict}")
        print_line(console, f"    {claim.figures}")
        print_line(console, f"    Test: {claim.test}.")
    print_line(console, summary(claims))


def print_lambdas(console: Console, tuning: Tuning) -> None:
    """Print the table of coefficients that the tuning found."""
    title = f"lambda by grid search on seeds {tuning.seeds[0]} to {tuning.seeds[-1]}"
    grid = make_table(title, ("scaling / norms / criterion", "layer penalty", "product penalty"), [])
    for setting, row in tuning.lambdas.items():
        grid.add_row(setting, f"{row['layer']:g}", f"{row['product']:g}")
    console.print(grid)
    for entry in tuning.at_the_edge:
        print_line(console, f"- {entry}: the best value is at an end of the grid.")


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
        (pair, metric): compare(*(finals(table, regime, metric) for regime in pair))
        for pair in PAIRS
        for metric in METRICS
    }
    found = corrected(compared)
    sentences = []
    for pair in PAIRS:
        verdicts = []
        for metric in METRICS:
            comparison, p_value = found[pair, metric]
            verdict = found[pair, metric].verdict
            numbers = f" ({comparison.difference:+.3f}, p = {p_value:.2g})" if verdict in DIRECTIONS else ""
            verdicts.append((verdict, METRIC_LABELS[metric] + numbers))
        sentences.append(f"MAE of {LABELS[pair[0]]} against {LABELS[pair[1]]}: {in_words(verdicts, 'in')}.")
    return sentences


def _norms(table: Table) -> Grid:
    columns = [f"{LABELS[regime]}\n({PAPER_LABELS[regime]})" for regime in REGIMES]
    grid = make_table("spectral norms of the final weights, mean over seeds (the paper's Table 1)", ["layer"], columns)
    sigmas = {regime: np.array([record.sigmas for record in table[regime]]) for regime in REGIMES}
    for layer in range(3):
        cells = (f"{sigmas[r][:, layer].mean():.3f} ({PAPER_SIGMAS[r][layer]:.3f})" for r in REGIMES)
        grid.add_row(f"W{layer + 1}", *cells)
    products = (f"{sigmas[r][:, :3].prod(axis=1).mean():.2f} ({PAPER_BOUNDS[r]:.2f})" for r in REGIMES)
    grid.add_row("product W1 to W3", *products)
    grid.add_row("W4 (output)", *(f"{sigmas[r][:, 3].mean():.3f} (-)" for r in REGIMES))
    return grid


def _differences(table: Table) -> Grid:
    title = "product penalty's MAE minus the rival's ± 95% interval; p (two-sided, uncorrected); seeds won"
    grid = make_table(title, ["MAE"], [f"minus {LABELS[rival]}" for rival in RIVALS])
    for metric, row in comparisons(table).items():
        cells = (f"{c.difference:.3f}; {c.p_two_sided:.2g}; {c.share_won:.0%}" for c in row.values())
        grid.add_row(METRIC_LABELS[metric], *cells)
    return grid
