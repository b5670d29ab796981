"""LipschitzPenalty on real Trainers: the weights must move as if the penalty stood in the loss."""

import copy
import math
import re
import warnings

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support.trainers import TwoNets, error_to_loss, svd_norms, weights_of
from torch import nn

from lightning_lip import (
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


@pytest.fixture
def error(make_module, fit):
    """Return the error of training with the callback, by default of a small coefficient."""

    def run(term=None, callback=None, package=lightning, module_settings=None, plugins=None, **settings):
        def train(used, callbacks):
            module = make_module(package, used, **(module_settings or {}))
            more = {} if plugins is None else {"plugins": plugins()}
            return fit(*callbacks, package=package, module=module, max_epochs=EPOCHS, **settings, **more)[0]

        return error_to_loss(train, term or in_loss("product"), [callback or LipschitzPenalty(COEFFICIENT)])

    return run


@pytest.fixture
def served(monkeypatch):
    """Return what is noted of each gradient that is added: its scale, whether vectors advance, and the parameters."""
    noted = []
    add = LipschitzRegularizer.accumulate_
    monkeypatch.setattr(
        LipschitzRegularizer, "accumulate_", lambda self, *arguments: noted.append(arguments) or add(self, *arguments)
    )
    return noted


@pytest.fixture
def reads(monkeypatch):
    """Return a list that grows by one with each reading of the norms."""
    noted = []
    log_sigma = LipschitzRegularizer.log_sigma
    monkeypatch.setattr(LipschitzRegularizer, "log_sigma", lambda self: noted.append(1) or log_sigma(self))
    return noted


# Blocks of 8 span the layers (8 is the widest), so sigma is exact in every step; what is left is fp32 rounding.
TOLERANCE = 1e-3


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", list(AUTOGRAD))
def test_equals_the_penalty_in_the_loss(error, name, accumulate):
    callback = LipschitzPenalty(COEFFICIENT, name, target=2.0)
    assert error(in_loss(name), callback, accumulate_grad_batches=accumulate) <= TOLERANCE


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_the_penalty_in_the_loss_with_clipping(error, algorithm, accumulate):
    clipping = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    assert error(accumulate_grad_batches=accumulate, **clipping) <= TOLERANCE


def test_equals_the_penalty_in_the_loss_in_bf16_mixed(error):
    # The forward pass rounds to bf16 alike in both runs; the penalty itself is fp32 in both.
    assert error(precision="bf16-mixed") <= 0.02


@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_penalty_in_the_loss_with_a_gradient_scaler(error, fused):
    # A fused optimiser unscales inside its step: in the hook its gradients still carry the scale.
    def plugin():
        return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))

    adam = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=fused)}
    # fp16 forward passes; without the scale the error would be 1.
    assert error(module_settings=adam, plugins=plugin) <= 0.02


def test_equals_the_penalty_in_the_loss_with_lbfgs(error):
    # fp64: LBFGS divides differences of gradients, which amplifies rounding.
    lbfgs = {"optimizer": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)}
    assert error(module_settings=lbfgs, precision="64-true") <= 1e-6


def test_frozen_layers_count_and_stay(fit, make_module):
    module = make_module(lightning)
    module.net[2].weight.requires_grad_(False)
    frozen = module.net[2].weight.clone()
    fit(penalty := LipschitzPenalty(COEFFICIENT), module=module)
    assert torch.equal(module.net[2].weight, frozen)
    assert module.net[2].weight.grad is None
    assert list(penalty.regularizer.spectral_norms()) == ["net.0", "net.2", "net.4"]


@pytest.mark.parametrize(("terms", "names"), [("each", ["a", "b"]), ("joint", [None])])
def test_several_optimisers(fit, terms, names):
    # "each": a callback per network, as for a GAN; "joint": one callback over both networks' layers.
    callbacks = [LipschitzPenalty(COEFFICIENT, layers=name, name=name) for name in names]

    def train(term, used):
        return fit(*used, module=TwoNets(COEFFICIENT, term), max_epochs=EPOCHS)[0]

    assert error_to_loss(train, terms, callbacks) <= TOLERANCE
    assert all(callback.state_dict()["n_steps"] == 12 * EPOCHS for callback in callbacks)


def test_one_iteration_a_batch_whatever_the_number_of_optimisers(fit, served):
    fit(LipschitzPenalty(COEFFICIENT), module=TwoNets())
    assert [advance for _, advance, _ in served] == [True, False] * 12


