"""Penalty and monitor write the right keys into every logger, into two at once, and into none."""

import csv
import math

import pytest
from support.trainers import svd_norms
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lip import LipschitzMonitor, LipschitzPenalty
from lightning_lip.callbacks.monitoring.source import HEALTH

LAYERS = ["net.0", "net.2", "net.4"]
PENALTY_KEYS = {"lipschitz/product", "lipschitz/penalty"}
MONITOR_KEYS = (
    PENALTY_KEYS
    | {"lipschitz/product_upper"}
    | {f"lipschitz/{kind}/{layer}" for kind in ("spectral_norm", "log_share", *HEALTH) for layer in LAYERS}
)
STEPS = [3, 7, 11]  # one epoch of 12 steps, every 4th, on Lightning's own x-axis


def csv_history(logger):
    """Return what a CSVLogger wrote: key -> [(step, value), ...]."""
    history = {}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key.startswith("lipschitz/") and value:
                    history.setdefault(key, []).append((int(row["step"]), float(value)))
    return history


def tensorboard_history(logger):
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("lipschitz/")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


HISTORY = {"CSVLogger": csv_history, "TensorBoardLogger": tensorboard_history}


@pytest.fixture
def check(fit):
    """Train with loggers and callbacks; compare the histories of all loggers with the keys wanted."""

    def run(package, loggers, callbacks, wanted):
        module, trainer = fit(*callbacks, package=package, logger=loggers, log_every_n_steps=4)
        product = math.prod(svd_norms(module))
        for logger in trainer.loggers:
            history = HISTORY[type(logger).__name__](logger)
            assert set(history) == wanted
            assert all([step for step, _ in values] == STEPS for values in history.values())
            assert history["lipschitz/product"][-1][1] == pytest.approx(product, rel=1e-5)
            assert history["lipschitz/penalty"][-1][1] == pytest.approx(0.05 * product, rel=1e-5)
        assert float(trainer.callback_metrics["lipschitz/product"]) == pytest.approx(product, rel=1e-5)
        assert float(trainer.callback_metrics["lipschitz/penalty"]) == pytest.approx(0.05 * product, rel=1e-5)

    return run


def callbacks(monitored):
    return [LipschitzPenalty(0.05), *([LipschitzMonitor()] if monitored else [])]


@pytest.mark.parametrize("monitored", [False, True], ids=["penalty", "monitor"])
@pytest.mark.parametrize(
    "names",
    [["CSVLogger"], ["TensorBoardLogger"], ["CSVLogger", "TensorBoardLogger"], ["CSVLogger"] * 2, []],
    ids=", ".join,
)
def test_every_logger_has_the_keys(check, pl, tmp_path, names, monitored):
    loggers = [getattr(pl.loggers, name)(tmp_path, name=f"{i}") for i, name in enumerate(names)] or False
    check(pl, loggers, callbacks(monitored), MONITOR_KEYS if monitored else PENALTY_KEYS)


@pytest.mark.parametrize("monitored", [False, True], ids=["penalty", "monitor"])
def test_wandb_offline(fit, pl, tmp_path, monkeypatch, monitored):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = pl.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    logged = []
    log = logger.experiment.log
    monkeypatch.setattr(
        logger.experiment, "log", lambda metrics, *a, **k: (logged.append(dict(metrics)), log(metrics, *a, **k))
    )
    fit(*callbacks(monitored), package=pl, logger=logger, log_every_n_steps=4)
    ours = [row for row in logged if any(key.startswith("lipschitz/") for key in row)]
    wanted = MONITOR_KEYS if monitored else PENALTY_KEYS
    assert [set(row) for row in ours] == [wanted | {"trainer/global_step"}] * 3
    assert [row["trainer/global_step"] for row in ours] == STEPS
    logger.experiment.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
