"""LipschitzPenalty on real Trainers: the weights must move as if the penalty stood in the loss."""

import contextlib
import copy
import inspect
import math

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_lip import (
    LipschitzConstraint,
    LipschitzMixin,
    LipschitzMonitor,
    LipschitzPenalty,
    LipschitzRegularizer,
    UnsupportedLayerError,
)

COEFFICIENT = 0.05
EPOCHS = 5  # 12 batches each: 60 optimiser steps, 20 with accumulation over 3

# The penalties by autograd through torch's own spectral norm, as a user would write them into a loss.
AUTOGRAD = {
    "product": lambda s: s.prod(),
    "softplus_log": lambda s: torch.log1p(s.prod() / 2.0),
    "hinge_log": lambda s: (s.log().sum() - math.log(2.0)).clamp(min=0).square(),
    "log": lambda s: s.log().sum(),
    "layer_sum": lambda s: s.sum(),
    "layer_sum_squares": lambda s: s.square().sum(),
}


def in_loss(name, coefficient=COEFFICIENT):
    return lambda weights: coefficient * AUTOGRAD[name](torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights]))


def weights_of(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def relative_error(got, want, without):
    """Distance to training with the penalty in the loss, relative to the penalty's own effect."""
    return float((got - want).norm() / (want - without).norm())


@pytest.fixture
def three_ways(make_module, make_trainer, regression_data):
    """Train without a penalty, with it in the loss, and with the callback; return the callback's relative error."""

    def run(package, loss_term, callback, module_settings=None, trainer_settings=None):
        results = []
        for term, callbacks in ((None, []), (loss_term, []), (None, [callback])):
            module = make_module(package, term, **(module_settings or {}))
            settings = {key: v() if callable(v) else v for key, v in (trainer_settings or {}).items()}
            trainer = make_trainer(package, max_epochs=EPOCHS, callbacks=callbacks, **settings)
            trainer.fit(module, regression_data)
            results.append(weights_of(module))
        without, want, got = results
        return relative_error(got, want, without)

    return run


# Blocks of 8 span the layers (8 is the widest), so sigma is exact in every step; what is left is fp32 rounding.
TOLERANCE = 1e-3


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", list(AUTOGRAD))
def test_equals_the_penalty_in_the_loss(three_ways, name, accumulate):
    error = three_ways(
        lightning,
        in_loss(name),
        LipschitzPenalty(COEFFICIENT, name, target=2.0),
        trainer_settings={"accumulate_grad_batches": accumulate},
    )
    assert error <= TOLERANCE


def test_equals_the_penalty_in_the_loss_with_both_packages(three_ways, pl):
    assert three_ways(pl, in_loss("product"), LipschitzPenalty(COEFFICIENT)) <= TOLERANCE


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_the_penalty_in_the_loss_with_clipping(three_ways, algorithm, accumulate):
    settings = {
        "gradient_clip_val": 0.1,
        "gradient_clip_algorithm": algorithm,
        "accumulate_grad_batches": accumulate,
    }
    error = three_ways(lightning, in_loss("product"), LipschitzPenalty(COEFFICIENT), trainer_settings=settings)
    assert error <= TOLERANCE


def test_equals_the_penalty_in_the_loss_in_bf16_mixed(three_ways):
    # The forward pass rounds to bf16 alike in both runs; the penalty itself is fp32 in both.
    error = three_ways(
        lightning, in_loss("product"), LipschitzPenalty(COEFFICIENT), trainer_settings={"precision": "bf16-mixed"}
    )
    assert error <= 0.02


@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_penalty_in_the_loss_with_a_gradient_scaler(three_ways, fused):
    # A fused optimiser unscales inside its step: in the hook its gradients still carry the scale.
    def plugin():
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))

    error = three_ways(
        lightning,
        in_loss("product"),
        LipschitzPenalty(COEFFICIENT),
        module_settings={"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=fused)},
        trainer_settings={"plugins": lambda: plugin()},
    )
    assert error <= 0.02  # fp16 forward passes; without the scale the error would be 1


def test_equals_the_penalty_in_the_loss_with_lbfgs(three_ways):
    # fp64: LBFGS divides differences of gradients, which amplifies rounding.
    error = three_ways(
        lightning,
        in_loss("product"),
        LipschitzPenalty(COEFFICIENT),
        module_settings={"optimizer": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)},
        trainer_settings={"precision": "64-true"},
    )
    assert error <= 1e-6


