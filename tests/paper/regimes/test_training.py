"""Single runs on Boston housing."""

import errno
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lip.paper import PaperRegressor
from lightning_lip.paper.data import Dataset, load_boston, split
from lightning_lip.paper.regimes.settings import PENALISED, REGIMES, Run
from lightning_lip.paper.regimes.training import artefacts_of, train
from lightning_lip.paper.settings import validation_key
from lightning_lip.reporting.processes import map_tasks


@pytest.fixture(scope="module")
def boston():
    return load_boston()


def quick_run(regime, **changes):
    penalty = {"n_norms": 3, "coefficient": 0.1} if regime in PENALISED else {}
    return replace(Run(regime, 0, epochs=2, **penalty), **changes)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_run_is_repeatable_and_logging_does_not_change_it(boston, tmp_path, regime):
    run = quick_run(regime)
    plain = train(run, boston)
    logged = train(run, boston, str(tmp_path))
    assert plain == logged
    assert {len(series) for series in plain.history.values()} == {2}
    assert plain.n_clipped == 0
    model = PaperRegressor.load_from_checkpoint(tmp_path / artefacts_of(run)["checkpoint"], map_location="cpu")
    norms = [torch.linalg.svdvals(m.weight.detach().double())[0].item() for m in model.net[::2]]
    assert plain.sigmas == pytest.approx(norms, rel=1e-12)
    parts = split(boston, 0)
    with torch.no_grad():
        predictions = model(torch.as_tensor(parts.validation_inputs, dtype=torch.float32))[:, 0]
    clean = np.abs(predictions.numpy() - parts.validation_target).mean()
    assert plain.final(validation_key(0.0)) == pytest.approx(clean, rel=1e-5)


def test_a_logged_run_leaves_one_tensorboard_log_with_the_norms(boston, tmp_path):
    run = quick_run("product", epochs=20)
    for _ in range(2):
        train(run, boston, str(tmp_path))
    folder = tmp_path / artefacts_of(run)["tensorboard"]
    assert len(list(folder.glob("events.*"))) == 1  # the second run replaced the first
    log = EventAccumulator(str(folder), {"images": 0}).Reload()
    assert len(log.Images("lipschitz/spectral_norms")) == 10  # of 20 epochs
    tags = set(log.Tags()["scalars"])
    assert {"train/mae", "val/noisy_mae/eta=0.6", "lipschitz/product"} <= tags
    assert {f"lipschitz/spectral_norm/net.{layer}" for layer in (0, 2, 4)} <= tags


def test_a_full_disk_leaves_the_earlier_checkpoint(boston, tmp_path, monkeypatch):
    def fill(trainer, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    run = quick_run("none", epochs=1)
    train(run, boston, str(tmp_path))
    checkpoint = tmp_path / artefacts_of(run)["checkpoint"]
    before = checkpoint.read_bytes()
    monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", fill)
    with pytest.raises(OSError, match="No space left"):
        train(run, boston, str(tmp_path))
    assert checkpoint.read_bytes() == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_the_regimes_do_what_they_are_named_for(boston):
    free = train(quick_run("none", epochs=4), boston)
    product = train(quick_run("product", epochs=4, coefficient=50.0), boston)
    layer = train(quick_run("layer", epochs=4, coefficient=50.0), boston)
    for penalised in (product, layer):
        assert np.prod(penalised.sigmas[:3]) < 0.8 * np.prod(free.sigmas[:3])
    assert product.sigmas != layer.sigmas
    four = train(quick_run("product", epochs=4, coefficient=50.0, n_norms=4), boston)
    assert four.sigmas[3] < product.sigmas[3]


def test_max_norm_counts_what_it_rescales(boston, monkeypatch):
    monkeypatch.setattr("lightning_lip.paper.regimes.training.MAX_NORM", 0.5)
    result = train(quick_run("maxnorm"), boston)
    assert result.n_clipped > 0
    assert result.largest_unit_norm <= 0.5 * (1 + 1e-6)


def test_a_training_that_diverges_is_an_error(boston):
    huge = Dataset(boston.inputs, boston.target * 1e30)  # its square overflows float32
    with pytest.raises(FloatingPointError, match=r"regime 'none', seed 0 .*not finite"):
        train(quick_run("none"), huge)


def test_one_process_or_two_give_the_same_records_in_the_order_of_the_runs(boston):
    runs = [quick_run(regime, epochs=1, seed=seed) for seed in (0, 1) for regime in ("product", "none")]
    in_one: list[Run] = []
    in_two: list[Run] = []
    task = partial(train, data=boston)
    assert map_tasks(task, runs, 1, lambda run, _: in_one.append(run)) == map_tasks(
        task, runs, 2, lambda run, _: in_two.append(run)
    )
    assert in_one == runs
    assert sorted(in_two, key=str) == sorted(runs, key=str)  # as they end, in any order
