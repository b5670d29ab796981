"""The results file: every number of the experiment in one JSON document."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from lightning_lip.paper.data import NOTE, SOURCES
from lightning_lip.paper.regimes.claims import comparisons, epochs_ratios, judge
from lightning_lip.paper.regimes.settings import (
    MAX_NORM,
    PAPER_BOUNDS,
    PAPER_SIGMAS,
    REGIMES,
    Lambdas,
    Records,
    Setting,
    Table,
    finals,
)
from lightning_lip.paper.regimes.tuning import Tuning
from lightning_lip.paper.settings import BATCH_SIZE, METRICS, NOISE_LEVELS
from lightning_lip.paper.statistics import interval
from lightning_lip.reporting.documents import versions

SCHEMA = 1
PACKAGES = ("lightning-lip", "lightning", "torchmetrics", "numpy", "scipy", "mlxtend", "matplotlib")


def results(
    tables: dict[Setting, Table],
    records: Records,
    lambdas: Lambdas,
    tuning: Tuning | None,
    seeds: range,
    epochs: int,
) -> dict[str, Any]:
    """Collect the results; equal arguments give equal documents.

    The document's keys:

    - `schema`: 1.
    - `versions`: of Python and the packages.
    - `data`: name, source and a note on its use.
    - `options`: seeds, epochs, batch size, noise levels, MaxNorm's value, settings.
    - `lambdas`: the coefficients in use, by setting (`"raw/3/clean"`: scaling, number of norms, criterion) and regime.
    - `tuning`: null, or the grid, the tuning seeds, the table of coefficients found, its entries at an end of the
      grid, and the mean validation MAE by coefficient (rows) and noise level (columns).
    - `paper`: the norms and bounds that the paper's Table 1 prints, by regime.
    - `settings`: by setting, `regimes` (by regime: mean and half width of the 95% interval of each metric, of the
      `sigmas` and of the products of the first three and of all norms; the largest unit norm and the number of rows
      clipped over the seeds), `comparisons` (the product penalty against each rival, by metric: difference,
      p-values, share of seeds won), `epochs_ratios` (by seed: the layer penalty's epochs to a low MAE at the largest
      noise level over the product penalty's) and `claims` (see `claims`).
    - `runs`: one entry for each run reported: what was run, the metrics at the last epoch (`final`), `sigmas`,
      `largest_unit_norm`, `n_clipped`, and `history`, a value per epoch for each metric.

    `reproduce` adds `timing`, `figures` and `artefacts`.
    """
    used = {record.run: record for table in tables.values() for rows in table.values() for record in rows}
    return {
        "schema": SCHEMA,
        "versions": versions(*PACKAGES),
        "data": {"name": "Boston housing", "source": SOURCES["boston"], "note": NOTE},
        "options": {
            "seeds": list(seeds),
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            "noise_levels": list(NOISE_LEVELS),
            "max_norm": MAX_NORM,
            "settings": [setting.name for setting in tables],
        },
        "lambdas": {setting.name: lambdas[setting.name] for setting in tables},
        "tuning": None if tuning is None else tuning.to_json(),
        "paper": {"sigmas": PAPER_SIGMAS, "bounds": PAPER_BOUNDS},
        "settings": {setting.name: _statistics(table) for setting, table in tables.items()},
        "runs": [record.to_json() for run, record in records.items() if run in used],
    }


def _statistics(table: Table) -> dict[str, Any]:
    compared = comparisons(table)
    return {
        "regimes": {regime: _regime(table, regime) for regime in REGIMES},
        "comparisons": {
            metric: {rival: asdict(comparison) for rival, comparison in row.items()} for metric, row in compared.items()
        },
        "epochs_ratios": epochs_ratios(table),
        "claims": [asdict(claim) for claim in judge(table)],
    }


def _regime(table: Table, regime: str) -> dict[str, Any]:
    rows = table[regime]
    sigmas = np.array([record.sigmas for record in rows])
    return {
        "metrics": {metric: asdict(interval(finals(table, regime, metric))) for metric in METRICS},
        "sigmas": [asdict(interval(column)) for column in sigmas.T],
        "product_of_3": asdict(interval(sigmas[:, :3].prod(axis=1))),
        "product_of_all": asdict(interval(sigmas.prod(axis=1))),
        "largest_unit_norm": max(record.largest_unit_norm for record in rows),
        "n_clipped": sum(record.n_clipped for record in rows),
    }
