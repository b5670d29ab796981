"""The grid search for the coefficients."""

import io
import json

import pytest
from rich.console import Console
from support.records import record

from lightning_lip.paper.regimes import report, settings, tuning
from lightning_lip.paper.regimes.settings import LAMBDAS, Setting
from lightning_lip.paper.settings import NOISE_LEVELS, validation_key


def test_the_coefficients_in_use_are_on_the_grid():
    for row in LAMBDAS.values():
        for coefficient in row.values():
            assert coefficient in settings.GRID


def test_tuning_takes_the_best_by_each_criterion():
    seeds = range(1000, 1002)
    wanted = [Setting(), Setting(criterion="noise")]
    runs = tuning.tuning_runs(wanted, seeds, 8)
    assert len(runs) == len(set(runs)) == 2 * len(settings.GRID) * 2  # both criteria read the same runs
    records = {}
    for run in runs:
        result = record(run.regime, run.seed, 5.0)
        # Clean: best at the third of the grid. Noisy: the larger the better.
        place = settings.GRID.index(run.coefficient)
        result.history[validation_key(0.0)][-1] += abs(place - 2)
        for level in NOISE_LEVELS[1:]:
            result.history[validation_key(level)][-1] -= 0.1 * place
        records[run] = result
    found = tuning.choose(records, wanted, seeds, 8)
    assert found.lambdas["raw/3/clean"] == dict.fromkeys(settings.PENALISED, settings.GRID[2])
    assert found.lambdas["raw/3/noise"] == dict.fromkeys(settings.PENALISED, settings.GRID[-1])
    assert found.at_the_edge == ["raw/3/noise, layer", "raw/3/noise, product"]
    assert len(found.sweeps) == 2
    assert tuning.sweeps_of(found, Setting(criterion="noise")) == list(found.sweeps)
    assert tuning.sweeps_of(found, Setting("minmax")) == tuning.sweeps_of(None, Setting()) == []
    json.dumps(found.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match=r"among .*'clean'.*got 'speed'"):
        tuning.choose(records, [Setting(criterion="speed")], seeds, 8)
    console = Console(file=io.StringIO(), width=120)
    report.print_lambdas(console, found)
    assert "the best value is at an end of the grid" in console.file.getvalue()