def test_frozen_layers_count_and_stay(make_module, make_trainer, regression_data):
    module = make_module(lightning)
    module.net[2].weight.requires_grad_(False)
    frozen = module.net[2].weight.clone()
    penalty = LipschitzPenalty(COEFFICIENT)
    make_trainer(lightning, callbacks=[penalty]).fit(module, regression_data)
    assert torch.equal(module.net[2].weight, frozen)
    assert module.net[2].weight.grad is None
    assert list(penalty.regularizer.spectral_norms()) == ["net.0", "net.2", "net.4"]


class TwoNets(lightning.LightningModule):
    """Two networks with an optimiser each in manual optimisation; the second loss sees the first step's weights."""

    def __init__(self, terms=False):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.terms = terms
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def norm(self, *layers):
        return torch.stack([torch.linalg.matrix_norm(layer.weight, 2) for layer in layers]).prod()

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = self.optimizers()
        for optimizer, layers in ((first, [self.a]), (second, [self.b[0], self.b[2]])):
            loss = nn.functional.mse_loss(self.b(self.a(x)), y)
            if self.terms == "each":
                loss = loss + COEFFICIENT * self.norm(*layers)
            elif self.terms == "joint":
                loss = loss + COEFFICIENT * self.norm(self.a, self.b[0], self.b[2])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.a.parameters(), 1e-2), torch.optim.Adam(self.b.parameters(), 1e-2)]


@pytest.mark.parametrize("terms", ["each", "joint"])
def test_several_optimisers(make_trainer, regression_data, terms):
    # "each": a callback per network, as for a GAN; "joint": one callback over both networks' layers.
    callbacks = {
        "each": [
            LipschitzPenalty(COEFFICIENT, layers="a", name="a"),
            LipschitzPenalty(COEFFICIENT, layers="b", name="b"),
        ],
        "joint": [LipschitzPenalty(COEFFICIENT)],
    }[terms]
    results = []
    for term, used in ((False, []), (terms, []), (False, callbacks)):
        module = TwoNets(term)
        make_trainer(lightning, callbacks=used, max_epochs=EPOCHS).fit(module, regression_data)
        results.append(weights_of(module))
    without, want, got = results
    assert relative_error(got, want, without) <= TOLERANCE
    assert all(callback.state_dict()["n_steps"] == 12 * EPOCHS for callback in callbacks)


def test_one_iteration_a_batch_whatever_the_number_of_optimisers(make_trainer, regression_data, monkeypatch):
    advanced = []
    accumulate_ = LipschitzRegularizer.accumulate_

    def recorded(self, scale, advance, parameters):
        advanced.append(advance)
        return accumulate_(self, scale, advance, parameters)

    monkeypatch.setattr(LipschitzRegularizer, "accumulate_", recorded)
    make_trainer(lightning, callbacks=[LipschitzPenalty(COEFFICIENT)]).fit(TwoNets(), regression_data)
    assert advanced == [True, False] * 12


@pytest.mark.parametrize("monitor", [None, "lipschitz/penalty"])
def test_values_are_computed_only_where_somebody_reads_them(
    make_module, make_trainer, regression_data, monkeypatch, monitor
):
    calls = []
    log_sigma = LipschitzRegularizer.log_sigma
    monkeypatch.setattr(LipschitzRegularizer, "log_sigma", lambda self: calls.append(1) or log_sigma(self))
    watching = [] if monitor is None else [lightning.callbacks.EarlyStopping(monitor, patience=99)]
    callbacks = [LipschitzPenalty(COEFFICIENT), *watching]
    trainer = make_trainer(lightning, callbacks=callbacks, logger=False, log_every_n_steps=1)
    trainer.fit(make_module(lightning), regression_data)
    # 12 steps an epoch: without a logger only what watches the penalty reads it at each of them.
    assert len(calls) == (1 if monitor is None else 12)
    assert "lipschitz/penalty" in trainer.callback_metrics


def test_a_step_without_a_backward_pass_is_left_alone(make_module, make_trainer, regression_data):
    module = make_module(lightning)
    before = weights_of(module)
    type(module).training_step = lambda self, batch, batch_idx: None
    make_trainer(lightning, callbacks=[LipschitzPenalty(1.0)]).fit(module, regression_data)
    assert torch.equal(weights_of(module), before)


