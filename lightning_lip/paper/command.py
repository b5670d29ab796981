"""`lightning-lip reproduce`: its options, and what they choose."""

from __future__ import annotations

import os
from typing import Any

from lightning_lip.errors import UsageError
from lightning_lip.paper.budgets import study
from lightning_lip.paper.budgets.study import BudgetPlan
from lightning_lip.paper.regimes import experiment
from lightning_lip.paper.regimes.settings import CRITERIA, PAPER_SETTING, Plan, Setting
from lightning_lip.paper.settings import EPOCHS, REPORTED_SEED, SCALINGS, TUNING_SEED
from lightning_lip.reporting.documents import out_folder
from lightning_lip.reporting.extras import require_extras
from lightning_lip.reporting.failures import check_options

SEEDS = {"default": 10, "quick": 3, "full": 40}
TUNING_SEEDS = {"default": 20, "quick": 3, "full": 20}
BUDGET_TUNING_SEEDS = {"default": 10, "quick": 3}


def reproduce(
    out: str = "lightning_lip_results",
    quick: bool = False,
    full: bool = False,
    tune: bool = False,
    budget: bool = False,
    seeds: int | None = None,
    epochs: int = EPOCHS,
    workers: int | None = None,
) -> dict[str, Any]:
    """Repeat the experiment of Couellan (2019) on Boston housing and state which of its claims hold.

    Trains no regularisation, a layer-wise spectral penalty, the product penalty and MaxNorm with Lightning, on
    several seeds; prints errors with and without input noise, spectral norms beside the paper's Table 1, paired
    tests over the seeds, and for each of the paper's four claims whether it holds in this run. Leaves results.json,
    the figures as PNG, a checkpoint for each regime and TensorBoard logs under --out. Needs
    pip install -e ".[paper]" in a checkout.

    With --budget it trains other networks: the product of their spectral norms is certified to be at most M = 0.5 to
    16, by the joint projection, per-layer caps and other ways to share the budget between the layers, on Boston
    housing and diabetes with ReLU and tanh. It states whether coupling the layers pays, and leaves budget.json.

    An interrupted command goes on where it was when it is started again with the same options.

    Args:
        out: The folder for everything that is written; files of an earlier run are replaced.
        quick: 3 seeds instead of 10 (about 1 minute on 2 cores); too few for the claims' tests.
        full: 40 seeds for each of raw, min-max and standardised inputs, 3 and 4 norms, coefficients tuned on clean
            and on noisy MAE; tunes them first, on 20 other seeds (about 2 hours on 2 cores).
        tune: First tune the two penalties' coefficients on 20 other seeds (3 with --quick), print the table and use
            it (about 12 minutes more on 2 cores).
        budget: Compare methods at the same certified bound instead (about a quarter of an hour on 2 cores; with
            --quick 3 seeds and 3 minutes).
        seeds: The number of seeds reported, at least 2; by default 10 (3 with --quick, 40 with --full).
        epochs: The epochs of each run; the paper has 200.
        workers: The number of processes, by default one for each core; 1 trains in the command's own process.

    Returns:
        The contents of results.json, documented at `lightning_lip.paper.regimes.results.results`, or with `budget`
        those of budget.json, documented at `lightning_lip.paper.budgets.study.budget_results`.

    Raises:
        UsageError: If an option is of another type, or the options make no experiment.
        MissingExtraError: If the `paper` extra is not installed.
        RunError: If a run fails; the message names its regime and seed.
    """
    check_options(reproduce, locals())
    if workers is not None and workers < 1:
        raise UsageError(f"Expected --workers of at least 1, got {workers}.")
    folder = out_folder(out)
    n_workers = workers or os.cpu_count() or 1
    if budget:
        if full or tune:
            raise UsageError(
                f"Expected --budget without --{'full' if full else 'tune'}: it has its own seeds and tuning."
            )
        budgets = budget_plan(quick=quick, seeds=seeds, epochs=epochs)
        require_extras()
        return study.run_budget(budgets, folder, n_workers)
    regimes = plan(quick=quick, full=full, tune=tune, seeds=seeds, epochs=epochs)
    require_extras()
    return experiment.run_experiment(regimes, folder, n_workers)


def budget_plan(quick: bool = False, seeds: int | None = None, epochs: int = EPOCHS) -> BudgetPlan:
    """Translate the options of `reproduce --budget` into what is tuned, trained and reported.

    Raises:
        UsageError: If the options make no experiment.
    """
    preset = "quick" if quick else "default"
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + BUDGET_TUNING_SEEDS[preset])
    return BudgetPlan(_reported_seeds(preset, seeds, epochs), tuning_seeds, epochs)


def plan(
    quick: bool = False, full: bool = False, tune: bool = False, seeds: int | None = None, epochs: int = EPOCHS
) -> Plan:
    """Translate the options of `reproduce` into what is tuned, trained and reported.

    Raises:
        UsageError: If the options make no experiment.
    """
    if quick and full:
        raise UsageError("Expected --quick or --full, got both: choose one.")
    preset = "quick" if quick else "full" if full else "default"
    reported = _reported_seeds(preset, seeds, epochs)
    settings: tuple[Setting, ...] = (PAPER_SETTING,)
    tuned = tuple(Setting(criterion=criterion) for criterion in CRITERIA) if tune else ()
    if full:
        settings = tuned = tuple(Setting(s, n, c) for s in SCALINGS for n in (3, 4) for c in CRITERIA)
    return Plan(
        settings=settings,
        seeds=reported,
        epochs=epochs,
        tuned_settings=tuned,
        tuning_seeds=range(TUNING_SEED, TUNING_SEED + TUNING_SEEDS[preset]),
    )


def _reported_seeds(preset: str, seeds: int | None, epochs: int) -> range:
    n_seeds = SEEDS[preset] if seeds is None else seeds
    for name, value, least, most in (("seeds", n_seeds, 2, TUNING_SEED), ("epochs", epochs, 1, None)):
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            raise UsageError(f"Expected --{name} to be {limits}, got {value}.")
    return range(REPORTED_SEED, REPORTED_SEED + n_seeds)
