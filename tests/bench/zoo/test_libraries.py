"""Libraries of models on Lightning, whose trainings get the callbacks and nothing else (`make test-libraries`)."""

import csv
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lip import LipschitzMonitor, LipschitzPenalty


def chemprop(folder):
    """A message-passing network on molecules."""
    pytest.importorskip("chemprop")
    from chemprop import data, models, nn

    points = [data.MoleculeDatapoint.from_smi("C" * n + end, [float(n)]) for n in range(1, 9) for end in ("O", "N")]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=4)
    parts = nn.BondMessagePassing(d_h=16), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=16)
    return models.MPNN(*parts, batch_norm=True), loader


def pytorch_forecasting(folder):
    """A Temporal Fusion Transformer on two series."""
    library = pytest.importorskip("pytorch_forecasting")
    import pandas

    columns = {"series": [str(n // 40) for n in range(80)], "time": [n % 40 for n in range(80)]}
    frame = pandas.DataFrame(columns | {"value": [math.sin(n / 3) for n in range(80)]})
    data = library.TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=8,
        max_prediction_length=4,
        static_categoricals=["series"],
        time_varying_unknown_reals=["value"],
    )
    sizes = {"hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4}
    model = library.TemporalFusionTransformer.from_dataset(data, **sizes)
    return model, data.to_dataloader(train=True, batch_size=8, num_workers=0)


def fit(folder, library, max_steps, checkpoint=None):
    torch.manual_seed(0)
    model, loader = library(folder)
    penalty = LipschitzPenalty()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[penalty, LipschitzMonitor()],
        log_every_n_steps=2,
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # The checkpoints hold the libraries' own classes.
    options = {"ckpt_path": checkpoint, "weights_only": False} if checkpoint else {}
    trainer.fit(model, loader, **options)
    return trainer, penalty


def is_logged(folder):
    """Whether every metrics file there has finite values of the product and the penalty, and a layer's norm."""
    files = list(folder.rglob("metrics.csv"))
    assert files
    for file in files:
        rows = list(csv.DictReader(file.open()))
        for name in ("lipschitz/product", "lipschitz/penalty"):
            values = [float(row[name]) for row in rows if row.get(name)]
            assert values
            assert all(math.isfinite(value) for value in values)
        assert any(name.startswith("lipschitz/spectral_norm/") for name in rows[0])
    return True


@pytest.mark.parametrize("library", [chemprop, pytorch_forecasting])
def test_its_models_train_unmodified_and_resume(tmp_path, library):
    trainer, penalty = fit(tmp_path / "first", library, 6)
    assert is_logged(tmp_path / "first")
    assert penalty.regularizer.coverage.share > 0.5
    path = trainer.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=False)["callbacks"]["LipschitzPenalty"]
    assert state["n_steps"] == 6
    again, resumed = fit(tmp_path / "second", library, 8, path)
    assert again.global_step == 8
    assert resumed.state_dict()["n_steps"] == 8
    assert is_logged(tmp_path / "second")
    assert resumed.regularizer.state_dict()["vectors"].keys() == state["regularizer"]["vectors"].keys()


def test_neuralforecast_trains_unmodified_and_goes_on(tmp_path):
    """It makes the Trainer itself, of `pytorch_lightning`, and copies the model with the callbacks."""
    library = pytest.importorskip("neuralforecast")
    import pandas
    from pytorch_lightning.loggers import CSVLogger

    days = pandas.date_range("2026-01-01", periods=60)
    frames = [{"unique_id": f"{n}", "ds": days, "y": [math.sin(t / 3 + n) for t in range(60)]} for n in range(2)]
    series = pandas.concat([pandas.DataFrame(frame) for frame in frames])
    model = library.models.NHITS(
        h=4,
        input_size=8,
        max_steps=6,
        mlp_units=[[16, 16]] * 3,
        callbacks=[LipschitzPenalty(), LipschitzMonitor()],
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    forecast = library.NeuralForecast(models=[model], freq="D")
    for steps in (6, 12):
        forecast.fit(series)
        penalty = forecast.models[0].trainer_kwargs["callbacks"][0]
        assert penalty.state_dict()["n_steps"] == steps
        assert penalty.regularizer.coverage.share > 0.9
    assert is_logged(tmp_path)
    (checkpoint, *_) = sorted(tmp_path.rglob("*.ckpt"))
    assert torch.load(checkpoint, weights_only=False)["callbacks"]["LipschitzPenalty"]["n_steps"] == 6
    assert len(forecast.predict()) == 8