def test_manual_optimisation_with_a_plain_backward(make_trainer, regression_data):
    # loss.backward() instead of manual_backward: Lightning reports no backward pass at all.
    class Manual(TwoNets):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[1]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.b(batch[0]), batch[1])
            (loss + COEFFICIENT * self.norm(self.b[0], self.b[2]) if self.terms else loss).backward()
            optimizer.step()

    results = []
    for terms, callbacks in ((False, []), (True, []), (False, [LipschitzPenalty(COEFFICIENT, layers="b")])):
        module = Manual(terms)
        make_trainer(lightning, callbacks=callbacks, max_epochs=EPOCHS).fit(module, regression_data)
        results.append(weights_of(module))
    assert relative_error(results[2], results[1], results[0]) <= TOLERANCE


def test_warns_when_no_optimiser_is_stepped_through_lightning(make_trainer, regression_data):
    class Raw(TwoNets):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)[1]
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.b(batch[0]), batch[1]))
            optimizer.step()

    with pytest.warns(UserWarning, match="had no effect in this epoch"):
        make_trainer(lightning, callbacks=[LipschitzPenalty(COEFFICIENT)]).fit(Raw(), regression_data)


def test_every_n_steps_scales_the_coefficient(make_module, make_trainer, regression_data):
    # SGD is linear in the gradient, so the first steps can be replayed by hand.
    module = make_module(lightning, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    seen = []

    class Recorder(LipschitzPenalty):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before = pl_module.net[0].weight.grad.clone()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            added = pl_module.net[0].weight.grad - before
            norm = torch.linalg.matrix_norm(added.double(), 2)
            weights = [pl_module.net[i].weight.detach().double() for i in (0, 2, 4)]
            sigma = torch.stack([torch.linalg.matrix_norm(w, 2) for w in weights])
            seen.append(float(norm / (COEFFICIENT * sigma.prod() / sigma[0])))

    make_trainer(lightning, callbacks=[Recorder(COEFFICIENT, every_n_steps=3)]).fit(module, regression_data)
    assert seen == pytest.approx([3, 0, 0] * 4, rel=1e-4)
    seen.clear()
    make_trainer(lightning, callbacks=[Recorder(COEFFICIENT, warmup_steps=4)]).fit(module, regression_data)
    assert seen == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 9, rel=1e-4)


