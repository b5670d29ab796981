"""What the paper's experiment is made of: regimes, settings, runs, coefficients and the printed numbers.

The paper: N. Couellan, "The coupling effect of Lipschitz regularization in deep neural networks" (2019;
SN Computer Science 2(2):113, 2021).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_lip.errors import UsageError
from lightning_lip.paper.settings import EPOCHS, rounded

MAX_NORM = 10.0

REGIMES = ("none", "layer", "product", "maxnorm")
"""The four regimes, in the order of the paper's Table 1."""

PENALISED = ("layer", "product")
"""The regimes with a coefficient to tune."""

LABELS = {
    "none": "no regularisation",
    "layer": "layer penalty",
    "product": "product penalty",
    "maxnorm": f"MaxNorm {MAX_NORM:g}",
}

PAPER_LABELS = {"none": "no reg", "layer": "Layer reg", "product": "Lipschitz reg", "maxnorm": "MaxNorm"}

PAPER_SIGMAS = {
    "none": (2.828, 1.954, 1.825),
    "layer": (2.508, 1.625, 3.315),
    "product": (3.464, 1.791, 1.983),
    "maxnorm": (2.383, 1.883, 1.707),
}
"""Table 1 of the paper: the spectral norms of the three hidden layers, the output layer not counted."""

PAPER_BOUNDS = {"none": 10.01, "layer": 13.52, "product": 12.31, "maxnorm": 7.66}
"""Table 1 of the paper: the bound as printed there."""

GRID = tuple(round(10 ** (k / 2 - 0.25), 4) for k in range(-4, 5))
"""The coefficients that `--tune` tries: half a decade apart, from 0.0056 to 56."""

CRITERIA = ("clean", "noise")


@dataclass(frozen=True)
class Setting:
    """One table of the experiment.

    Attributes:
        scaling: How the inputs are scaled: `"raw"`, `"minmax"` or `"standardised"`. The target stays raw.
        n_norms: How many spectral norms the penalties cover: 3 (the hidden layers, as in the paper's
            Table 1; no Lipschitz bound, the output layer is free) or 4.
        criterion: What the coefficients were tuned on: `"clean"` or `"noise"` validation MAE.
    """

    scaling: str = "raw"
    n_norms: int = 3
    criterion: str = "clean"

    @property
    def name(self) -> str:
        """The key of this setting in the results, for instance `"raw/3/clean"`."""
        return f"{self.scaling}/{self.n_norms}/{self.criterion}"


PAPER_SETTING = Setting()
"""The paper's own table: only raw inputs give unregularised norms that look like its Table 1."""

Lambdas = dict[str, dict[str, float]]

LAMBDAS: Lambdas = {
    "raw/3/clean": {"layer": 0.1778, "product": 0.0562},
    "raw/3/noise": {"layer": 0.5623, "product": 0.5623},
}
"""The coefficients in use, by setting and regime, in units of the MSE loss: what `lightning-lip reproduce --tune` gave.

They are the best of `GRID` on 20 seeds that are not reported; `--full` finds those of all settings.
"""


@dataclass(frozen=True)
class Run:
    """One training run; equal runs give equal numbers, so that settings share them.

    Attributes:
        regime: One of `REGIMES`.
        seed: Of the split, the initialisation, the batches and the noise.
        scaling: As in `Setting`.
        n_norms: As in `Setting`; 0 for a regime without a penalty.
        coefficient: The penalty's lambda; 0 for a regime without a penalty.
        epochs: The number of epochs.
    """

    regime: str
    seed: int
    scaling: str = "raw"
    n_norms: int = 0
    coefficient: float = 0.0
    epochs: int = EPOCHS

    def __str__(self) -> str:
        """Name the run in messages."""
        penalty = f", {self.n_norms} norms, lambda {self.coefficient:g}" if self.n_norms else ""
        return f"regime '{self.regime}', seed {self.seed} ({self.scaling} inputs{penalty})"


@dataclass(frozen=True)
class Plan:
    """What one call of the command does.

    Attributes:
        settings: The settings reported.
        seeds: The seeds reported.
        epochs: The epochs of each run.
        tuned_settings: The settings whose coefficients are tuned first; empty where `LAMBDAS` is used.
        tuning_seeds: The seeds that they are tuned on.
    """

    settings: tuple[Setting, ...]
    seeds: range
    epochs: int
    tuned_settings: tuple[Setting, ...]
    tuning_seeds: range


@dataclass(frozen=True)
class Record:
    """What one run gave.

    Attributes:
        run: The run.
        history: By name (`"train_mae"`, `"train_mse"`, `"validation_mae/eta=0.2"`, ...), one value per epoch:
            the error of the weights at the epoch's end.
        sigmas: The spectral norms of the final weights, first to last layer: exact up to rounding (SVD in
            float64).
        largest_unit_norm: The largest Euclidean norm of a unit's incoming weights at the end.
        n_clipped: How often MaxNorm rescaled a unit's weights; 0 for the other regimes.
    """

    run: Run
    history: dict[str, list[float]]
    sigmas: tuple[float, ...]
    largest_unit_norm: float
    n_clipped: int

    def final(self, name: str) -> float:
        """Return the last epoch's value of a series of `history`."""
        return self.history[name][-1]

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain numbers, rounded to 6 significant digits."""
        return asdict(self.run) | {
            "final": {name: rounded(series[-1]) for name, series in self.history.items()},
            "sigmas": [rounded(sigma) for sigma in self.sigmas],
            "largest_unit_norm": rounded(self.largest_unit_norm),
            "n_clipped": self.n_clipped,
            "history": {name: [rounded(value) for value in series] for name, series in self.history.items()},
        }


def record_from_json(fields: dict[str, Any]) -> Record:
    """Return the record whose fields, as `dataclasses.asdict` gives them, went through JSON."""
    return Record(**fields | {"run": Run(**fields["run"]), "sigmas": tuple(fields["sigmas"])})


Records = dict[Run, Record]
Table = dict[str, list[Record]]
"""The records of one setting, by regime, in the order of the seeds."""


def run_for(setting: Setting, regime: str, seed: int, lambdas: Lambdas, epochs: int) -> Run:
    """Return the run of one regime and seed in a setting.

    Raises:
        UsageError: If `lambdas` has no coefficient for it.
    """
    if regime not in PENALISED:
        return Run(regime, seed, setting.scaling, epochs=epochs)
    try:
        coefficient = lambdas[setting.name][regime]
    except KeyError:
        raise UsageError(
            f"No coefficient is known for regime '{regime}' in the setting {setting.name}; "
            f"known settings: {sorted(lambdas)}. Tune it with --tune or --full."
        ) from None
    return Run(regime, seed, setting.scaling, setting.n_norms, coefficient, epochs)


def table_of(records: Records, setting: Setting, seeds: range, lambdas: Lambdas, epochs: int) -> Table:
    """Collect one setting's records by regime; a regime without a penalty serves several settings."""
    return {regime: [records[run_for(setting, regime, seed, lambdas, epochs)] for seed in seeds] for regime in REGIMES}


def finals(table: Table, regime: str, metric: str) -> list[float]:
    """Return a regime's error at the last epoch, one value per seed."""
    return [record.final(metric) for record in table[regime]]
