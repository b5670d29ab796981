"""The certified radii of a validation: their curve, its file and figure, and the histogram."""

import csv
import math

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.networks import mlp
from support.trainers import make_module, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lip import CertifiedValidation, certify
from lightning_lip.callbacks.tensorboard.certified_radii import curve
from lightning_lip.metrics import certified_accuracy


def test_the_curve_is_the_share_of_samples_with_at_least_that_radius():
    radii = torch.tensor([0.0, 0.5, 1.0, math.inf])
    levels, shares = curve(radii, [0.25, 3.0])
    at = dict(zip(levels, shares, strict=True))
    assert levels == sorted(levels)
    assert (at[0.0], at[0.25], at[3.0]) == (0.75, 0.75, 0.25)
    assert shares == [float((radii >= max(level, 1e-30)).float().mean()) for level in levels]


@pytest.mark.parametrize(("radii", "share"), [([0.0, 0.0], 0.0), ([math.inf, math.inf], 1.0)])
def test_a_curve_without_a_finite_radius(radii, share):
    assert curve(torch.tensor(radii), []) == ([0.0], [share])


def validated(tmp_path, logger, **options):
    net = mlp(3, 8, 4)
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    y = torch.where(torch.arange(60) % 5 == 0, torch.zeros(60, dtype=torch.long), net(x).argmax(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=25)
    callback = CertifiedValidation((0.05, 0.1), **options)
    trainer = make_trainer(lightning, [callback], logger=logger, default_root_dir=tmp_path)
    trainer.validate(make_module(lightning, net=net, loss=nn.functional.cross_entropy), data, verbose=False)
    features = certify(net[:2], x[:1]).upper

    def share(eps):
        return certified_accuracy(net(x), y, features, eps, net[2].weight, certify(net, x[:1]).upper).item()

    return trainer, share


def rows_of(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["# step: 0", "# epoch: 0", "# samples: 60"]
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(lines[3:])]


def test_tensorboard_gets_a_histogram_and_a_figure_and_the_folder_a_file(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer, share = validated(tmp_path, logger)
    logger.finalize("success")
    rows = rows_of(logger.log_dir and tmp_path / "lightning_logs" / "version_0" / "certified_accuracy.csv")
    assert rows[0]["certified_accuracy"] == pytest.approx(share(0.0), abs=1e-6)
    assert {row["accuracy"] for row in rows} == {rows[0]["certified_accuracy"]}
    for row in rows[:-1]:  # at the largest radius, rounded to six digits, either side may be meant
        assert row["certified_accuracy"] == pytest.approx(share(row["eps"]), abs=1e-6)
    assert {0.05, 0.1} <= {row["eps"] for row in rows}
    events = EventAccumulator(logger.log_dir).Reload()
    (histogram,) = events.Histograms("val/certified_radius")
    assert histogram.histogram_value.num == 60
    assert histogram.histogram_value.max == pytest.approx(rows[-1]["eps"], rel=1e-5)
    pytest.importorskip("matplotlib")
    assert len(events.Images("val/certified_accuracy")) == 1
    assert trainer.callback_metrics["val/certified_accuracy/eps=0"] == pytest.approx(rows[0]["accuracy"], abs=1e-6)


def test_another_loggers_folder_gets_the_file_too(tmp_path):
    logger = CSVLogger(tmp_path)
    validated(tmp_path, logger)
    assert len(rows_of(tmp_path / "lightning_logs" / "version_0" / "certified_accuracy.csv")) > 100


def test_a_path_of_ones_own_gets_the_file_and_the_picture_and_without_a_logger_there_is_no_other(tmp_path):
    validated(tmp_path, False)
    assert not list(tmp_path.rglob("*.csv"))
    validated(tmp_path, False, curve=tmp_path / "run" / "curve.csv")
    assert len(rows_of(tmp_path / "run" / "curve.csv")) > 100
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_must_be_a_path():
    with pytest.raises(TypeError, match="a path"):
        CertifiedValidation(curve=3)
