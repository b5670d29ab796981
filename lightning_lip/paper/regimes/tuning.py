"""The choice of each penalty's coefficient by grid search, on seeds that are never reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_lip.paper.regimes.settings import CRITERIA, GRID, PENALISED, Lambdas, Records, Run, Setting
from lightning_lip.paper.settings import NOISE_LEVELS, validation_key


@dataclass(frozen=True)
class Sweep:
    """What the grid gave for one penalty under one scaling and number of norms.

    Attributes:
        setting: The scaling and the number of norms; its criterion has no meaning here.
        regime: `"layer"` or `"product"`.
        validation_mae: Means over the tuning seeds, (len(grid), len(NOISE_LEVELS)).
    """

    setting: Setting
    regime: str
    validation_mae: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Tuning:
    """The outcome of the grid search: the table of coefficients, and the errors that they were chosen by.

    Attributes:
        lambdas: By setting name and regime, a replacement for `settings.LAMBDAS`.
        sweeps: One for each penalty, scaling and number of norms.
        grid: The coefficients tried.
        seeds: The tuning seeds.
    """

    lambdas: Lambdas
    sweeps: tuple[Sweep, ...]
    grid: tuple[float, ...]
    seeds: range

    @property
    def at_the_edge(self) -> list[str]:
        """The entries of the table that lie at an end of the grid, where the best may be outside."""
        return [
            f"{setting}, {regime}"
            for setting, row in self.lambdas.items()
            for regime, coefficient in row.items()
            if coefficient in (self.grid[0], self.grid[-1])
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for the results file."""
        return {
            "grid": list(self.grid),
            "seeds": list(self.seeds),
            "lambdas": self.lambdas,
            "at_the_edge": self.at_the_edge,
            "validation_mae": [
                {
                    "scaling": sweep.setting.scaling,
                    "n_norms": sweep.setting.n_norms,
                    "regime": sweep.regime,
                    "by_lambda_and_eta": [[round(value, 5) for value in row] for row in sweep.validation_mae],
                }
                for sweep in self.sweeps
            ],
        }


def tuning_runs(settings: Sequence[Setting], seeds: range, epochs: int) -> list[Run]:
    """Return every run that `choose` needs, each once."""
    runs = [
        _run(setting, regime, coefficient, seed, epochs)
        for setting in settings
        for regime in PENALISED
        for coefficient in GRID
        for seed in seeds
    ]
    return list(dict.fromkeys(runs))


def choose(records: Records, settings: Sequence[Setting], seeds: range, epochs: int) -> Tuning:
    """Take from the grid, for each setting and penalty, the coefficient of the lowest validation MAE.

    The clean criterion is the mean MAE at eta = 0, the noise criterion that over eta > 0.

    Args:
        records: Those of `tuning_runs` with the same other arguments.
        settings: The settings to tune; both criteria are read from the same runs.
        seeds: The tuning seeds.
        epochs: The number of epochs of each run.
    """
    sweeps: dict[tuple[Setting, str], Sweep] = {}
    lambdas: Lambdas = {}
    for setting in settings:
        for regime in PENALISED:
            key = replace(setting, criterion=""), regime
            if key not in sweeps:
                sweeps[key] = _sweep(records, key[0], regime, seeds, epochs)
            lambdas.setdefault(setting.name, {})[regime] = _best(sweeps[key], setting.criterion)
    return Tuning(lambdas, tuple(sweeps.values()), GRID, seeds)


def sweeps_of(tuning: Tuning | None, setting: Setting) -> list[Sweep]:
    """Return the sweeps that a setting's coefficients were chosen from; none without a tuning."""
    if tuning is None:
        return []
    return [s for s in tuning.sweeps if s.setting == replace(setting, criterion="")]


def _sweep(records: Records, setting: Setting, regime: str, seeds: range, epochs: int) -> Sweep:
    rows = []
    for coefficient in GRID:
        chosen = [records[_run(setting, regime, coefficient, seed, epochs)] for seed in seeds]
        rows.append(
            tuple(float(np.mean([record.final(validation_key(level)) for record in chosen])) for level in NOISE_LEVELS)
        )
    return Sweep(setting, regime, tuple(rows))


def _best(sweep: Sweep, criterion: str) -> float:
    if criterion not in CRITERIA:
        raise ValueError(f"Expected a criterion among {CRITERIA}, got {criterion!r}.")
    mae = np.asarray(sweep.validation_mae)
    noisy = np.asarray(NOISE_LEVELS) > 0
    score = mae[:, noisy].mean(axis=1) if criterion == "noise" else mae[:, ~noisy].mean(axis=1)
    return GRID[int(np.argmin(score))]


def _run(setting: Setting, regime: str, coefficient: float, seed: int, epochs: int) -> Run:
    return Run(regime, seed, setting.scaling, setting.n_norms, coefficient, epochs)