@pytest.mark.parametrize("monitor", [None, "lipschitz/penalty"])
def test_values_are_computed_only_where_somebody_reads_them(fit, reads, monitor):
    watching = [] if monitor is None else [EarlyStopping(monitor, patience=99)]
    _, trainer = fit(LipschitzPenalty(COEFFICIENT), *watching, log_every_n_steps=1)
    # 12 steps an epoch: without a logger only what watches the penalty reads it at each of them.
    assert len(reads) == (1 if monitor is None else 12)
    assert "lipschitz/penalty" in trainer.callback_metrics


def test_a_step_without_a_backward_pass_is_left_alone(fit, make_module):
    module = make_module(lightning)
    before = weights_of(module)
    type(module).training_step = lambda self, batch, batch_idx: None
    fit(LipschitzPenalty(1.0), module=module)
    assert torch.equal(weights_of(module), before)


def test_manual_optimisation_with_a_plain_backward(fit):
    # loss.backward() instead of manual_backward: Lightning reports no backward pass at all.
    class Manual(TwoNets):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[1]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.b(batch[0]), batch[1])
            (loss + self.coefficient * self.norm(self.b[0], self.b[2]) if self.terms else loss).backward()
            optimizer.step()

    def train(term, used):
        return fit(*used, module=Manual(COEFFICIENT, term), max_epochs=EPOCHS)[0]

    assert error_to_loss(train, True, [LipschitzPenalty(COEFFICIENT, layers="b")]) <= TOLERANCE


def test_warns_when_no_optimiser_is_stepped_through_lightning(fit):
    class Raw(TwoNets):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)[1]
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.b(batch[0]), batch[1]))
            optimizer.step()

    with pytest.warns(UserWarning, match="had no effect in this epoch"):
        fit(LipschitzPenalty(COEFFICIENT), module=Raw())


def test_every_n_steps_scales_the_coefficient(fit, make_module):
    # SGD is linear in the gradient, so the first steps can be replayed by hand.
    module = make_module(lightning, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    seen = []

    class Recorder(LipschitzPenalty):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            before = pl_module.net[0].weight.grad.clone()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            added = pl_module.net[0].weight.grad - before
            norm = float(torch.linalg.matrix_norm(added.double(), 2))
            sigma = svd_norms(pl_module)
            seen.append(norm / (COEFFICIENT * math.prod(sigma[1:])))

    fit(Recorder(COEFFICIENT, every_n_steps=3), module=module)
    assert seen == pytest.approx([3, 0, 0] * 4, rel=1e-4)
    seen.clear()
    fit(Recorder(COEFFICIENT, warmup_steps=4), module=module)
    assert seen == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 9, rel=1e-4)


@pytest.mark.parametrize("knee", [100.0, None])
def test_a_large_product_does_not_destroy_a_training_unless_it_is_plain(fit, make_module, knee):
    torch.manual_seed(0)
    layers = [layer for n in (4, 32, 32, 32, 32) for layer in (nn.Linear(n, 32), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(32, 1))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_(8 / torch.linalg.matrix_norm(layer.weight, 2))  # a product of 3e5

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=10.0)

    def loss(output, target):  # small, so that what moves the weights is the penalty
        return 1e-9 * nn.functional.mse_loss(output, target)

    penalty = LipschitzPenalty() if knee else LipschitzPenalty(knee=None)
    module = make_module(lightning, optimizer=sgd, net=net, loss=loss)
    before = math.prod(svd_norms(module))
    fit(penalty, module=module)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert before > 1e4
    if knee is None:
        assert not weights.norm() < 1e3
    else:
        assert weights.isfinite().all()
        assert math.prod(svd_norms(module)) < before


SCALE = "penalty's gradient"


def told_of_scale(record):
    return [str(w.message) for w in record if SCALE in str(w.message)]


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 100}, {"every_n_steps": 5}], ids=str)
def test_a_penalty_out_of_scale_is_told_once_with_a_coefficient_to_try(
    fit, make_module, regression_data, served, options
):
    module = make_module(lightning)
    x, y = next(iter(regression_data))
    nn.functional.mse_loss(module(x), y).backward()
    loss = math.hypot(*(layer.weight.grad.norm() for layer in module.net[::2]))
    sigma = svd_norms(module)
    true = 100 * math.hypot(*(math.prod(sigma) / s for s in sigma)) / loss
    module.zero_grad()
    with pytest.warns(UserWarning, match=SCALE) as record:
        fit(LipschitzPenalty(100.0, **options), module=module, max_epochs=2)
    (told,) = told_of_scale(record)
    assert len(served) > 2
    words = r"LipschitzPenalty\(100\): At .* is ([\d.e+]+) times the .* Try coefficient=([\d.e-]+), .*"
    ratio, tried = map(float, re.fullmatch(words, told).groups())
    assert ratio == pytest.approx(true, rel=0.05)  # whatever the warm-up and the steps left out
    assert 0.015 < true * tried / 100 < 0.06
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fit(LipschitzPenalty(tried, **options))
        fit(LipschitzPenalty())
    assert not told_of_scale(record)


