"""The experiment from a plan to the files it leaves: tuning, training, statistics, report, figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_lip.paper.data import NOTE, Dataset, load_boston
from lightning_lip.paper.regimes import report
from lightning_lip.paper.regimes.claims import judge
from lightning_lip.paper.regimes.figures import write_figures
from lightning_lip.paper.regimes.results import results, write
from lightning_lip.paper.regimes.settings import (
    LAMBDAS,
    PAPER_SETTING,
    REGIMES,
    Lambdas,
    Plan,
    Record,
    Records,
    Run,
    run_for,
    table_of,
)
from lightning_lip.paper.regimes.training import artefacts_of, train
from lightning_lip.paper.regimes.tuning import Tuning, choose, tuning_runs
from lightning_lip.reporting.processes import map_tasks
from lightning_lip.reporting.progress import progress


def run_experiment(plan: Plan, folder: Path, workers: int) -> dict[str, Any]:
    """Run a plan, print its report and write its files.

    Args:
        plan: What to tune, train and report.
        folder: Where the files go; made if missing.
        workers: The number of processes.

    Returns:
        The contents of results.json.

    Raises:
        RunError: If a run fails.
        DataError: If the data are not those of the paper.
        UsageError: If no coefficient is known for a setting.
    """
    start = time.monotonic()
    console = report.make_console()
    console.print(NOTE, highlight=False)
    data = load_boston()
    folder.mkdir(parents=True, exist_ok=True)

    tuning, lambdas = _tune(plan, data, workers, console)
    records = _train_all(reported_runs(plan, lambdas), data, workers, console, "runs", _logged(plan, lambdas), folder)
    tables = {s: table_of(records, s, plan.seeds, lambdas, plan.epochs) for s in plan.settings}

    document = results(tables, records, lambdas, tuning, plan.seeds, plan.epochs)
    document["figures"] = write_figures(tables, tuning, folder)
    document["artefacts"] = {run.regime: artefacts_of(run) for run in _logged(plan, lambdas)}
    document["timing"] = {"seconds": round(time.monotonic() - start, 1), "workers": workers}
    write(document, folder / "results.json")

    if tuning is not None:
        report.print_lambdas(console, tuning)
    for setting, table in tables.items():
        if setting == PAPER_SETTING:
            report.print_setting(console, setting, table, lambdas[setting.name])
        else:
            report.print_errors(console, setting, table, lambdas[setting.name])
            report.print_claims(console, judge(table))
    console.print(
        f"\nFigures, results.json, checkpoints and TensorBoard logs are in {folder} "
        f"(tensorboard --logdir {folder / 'tensorboard'}). {document['timing']['seconds']:.0f} s on {workers} workers.",
        highlight=False,
    )
    return document


def reported_runs(plan: Plan, lambdas: Lambdas) -> list[Run]:
    """Every run of the plan's settings, each once, seed by seed: those with logs, the longest, come first."""
    runs = [
        run_for(setting, regime, seed, lambdas, plan.epochs)
        for seed in plan.seeds
        for setting in plan.settings
        for regime in REGIMES
    ]
    return list(dict.fromkeys(runs))


def _logged(plan: Plan, lambdas: Lambdas) -> tuple[Run, ...]:
    """The representative run of each regime: the first seed in the paper's setting."""
    return tuple(run_for(PAPER_SETTING, regime, plan.seeds[0], lambdas, plan.epochs) for regime in REGIMES)


def _tune(plan: Plan, data: Dataset, workers: int, console: Console) -> tuple[Tuning | None, Lambdas]:
    if not plan.tuned_settings:
        return None, LAMBDAS
    runs = tuning_runs(plan.tuned_settings, plan.tuning_seeds, plan.epochs)
    records = _train_all(runs, data, workers, console, "tuning")
    tuning = choose(records, plan.tuned_settings, plan.tuning_seeds, plan.epochs)
    return tuning, tuning.lambdas


def _train_all(
    runs: Sequence[Run],
    data: Dataset,
    workers: int,
    console: Console,
    what: str,
    logged: tuple[Run, ...] = (),
    folder: Path | None = None,
) -> Records:
    task = partial(_train_one, data=data, logged=logged, out=None if folder is None else str(folder))
    with progress(console, len(runs), what) as on_done:
        records = map_tasks(task, runs, workers, on_done)
    return dict(zip(runs, records, strict=True))


def _train_one(run: Run, data: Dataset, logged: tuple[Run, ...], out: str | None) -> Record:
    return train(run, data, out if run in logged else None)
