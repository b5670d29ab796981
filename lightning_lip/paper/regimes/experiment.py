"""The experiment from a plan to the files it leaves: tuning, training, statistics, report, figures."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_lip.paper.data import NOTE, Dataset, load_boston
from lightning_lip.paper.regimes import report
from lightning_lip.paper.regimes.figures import write_figures
from lightning_lip.paper.regimes.results import PACKAGES, results
from lightning_lip.paper.regimes.settings import (
    LAMBDAS,
    PAPER_SETTING,
    REGIMES,
    Lambdas,
    Plan,
    Record,
    Records,
    Run,
    record_from_json,
    run_for,
    table_of,
)
from lightning_lip.paper.regimes.training import artefacts_of, train
from lightning_lip.paper.regimes.tuning import choose, tuning_runs
from lightning_lip.reporting.console import make_console, print_line
from lightning_lip.reporting.documents import versions, write_json
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.progress import map_with_progress


def run_experiment(plan: Plan, folder: Path, workers: int) -> dict[str, Any]:
    """Run a plan, print its report and write its files.

    Finished runs stay in results.partial.jsonl until results.json is written: the same plan goes on from there.

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
        OSError: If a file cannot be written.
    """
    start = time.monotonic()
    console = make_console()
    print_line(console, NOTE)
    data = load_boston()
    settings = (plan, versions(*PACKAGES, "numba"))
    finished = Finished(folder / "results.partial.jsonl", settings, record_from_json)

    def train_all(what: str, runs: Sequence[Run], logged: Collection[Run] = ()) -> Records:
        task = partial(_train_one, data=data, logged=logged, out=str(folder))
        return dict(zip(runs, map_with_progress(console, what, task, runs, workers, finished), strict=True))

    tuning, lambdas = None, LAMBDAS
    if plan.tuned_settings:
        tuned = train_all("tuning runs", tuning_runs(plan.tuned_settings, plan.tuning_seeds, plan.epochs))
        tuning = choose(tuned, plan.tuned_settings, plan.tuning_seeds, plan.epochs)
        lambdas = tuning.lambdas
    # The representative run of each regime: the first seed in the paper's setting.
    logged = [run_for(PAPER_SETTING, regime, plan.seeds[0], lambdas, plan.epochs) for regime in REGIMES]
    for run in logged:
        if not (folder / artefacts_of(run)["checkpoint"]).is_file():
            finished.results.pop(repr(run), None)
    records = train_all("runs", reported_runs(plan, lambdas), logged)
    tables = {s: table_of(records, s, plan.seeds, lambdas, plan.epochs) for s in plan.settings}

    document = results(tables, records, lambdas, tuning, plan.seeds, plan.epochs)
    document["figures"] = write_figures(tables, tuning, folder)
    document["artefacts"] = {run.regime: artefacts_of(run) for run in logged}
    document["timing"] = {"seconds": round(time.monotonic() - start, 1), "workers": workers}
    write_json(document, folder / "results.json")
    finished.remove()

    report.print_report(console, tables, lambdas, tuning)
    print_line(
        console,
        f"\nFigures, results.json, checkpoints and TensorBoard logs are in {folder} "
        f"(tensorboard --logdir {folder / 'tensorboard'}). {document['timing']['seconds']:.0f} s on {workers} workers.",
    )
    return document


def reported_runs(plan: Plan, lambdas: Lambdas) -> list[Run]:
    """Return the runs of all settings, each once, seed by seed: the logged ones, which take longest, come first."""
    runs = [
        run_for(setting, regime, seed, lambdas, plan.epochs)
        for seed in plan.seeds
        for setting in plan.settings
        for regime in REGIMES
    ]
    return list(dict.fromkeys(runs))


def _train_one(run: Run, data: Dataset, logged: Collection[Run], out: str) -> Record:
    return train(run, data, out if run in logged else None)