def test_with_a_head_that_begins_at_zero_the_scale_is_compared_once_it_moves(fit, make_module):
    """The product is zero at the first step, and its gradient steep at the second."""
    module = make_module(lightning, optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-4))
    nn.init.zeros_(module.net[-1].weight)
    with pytest.warns(UserWarning, match=SCALE) as record:
        fit(LipschitzPenalty(100.0), module=module, max_epochs=3)
    assert len(told_of_scale(record)) == 1


def test_a_training_that_goes_on_is_not_compared_again(fit, tmp_path):
    penalty = LipschitzPenalty(100.0)
    with pytest.warns(UserWarning, match=SCALE):
        _, trainer = fit(penalty)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for resumed, path in ((penalty, None), (LipschitzPenalty(100.0), tmp_path / "half.ckpt")):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            fit(resumed, module=trainer.lightning_module, max_epochs=2, ckpt_path=path)
        assert not told_of_scale(record)
    with pytest.warns(UserWarning, match=SCALE):
        fit(penalty)  # another model


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_is_compared_at_the_first_finite_step(fit, make_module, fused):
    def ratio(**settings):
        module = make_module(lightning, optimizer=lambda parameters: torch.optim.SGD(parameters, 1e-9, fused=fused))
        with pytest.warns(UserWarning, match=SCALE) as record:
            fit(LipschitzPenalty(100.0), module=module, **settings)
        (told,) = told_of_scale(record)
        return float(re.search(r"is ([\d.e+]+) times", told)[1])

    # The scale overflows in the first steps, which are skipped.
    plugins = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**30))
    got = ratio(plugins=plugins, max_epochs=30, limit_train_batches=1)
    assert plugins.scaler.get_scale() < 2.0**29
    assert got == pytest.approx(ratio(), rel=0.1)


