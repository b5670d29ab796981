"""Callbacks whose layers are selected by the first forward pass of training."""

import csv

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import LipschitzMixin, LipschitzMonitor, LipschitzPenalty
from lightning_lip.callbacks.lightning import observing
from lightning_lip.callbacks.monitoring.source import HEALTH

STEPS = {"max_epochs": 1, "limit_train_batches": 4, "log_every_n_steps": 1}
NAMES = ["net.0+net.1", "net.3.weight_ih_l0", "net.3.weight_hh_l0", "net.5"]


class First(nn.Module):
    def forward(self, x):
        return x[0]


class Net(lightning.LightningModule):
    """Batch normalisation behind a layer, a recurrent layer, a layer normalisation behind one."""

    def __init__(self, automatic=True):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = automatic
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LSTM(8, 5), First(), nn.Linear(5, 1))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - batch[1]).square().mean() + self.term()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return loss

    def term(self):
        return 0.0

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class WithMixin(LipschitzMixin, Net):
    def term(self):
        return 1e-2 * self.lipschitz_penalty()


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


@pytest.fixture
def train(make_trainer):
    def run(*callbacks, module=None, ckpt_path=None, **settings):
        module = module or Net()
        trainer = make_trainer(lightning, callbacks=callbacks, **(STEPS | settings))
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        return module, trainer

    return run


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_first_step_has_the_penalty_on_what_the_pass_showed(train, tmp_path, automatic, monitor_first):
    penalty, monitor = LipschitzPenalty(1e-2), LipschitzMonitor()
    callbacks = [monitor, penalty] if monitor_first else [penalty, monitor]
    logger = lightning.loggers.CSVLogger(tmp_path)
    module, _ = train(*callbacks, module=Net(automatic), logger=logger)
    assert list(penalty.regularizer.spectral_norms()) == NAMES
    assert penalty._n_steps == 4
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["lipschitz/product"]]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert all(float(row[f"lipschitz/spectral_norm/{name}"]) > 0 for row in rows for name in NAMES)
    assert monitor.watched_operators == penalty.regularizer.operators
    assert "training_step" not in vars(module)
    assert torch.overrides._get_current_function_mode() is None
    # The penalty moved gamma and the recurrent weights.
    plain, _ = train(module=Net(automatic))
    for name in ("net.1.weight", "net.3.weight_hh_l0"):
        assert not torch.equal(module.get_parameter(name), plain.get_parameter(name))


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("with_penalty", [True, False])
def test_the_health_is_that_of_the_layers_that_the_first_pass_showed(train, tmp_path, automatic, with_penalty):
    callbacks = [LipschitzMonitor(), *([LipschitzPenalty(1e-2)] if with_penalty else [])]
    train(*callbacks, module=Net(automatic), logger=lightning.loggers.CSVLogger(tmp_path))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["lipschitz/product"]]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    for kind in HEALTH:
        assert all(float(row[f"lipschitz/{kind}/{name}"]) > 0 for row in rows for name in NAMES)
        assert f"lipschitz/{kind}/net.0" not in rows[0]


def test_a_resumed_history_is_that_of_the_layers_that_the_first_pass_showed(train, tmp_path):
    logging = {"logger": lightning.loggers.CSVLogger(tmp_path)}
    _, trainer = train(LipschitzMonitor(), **logging)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    train(monitor := LipschitzMonitor(), max_epochs=2, ckpt_path=tmp_path / "one.ckpt", **logging)
    steps, norms, *_, first, last = monitor.state_dict()["histories"]["lipschitz"]
    assert steps == list(range(8))
    assert {len(row) for row in norms} == {len(NAMES)}
    assert [first[f"lipschitz/spectral_norm/{name}"] for name in NAMES] == norms[0]
    assert [last[f"lipschitz/spectral_norm/{name}"] for name in NAMES] == norms[-1]


def test_a_monitor_of_its_own_watches_too_and_changes_nothing(train):
    monitor = LipschitzMonitor()
    module, _ = train(monitor)
    assert [op.name for op in monitor.watched_operators] == NAMES
    plain, _ = train()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_later_steps_are_not_watched(train, monkeypatch):
    begun = []
    begin = observing.observation.begin
    monkeypatch.setattr(observing.observation, "begin", lambda model: (begun.append(model), begin(model)))
    train(LipschitzPenalty(), LipschitzMonitor(layers="net"))
    assert len(begun) == 2


def test_resumed_bit_for_bit(train, tmp_path):
    saving = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    whole, _ = train(LipschitzPenalty(1e-2), saving, max_epochs=2, enable_checkpointing=True)
    first = min(tmp_path.glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    resumed, _ = train(penalty := LipschitzPenalty(1e-2), max_epochs=2, ckpt_path=first)
    assert list(penalty.regularizer.spectral_norms()) == NAMES
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_another_fit_of_the_same_model_goes_on(train):
    penalty = LipschitzPenalty(1e-2)
    module, _ = train(penalty)
    vectors = penalty.state_dict()["regularizer"]["vectors"]
    assert set(vectors) == set(NAMES)
    train(penalty, module=module, limit_train_batches=1)
    assert set(penalty.state_dict()["regularizer"]["vectors"]) == set(NAMES)
    assert penalty._n_steps == 5


def test_a_first_step_that_raises_leaves_nothing_behind(train):
    class Fails(Net):
        def term(self):
            raise KeyError("step")

    module = Fails()
    with pytest.raises(KeyError, match="step"):
        train(LipschitzPenalty(), LipschitzMonitor(), module=module)
    assert "training_step" not in vars(module)
    assert torch.overrides._get_current_function_mode() is None
    assert not observing.observation._WATCHED.get(module)


def test_a_first_step_without_a_loss_waits_for_the_next(train):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx else None

    train(penalty := LipschitzPenalty(), module=Skips())
    assert list(penalty.regularizer.spectral_norms()) == NAMES
    assert penalty._n_steps == 3


def test_the_mixin_adopts_at_its_first_penalty(train):
    module, _ = train(module=WithMixin())
    assert list(module.spectral_norms()) == NAMES
    assert not observing.observation._WATCHED.get(module)


def test_a_compiled_module_is_watched_and_compiles(train):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    module = Net()
    module.net[0] = torch.compile(module.net[0], backend=backend)
    train(penalty := LipschitzPenalty(), module=module)
    assert list(penalty.regularizer.spectral_norms()) == NAMES
    assert compiled


class Recurrent(Net):
    """A recurrent layer alone, whose weights only a forward pass shows; the first batch is skipped before that."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LSTM(4, 1), First())

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 0 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")
def test_nothing_is_logged_before_a_layer_is_known(train, tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path)
    train(LipschitzMonitor(), LipschitzPenalty(), module=Recurrent(), logger=logger)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("lipschitz/product")]
    assert rows
    assert all(float(row["lipschitz/spectral_norm/net.0.weight_hh_l0"]) >= 0 for row in rows)
