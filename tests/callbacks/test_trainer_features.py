"""What people's Trainers do beside the plain step: the penalty must act as if it stood in the loss, or say why not."""

import math

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from support.trainers import error_to_loss, weights_of, with_backbone
from torch import nn

from lightning_lip import LipschitzMonitor, LipschitzPenalty

COEFFICIENT = 0.05
EPOCHS = 5
DOUBLE = {"max_epochs": EPOCHS, "precision": "64-true"}


def in_loss(weights):
    """The product by autograd through torch's own spectral norm, in fp64."""
    return COEFFICIENT * torch.stack([torch.linalg.matrix_norm(w.double(), 2) for w in weights]).prod()


@pytest.fixture
def compare(make_module, fit):
    """Return the error of training with the callback, first or last among others, in fp64; `override` has methods."""

    def run(others=list, override=None, module_settings=None, callback_first=True, package=lightning, **settings):
        def train(term, penalty):
            module = make_module(package, term, **(module_settings or {}))
            if override is not None:
                module.__class__ = type("Module", (override, type(module)), {})
            callbacks = [*penalty, *others()] if callback_first else [*others(), *penalty]
            return fit(*callbacks, package=package, module=module, **(DOUBLE | settings))[0]

        return error_to_loss(train, in_loss, [LipschitzPenalty(COEFFICIENT)], effect=1e-3)

    return run


# Both runs in fp64, where the blocks of 8 span the layers: what is left is rounding.
TOLERANCE = 1e-6


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimisers_in_double(compare, pl, optimizer):
    assert compare(package=pl, module_settings={"optimizer": lambda p: optimizer(p, lr=1e-2)}) <= TOLERANCE


def test_bf16_true(compare):
    # Weights of 8 bits: in both runs the penalty's gradient is rounded to them.
    assert compare(precision="bf16-true", max_epochs=2) <= 0.5


def test_gradient_accumulation_scheduler(compare):
    assert compare(lambda: [GradientAccumulationScheduler({0: 1, 1: 3, 3: 4})]) <= TOLERANCE


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_in_fp16_skips_the_step_and_the_penalty_with_it(fit, make_module, fused):
    # The scale is too large at first: GradScaler skips steps and halves it. A skipped step leaves the weights alone.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            self.before, self.scale = weights_of(pl_module), scaler.get_scale()

        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((scaler.get_scale() < self.scale, torch.equal(self.before, weights_of(pl_module))))

    module = make_module(lightning, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2, fused=fused))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(Watch(), LipschitzPenalty(COEFFICIENT), module=module, plugins=plugin, max_epochs=2)
    assert any(skipped for skipped, _ in seen)
    assert not all(skipped for skipped, _ in seen)
    assert all(skipped == unchanged for skipped, unchanged in seen)
    assert weights_of(module).isfinite().all()


def test_a_penalty_that_is_not_finite_after_the_first_step_changes_nothing(fit):
    at_first = iter([0.0])
    endless = LipschitzPenalty(1.0, lambda log_sigma, log_bound: log_bound * next(at_first, math.nan))
    assert torch.equal(weights_of(fit()[0]), weights_of(fit(endless)[0]))


def test_skipped_batches(compare):
    # training_step returns None on every third batch, at the end of an epoch too.
    class Skipping:
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 3 == 2 else super().training_step(batch, batch_idx)

    # Without a backward pass the gradients are those of zero_grad: none, so nothing moves, in either run.
    assert compare(override=Skipping) <= TOLERANCE


def test_overridden_optimizer_step(compare):
    # Lightning's documented recipe: warm up the learning rate, step every second batch.
    class Overridden:
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(1.0, (self.trainer.global_step + 1) / 20)
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    assert compare(override=Overridden) <= TOLERANCE


def test_warns_when_optimizer_step_bypasses_lightning(fit, make_module):
    class Bypassing(type(make_module(lightning))):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.optimizer.step()

    with pytest.warns(UserWarning, match="had no effect in this epoch"):
        fit(LipschitzPenalty(COEFFICIENT), module=Bypassing())


def test_stochastic_weight_averaging(compare):
    settings = {"swa_lrs": 5e-3, "swa_epoch_start": 2, "annealing_epochs": 1}
    assert compare(lambda: [StochasticWeightAveraging(**settings)]) <= TOLERANCE


def test_exponential_moving_average(compare):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks", minversion=None)
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    assert compare(lambda: [callbacks.EMAWeightAveraging(decay=0.9)]) <= TOLERANCE


class GradientNorms(lightning.Callback):
    """As people log gradient norms."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(torch.stack([p.grad.norm() for p in pl_module.parameters()]).norm()))


@pytest.mark.parametrize("first", [False, True])
def test_gradient_norm_callbacks_in_either_order(compare, fit, make_module, first):
    assert compare(lambda: [GradientNorms()], callback_first=first, gradient_clip_val=0.5) <= TOLERANCE
    # A callback after ours sees the gradient with the penalty, one before ours without it.
    norms = []
    for term, penalty in ((None, []), (in_loss, []), (None, [LipschitzPenalty(COEFFICIENT)])):
        watch = GradientNorms()
        callbacks = [*penalty, watch] if first else [watch, *penalty]
        fit(*callbacks, module=make_module(lightning, term), precision="64-true", limit_train_batches=1)
        norms.append(watch.norms[0])
    without, with_term, seen = norms
    assert abs(with_term - without) > 1e-4
    assert seen == pytest.approx(with_term if first else without, rel=1e-9)


def test_layers_unfrozen_in_the_middle_of_training(fit, make_module):
    def train(term, callbacks):
        module = with_backbone(make_module(lightning, term))
        start = module.backbone[0].weight.detach().clone()
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_ratio_lr=0.5)
        fit(*callbacks, finetuning, LipschitzMonitor(), module=module, **DOUBLE)
        assert not torch.equal(module.backbone[0].weight, start)
        return module

    assert error_to_loss(train, in_loss, [LipschitzPenalty(COEFFICIENT)]) <= TOLERANCE


class Adversarial(lightning.LightningModule):
    """A GAN as in Lightning's own documentation: manual optimisation, toggled optimisers, accumulation by hand."""

    def __init__(self, term=False, accumulate=1):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.term, self.accumulate = term, accumulate
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0]
        noise = torch.sin(torch.arange(2.0 * len(real), dtype=real.dtype).view(-1, 2) + batch_idx)
        for_generator, for_critic = self.optimizers()
        steps = (batch_idx + 1) % self.accumulate == 0
        self.toggle_optimizer(for_generator)
        self._step(for_generator, -self.critic(self.generator(noise)).tanh().mean(), self.generator, steps)
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_critic)
        fake = self.generator(noise).detach()
        self._step(for_critic, (self.critic(fake) - self.critic(real)).tanh().mean(), self.critic, steps)
        self.untoggle_optimizer(for_critic)

    def _step(self, optimizer, loss, network, steps):
        if self.term and network is self.critic and steps:
            loss = loss + in_loss([layer.weight for layer in (network[0], network[2])])
        self.manual_backward(loss)
        if steps:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.generator, self.critic)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_gan_with_a_penalised_critic(fit, accumulate):
    def train(term, callbacks):
        return fit(*callbacks, module=Adversarial(term, accumulate), **DOUBLE)[0]

    penalty = LipschitzPenalty(COEFFICIENT, layers="critic")
    assert error_to_loss(train, True, [penalty]) <= TOLERANCE
    assert penalty.state_dict()["n_steps"] == EPOCHS * 12 // accumulate
