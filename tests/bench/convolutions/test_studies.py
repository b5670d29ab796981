"""The studies of convolutions write whole tables, go on after an interrupt, and measure what they say."""

import csv
from functools import partial

import pytest
import torch
from torch import nn

from lightning_lip.bench.contenders import models
from lightning_lip.bench.convolutions import cost, normalisation, tracking, training

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(
        cost, "MODELS", {"one": partial(models.vgg, width=2), "two": partial(models.mobilenet, width=2)}
    )
    monkeypatch.setitem(cost.MODELS, "ResNet-18", partial(models.resnet18, width=2))
    monkeypatch.setattr(cost, "PIXELS", (8, 16))
    monkeypatch.setattr(cost, "BATCH", 2)
    small = partial(models.resnet18, width=4)
    monkeypatch.setattr(tracking, "resnet18", small)
    monkeypatch.setattr(tracking, "WIDTHS", (4, 8, 16, 32))
    monkeypatch.setattr(normalisation, "resnet18", lambda width: models.vgg(width=2))
    monkeypatch.setattr(normalisation, "OPTIMISERS", {"SGD": normalisation.OPTIMISERS["SGD"]})
    monkeypatch.setattr(training, "vgg", partial(models.vgg, width=2))


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


@pytest.mark.parametrize(
    ("study", "name", "work", "n_rows"),
    [
        (cost, "convolutions", "timed", 3 * 11 + 2 * 2),
        (tracking, "symbol_tracking", "train", 4),
        (training, "symbol_training", "train", 5),
        (normalisation, "normalisation", "train", 4),
    ],
)
def test_a_study_goes_on_and_writes_its_table(tmp_path, monkeypatch, capsys, study, name, work, n_rows):
    do, calls = getattr(study, work), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return do(*arguments)

    monkeypatch.setattr(study, work, interrupted)
    options = ["--quick", "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        if study is not tracking:  # which has one task
            with pytest.raises(KeyboardInterrupt):
                study.main(options)
            assert not (tmp_path / f"{name}.csv").exists()
        study.main(options)
    finally:
        torch.set_num_threads(threads)
    assert len({repr(call) for call in calls[:-1]}) >= len(calls) - 2, "what was finished is not done again"
    assert len(rows_of(tmp_path / f"{name}.csv")) == n_rows
    assert list(tmp_path.glob("*.partial*")) == []
    assert not study.__name__.endswith("cost") or (tmp_path / "convolutions.png").stat().st_size > 10_000


def test_the_truth_of_the_tracking_is_that_of_a_dense_grid():
    kernel = torch.randn(8, 8, 3, 3)
    sigma, state = tracking.truth(kernel, None)
    assert 0.97 < float(tracking.on_grid(kernel) / sigma) < 1 + 1e-5
    assert float(tracking.truth(kernel, state)[0] / sigma) == pytest.approx(1, abs=1e-5)


def test_tracked_errors_fall_with_waves():
    few, many = (tracking.train("SGD", waves, iterations, 3) for waves, iterations in ((4, 1), (12, 4)))
    assert sum(r.mean for r in many) < sum(r.mean for r in few)
    assert all(-1e-5 < r.median < 0.2 for r in (*few, *many))


def test_models_have_the_layers_that_their_names_say():
    kinds = [m for m in models.vgg11(width=2).modules() if isinstance(m, nn.Conv2d)]
    assert len(kinds) == 8
    depthwise = [m for m in models.mobilenet(width=2).modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 8