class TwoNetworks(TwoNets):
    """The first optimiser steps every other batch only."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers()[1 - batch_idx % 2 :]:
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.b(self.a(batch[0])), batch[1]))
            optimizer.step()


def test_every_n_steps_counts_the_steps_of_each_optimiser(fit, served):
    def fitted(penalty, **settings):
        served.clear()
        fit(penalty, module=TwoNetworks(), **settings)
        return [(len(parameters[0]), scale, advance) for scale, advance, parameters in served]

    penalty = LipschitzPenalty(COEFFICIENT, every_n_steps=2)
    # The second, whose first layer has 6 rows, acts in batches 0, 2, 4, ..., the first, which steps in 1, 3, 5, ..., in
    # 1, 5, 9.
    assert fitted(penalty) == [(6, 2.0, True), (4, 2.0, True), (6, 2.0, True)] * 3
    assert penalty.state_dict()["optimizer_steps"] == {0: 6, 1: 12}
    resumed = LipschitzPenalty(COEFFICIENT, every_n_steps=2)
    resumed.load_state_dict(penalty.state_dict())
    # The seventh and the thirteenth.
    assert fitted(resumed, limit_train_batches=2) == [(6, 2.0, True), (4, 2.0, True)]
    state = penalty.state_dict()
    del state["optimizer_steps"]  # as of before they were counted
    resumed.load_state_dict(state)
    assert resumed.state_dict()["optimizer_steps"] == {0: 12}


def test_optimisers_that_take_the_place_of_others(fit, served):
    class Replace(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.strategy.optimizers = []  # freed first: the next may get its address
            layer = pl_module.net[2 * (trainer.current_epoch % 3)]
            trainer.strategy.optimizers = [torch.optim.SGD(layer.parameters(), 0.01)]

    module, _ = fit(LipschitzPenalty(), Replace(), max_epochs=6, limit_train_batches=2)
    layers = [[i for i in (0, 2, 4) for p in parameters if p is module.net[i].weight] for _, _, parameters in served]
    assert layers == [[0], [0], [2], [2], [4], [4]] * 2


@pytest.mark.parametrize("block_size", [1, 8])
def test_resumed_equals_uninterrupted_bit_for_bit(fit, tmp_path, block_size):
    def run(epochs, ckpt_path=None):
        penalty = LipschitzPenalty(COEFFICIENT, block_size=block_size, every_n_steps=5, warmup_steps=30)
        return fit(penalty, max_epochs=epochs, ckpt_path=ckpt_path)

    run(2)[1].save_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(weights_of(run(4)[0]), weights_of(run(4, tmp_path / "half.ckpt")[0]))


def test_a_state_of_a_fit_without_steps_is_not_another_models(fit, tmp_path):
    fit(LipschitzPenalty(COEFFICIENT))[1].save_checkpoint(tmp_path / "done.ckpt")
    fit(penalty := LipschitzPenalty(COEFFICIENT), ckpt_path=tmp_path / "done.ckpt")  # no epoch is left
    state = penalty.state_dict()
    assert state["n_steps"] == 12
    assert state["regularizer"]["vectors"]
    fit(copied := copy.deepcopy(penalty), limit_train_batches=3)
    assert copied.state_dict()["n_steps"] == 15  # a copy has no model: it goes on
    fit(penalty, limit_train_batches=3)
    assert penalty.state_dict()["n_steps"] == 3


def test_a_second_fit_goes_on_with_its_vectors(fit, make_module, make_trainer):
    module, _ = fit(penalty := LipschitzPenalty(COEFFICIENT, block_size=1))
    vectors = penalty.regularizer.state_dict()["vectors"]
    penalty.setup(make_trainer(lightning), module, "fit")
    assert penalty.select_layers(module).state_dict()["vectors"].keys() == vectors.keys()
    penalty.setup(make_trainer(lightning), module, "fit")
    assert penalty.select_layers(make_module(lightning)).state_dict()["vectors"] == {}  # another model starts afresh


@pytest.mark.parametrize("callbacks", [[LipschitzPenalty], [LipschitzPenalty, LipschitzMonitor], [LipschitzMonitor]])
def test_checkpoints_by_steps_see_the_value_of_their_step(fit, tmp_path, callbacks):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lipschitz/product", every_n_train_steps=5, save_top_k=-1)
    module, _ = fit(*[make() for make in callbacks], checkpoint, enable_checkpointing=True, max_epochs=2)
    assert len(checkpoint.best_k_models) == 4  # after steps 5, 10, 15 and 20 of 24; no step is a logging step
    for path, value in checkpoint.best_k_models.items():
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert float(value) == pytest.approx(math.prod(svd_norms(module)), rel=1e-3)


def test_a_scheduler_of_steps_may_watch_the_bound(fit, make_module):
    def optimizer(parameters):
        optimizer = torch.optim.SGD(parameters, 0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100)
        watching = {"scheduler": scheduler, "monitor": "lipschitz/product", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": watching}

    _, trainer = fit(LipschitzPenalty(), module=make_module(lightning, optimizer=optimizer))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 12


def test_an_unwatched_bound_is_not_computed_between_logging_steps(fit, reads):
    watching = [
        EarlyStopping("lipschitz/product", patience=100),
        ModelCheckpoint(monitor="val_loss", every_n_train_steps=1),
    ]
    fit(LipschitzPenalty(), *watching, validation=True, enable_checkpointing=True)
    assert len(reads) == 1  # at the end of the epoch, for EarlyStopping


def test_own_penalty(error):
    callback = LipschitzPenalty(COEFFICIENT, lambda log_sigma, log_bound: log_bound.exp() + log_sigma.exp().sum())
    assert error(lambda w: in_loss("product")(w) + in_loss("layer_sum")(w), callback) <= TOLERANCE


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


def test_no_layer_matches(fit):
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no module.*net\.0 \(Linear\)"):
        fit(LipschitzPenalty(layers="encoder.*"))


def test_no_trainable_layer(fit, make_module):
    module = make_module(lightning)
    module.net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable layer: \['net.0'\] are all frozen"):
        fit(LipschitzPenalty(layers="net.0"), module=module)


def test_unknown_layer_is_refused_by_name(fit, make_module):
    module = make_module(lightning, net=nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 1)))
    for strict in ({"unknown": "refuse"}, {"layers": ["net.0", "net.1"]}):
        with pytest.raises(UnsupportedLayerError, match=r"net.1 \(PReLU\).*\n.*exclude='net.1'"):
            fit(LipschitzPenalty(**strict), module=module)
    fit(penalty := LipschitzPenalty(exclude="net.1"), module=module)
    assert list(penalty.regularizer.spectral_norms()) == ["net.0", "net.2"]


def test_lbfgs_with_line_search_is_refused(fit, make_module):
    module = make_module(lightning, optimizer=lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"))
    with pytest.raises(RuntimeError, match=r"LBFGS with a line search.*LipschitzMixin"):
        fit(LipschitzPenalty(), module=module)


def test_hooks_of_a_subclass_may_call_those_of_the_penalty(fit):
    calls = []

    class Own(LipschitzPenalty):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            calls.append(batch_idx)

    fit(copy.deepcopy(Own(COEFFICIENT)))
    assert calls == list(range(12))