class TwoNetworks(lightning.LightningModule):
    """Two networks with an optimiser each, the first of which steps every other batch only."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            if index == 0 and batch_idx % 2 == 0:
                continue
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.second(self.first(batch[0])), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), 0.01) for network in (self.first, self.second)]


def test_every_n_steps_counts_the_steps_of_each_optimiser(make_trainer, regression_data, monkeypatch):
    served = []

    def note(self, scale, advance, parameters):
        served.append((len(parameters[0]), scale, advance))
        return add(self, scale, advance, parameters)

    add = LipschitzRegularizer.accumulate_
    monkeypatch.setattr(LipschitzRegularizer, "accumulate_", note)
    penalty = LipschitzPenalty(COEFFICIENT, every_n_steps=2)
    trainer = make_trainer(lightning, callbacks=[penalty])
    trainer.fit(TwoNetworks(), regression_data)
    # The second acts in batches 0, 2, 4, ..., the first, which steps in 1, 3, 5, ..., in 1, 5, 9.
    assert served == [(1, 2.0, True), (4, 2.0, True), (1, 2.0, True)] * 3
    assert penalty.state_dict()["optimizer_steps"] == {0: 6, 1: 12}
    resumed = LipschitzPenalty(COEFFICIENT, every_n_steps=2)
    resumed.load_state_dict(penalty.state_dict())
    served.clear()
    make_trainer(lightning, callbacks=[resumed], limit_train_batches=2).fit(TwoNetworks(), regression_data)
    assert served == [(1, 2.0, True), (4, 2.0, True)]  # the seventh and the thirteenth
    state = penalty.state_dict()
    del state["optimizer_steps"]  # as of before they were counted
    resumed.load_state_dict(state)
    assert resumed.state_dict()["optimizer_steps"] == {0: 12}


def test_optimisers_that_take_the_place_of_others(make_module, make_trainer, regression_data, monkeypatch):
    served = []

    def note(self, scale, advance, parameters):
        served.append([index for index in (0, 2, 4) for p in parameters if p is module.net[index].weight])
        return add(self, scale, advance, parameters)

    class Replace(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.strategy.optimizers = []  # freed first: the next may get its address
            layer = pl_module.net[2 * (trainer.current_epoch % 3)]
            trainer.strategy.optimizers = [torch.optim.SGD(layer.parameters(), 0.01)]

    add = LipschitzRegularizer.accumulate_
    monkeypatch.setattr(LipschitzRegularizer, "accumulate_", note)
    module = make_module(lightning)
    make_trainer(lightning, callbacks=[LipschitzPenalty(), Replace()], max_epochs=6, limit_train_batches=2).fit(
        module, regression_data
    )
    assert served == [[0], [0], [2], [2], [4], [4]] * 2


def fit_in_two_parts(make_trainer, module, data, tmp_path, callbacks):
    """Train for two epochs, then resume in a new Trainer for two more; return the resumed module."""
    checkpoint = tmp_path / "half.ckpt"
    first = make_trainer(lightning, max_epochs=2, callbacks=callbacks())
    first.fit(module(), data)
    first.save_checkpoint(checkpoint)
    torch.load(checkpoint, weights_only=True)
    resumed = module()
    trainer = make_trainer(lightning, max_epochs=4, callbacks=callbacks())
    # Lightning 2.5 does not have the argument.
    restricted = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    trainer.fit(resumed, data, ckpt_path=checkpoint, **restricted)
    return resumed


@pytest.mark.parametrize("block_size", [1, 8])
def test_resumed_equals_uninterrupted_bit_for_bit(make_module, make_trainer, regression_data, tmp_path, block_size):
    def callbacks():
        return [LipschitzPenalty(COEFFICIENT, block_size=block_size, every_n_steps=5, warmup_steps=30)]

    module = make_module(lightning)
    make_trainer(lightning, max_epochs=4, callbacks=callbacks()).fit(module, regression_data)
    resumed = fit_in_two_parts(make_trainer, lambda: make_module(lightning), regression_data, tmp_path, callbacks)
    assert torch.equal(weights_of(module), weights_of(resumed))


def test_a_checkpoint_without_our_state_resumes(make_module, make_trainer, regression_data, tmp_path):
    trainer = make_trainer(lightning)
    trainer.fit(make_module(lightning), regression_data)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    penalty = LipschitzPenalty(COEFFICIENT)
    resumed = make_trainer(lightning, max_epochs=2, callbacks=[penalty])
    resumed.fit(make_module(lightning), regression_data, ckpt_path=tmp_path / "old.ckpt")
    assert penalty.state_dict()["n_steps"] == 12


def test_a_state_of_a_fit_without_steps_is_not_another_models(make_module, make_trainer, regression_data, tmp_path):
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty(COEFFICIENT)])
    trainer.fit(make_module(lightning), regression_data)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    penalty, module = LipschitzPenalty(COEFFICIENT), make_module(lightning)
    trainer = make_trainer(lightning, callbacks=[penalty])
    trainer.fit(module, regression_data, ckpt_path=tmp_path / "done.ckpt")  # no epoch is left
    state = penalty.state_dict()
    assert state["n_steps"] == 12
    assert state["regularizer"]["vectors"]
    more = make_trainer(lightning, callbacks=[copy.deepcopy(penalty)], limit_train_batches=3)
    more.fit(make_module(lightning), regression_data)
    assert more.callbacks[-1].state_dict()["n_steps"] == 15  # a copy has no model: it goes on
    more = make_trainer(lightning, callbacks=[penalty], limit_train_batches=3)
    more.fit(make_module(lightning), regression_data)
    assert penalty.state_dict()["n_steps"] == 3


def test_a_second_fit_goes_on_with_its_vectors(make_module, make_trainer, regression_data):
    penalty, module = LipschitzPenalty(COEFFICIENT, block_size=1), make_module(lightning)
    make_trainer(lightning, callbacks=[penalty]).fit(module, regression_data)
    vectors = penalty.regularizer.state_dict()["vectors"]
    penalty.setup(make_trainer(lightning), module, "fit")
    assert penalty.select_layers(module).state_dict()["vectors"].keys() == vectors.keys()
    penalty.setup(make_trainer(lightning), module, "fit")
    assert penalty.select_layers(make_module(lightning)).state_dict()["vectors"] == {}  # another model starts afresh


@pytest.mark.parametrize("callbacks", [[LipschitzPenalty], [LipschitzPenalty, LipschitzMonitor], [LipschitzMonitor]])
def test_checkpoints_by_steps_see_the_value_of_their_step(
    make_module, make_trainer, regression_data, tmp_path, callbacks
):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lipschitz/product", every_n_train_steps=5, save_top_k=-1)
    callbacks = [*[make() for make in callbacks], checkpoint]
    trainer = make_trainer(lightning, callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    trainer.fit(make_module(lightning), regression_data)
    assert len(checkpoint.best_k_models) == 4  # after steps 5, 10, 15 and 20 of 24; no step is a logging step
    for path, value in checkpoint.best_k_models.items():
        weights = torch.load(path, weights_only=True)["state_dict"]
        product = math.prod(float(torch.linalg.matrix_norm(weights[f"net.{i}.weight"].double(), 2)) for i in (0, 2, 4))
        assert float(value) == pytest.approx(product, rel=1e-3)


@pytest.mark.parametrize("make", [LipschitzPenalty, LipschitzMonitor, lambda: LipschitzConstraint(10.0)])
@pytest.mark.parametrize("interval", [0.25, 3])
def test_a_watched_bound_is_there_at_validations_within_an_epoch(
    make_module, make_trainer, regression_data, make, interval
):
    seen = []

    class Stopping(EarlyStopping):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics[self.monitor]))

    stopping = Stopping("lipschitz/product", patience=100, check_on_train_epoch_end=False)
    trainer = make_trainer(lightning, callbacks=[make(), stopping], val_check_interval=interval)
    trainer.fit(make_module(lightning), regression_data, regression_data)
    assert len(set(seen)) == 4


def test_a_scheduler_of_steps_may_watch_the_bound(make_module, make_trainer, regression_data):
    def optimizer(parameters):
        optimizer = torch.optim.SGD(parameters, 0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)
        watching = {"scheduler": scheduler, "monitor": "lipschitz/product", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": watching}

    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty()])
    trainer.fit(make_module(lightning, optimizer=optimizer), regression_data)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 12


def test_an_unwatched_bound_is_not_computed_between_logging_steps(
    make_module, make_trainer, regression_data, monkeypatch
):
    calls = []
    log_sigma = LipschitzRegularizer.log_sigma
    monkeypatch.setattr(LipschitzRegularizer, "log_sigma", lambda self: calls.append(1) or log_sigma(self))
    stopping = EarlyStopping("lipschitz/product", patience=100)
    callbacks = [LipschitzPenalty(), stopping, ModelCheckpoint(monitor="val_loss", every_n_train_steps=1)]
    trainer = make_trainer(lightning, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(make_module(lightning), regression_data, regression_data)
    assert len(calls) == 1  # at the end of the epoch, for EarlyStopping


@pytest.mark.parametrize("make", [LipschitzPenalty, LipschitzMonitor, lambda: LipschitzConstraint(10.0)])
def test_layers_that_are_replaced_in_training(make_module, make_trainer, regression_data, make):
    class Replace(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net[2] = nn.Linear(8, 8)

    trainer = make_trainer(lightning, callbacks=[make(), Replace()], max_epochs=2)
    module = make_module(lightning)
    with pytest.raises(RuntimeError, match=r"Lipschitz.*: the layers \['net.2'\] are no longer part of the model"):
        trainer.fit(module, regression_data)
    make_trainer(lightning, callbacks=[make()]).fit(module, regression_data)  # another fit selects anew


@pytest.mark.parametrize("make", [LipschitzPenalty, LipschitzMonitor, lambda: LipschitzConstraint(10.0)])
@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_on_a_convolution(make_trainer, make, fails):
    class Images(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 1))

        def training_step(self, batch, batch_idx):
            assert self.net[0]._forward_pre_hooks
            if fails and batch_idx == 1:
                raise KeyError("stop")
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module = Images()
    trainer = make_trainer(lightning, callbacks=[make()])
    with pytest.raises(KeyError, match="stop") if fails else contextlib.nullcontext():
        trainer.fit(module, torch.utils.data.DataLoader([torch.ones(2, 1, 6, 6)] * 2, batch_size=None))
    assert not module.net[0]._forward_pre_hooks
    torch.jit.script(module.net)


def test_logs_for_checkpoints_and_loggers(make_module, make_trainer, regression_data, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lipschitz/product", mode="min", filename="{epoch}")
    trainer = make_trainer(
        lightning,
        callbacks=[LipschitzPenalty(COEFFICIENT), checkpoint],
        enable_checkpointing=True,
        logger=lightning.loggers.CSVLogger(tmp_path),
        log_every_n_steps=4,
        max_epochs=2,
    )
    module = make_module(lightning)
    trainer.fit(module, regression_data, regression_data)
    assert checkpoint.best_model_path
    product = math.prod(float(torch.linalg.matrix_norm(module.net[i].weight.double(), 2)) for i in (0, 2, 4))
    assert float(trainer.callback_metrics["lipschitz/product"]) == pytest.approx(product, rel=1e-5)
    assert float(trainer.callback_metrics["lipschitz/penalty"]) == pytest.approx(COEFFICIENT * product, rel=1e-5)
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lipschitz/product")
    assert sum(1 for line in lines[1:] if line.split(",")[column]) == 6  # 24 steps, every 4th


def test_own_penalty(three_ways):
    callback = LipschitzPenalty(COEFFICIENT, lambda log_sigma, log_bound: log_bound.exp() + log_sigma.exp().sum())
    loss_term = lambda w: in_loss("product")(w) + in_loss("layer_sum")(w)  # noqa: E731
    assert three_ways(lightning, loss_term, callback) <= TOLERANCE


def test_validate_before_fit(make_module, make_trainer, regression_data):
    # validate() runs in inference mode: vectors made there could not be updated later.
    class Module(LipschitzMixin, type(make_module(lightning))):
        def validation_step(self, batch, batch_idx):
            self.log("product", self.lipschitz_bound())

    module = Module()
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty(COEFFICIENT)])
    trainer.validate(module, regression_data, verbose=False)
    trainer.fit(module, regression_data)
    assert float(module.lipschitz_penalty()) > 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"coefficient": -1.0}, "`coefficient` to be a finite number of at least 0, got -1.0"),
        ({"coefficient": math.nan}, "`coefficient`"),
        ({"penalty": "spectral"}, "Unknown penalty 'spectral': expected one of 'product'"),
        ({"penalty": "hinge_log", "target": 0.0}, "`target` to be a positive finite number"),
        ({"block_size": 0}, "`block_size` to be an integer of at least 1, got 0"),
        ({"n_iterations": 1.5}, "`n_iterations`"),
        ({"every_n_steps": 0}, "`every_n_steps`"),
        ({"warmup_steps": -1}, "`warmup_steps` to be an integer of at least 0"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        LipschitzPenalty(**arguments)


def test_no_layer_matches(make_module, make_trainer, regression_data):
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty(layers="encoder.*")])
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no module.*net\.0 \(Linear\)"):
        trainer.fit(make_module(lightning), regression_data)


def test_no_trainable_layer(make_module, make_trainer, regression_data):
    module = make_module(lightning)
    module.net[0].weight.requires_grad_(False)
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty(layers="net.0")])
    with pytest.raises(ValueError, match=r"no trainable layer: \['net.0'\] are all frozen"):
        trainer.fit(module, regression_data)


def test_unknown_layer_is_refused_by_name(make_module, make_trainer, regression_data):
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty()])
    with pytest.raises(UnsupportedLayerError, match=r"net.1 \(LayerNorm\).*\n.*exclude='net.1'"):
        trainer.fit(make_module(lightning, net=net), regression_data)
    penalty = LipschitzPenalty(exclude="net.1")
    make_trainer(lightning, callbacks=[penalty]).fit(make_module(lightning, net=net), regression_data)
    assert list(penalty.regularizer.spectral_norms()) == ["net.0", "net.2"]


def test_lbfgs_with_line_search_is_refused(make_module, make_trainer, regression_data):
    def optimizer(parameters):
        return torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe")

    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty()])
    with pytest.raises(RuntimeError, match=r"LBFGS with a line search.*LipschitzMixin"):
        trainer.fit(make_module(lightning, optimizer=optimizer), regression_data)


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_hide_gradients_are_refused(make_module, make_trainer, regression_data, name):
    # Neither starts on a machine without a GPU; what is asked is the class's name.
    strategy = type(name, (SingleDeviceStrategy,), {})(device="cpu")
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty()], strategy=strategy)
    with pytest.raises(RuntimeError, match=f"LipschitzPenalty does not support {name}"):
        trainer.fit(make_module(lightning), regression_data)


def test_two_callbacks_need_names(make_module, make_trainer, regression_data):
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(lightning, callbacks=[LipschitzPenalty(), LipschitzPenalty()])


def test_regularizer_before_training_is_an_error():
    with pytest.raises(RuntimeError, match="no regulariser before that"):
        _ = LipschitzPenalty().regularizer


def test_hooks_of_a_subclass_may_call_those_of_the_penalty(make_module, make_trainer, regression_data):
    calls = []

    class Own(LipschitzPenalty):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            calls.append(batch_idx)

    penalty = copy.deepcopy(Own(COEFFICIENT))
    make_trainer(lightning, callbacks=[penalty]).fit(make_module(lightning), regression_data)
    assert calls == list(range(12))
