"""What would go wrong without a word in training is told, or is right."""

import math

import lightning.pytorch as lightning
import pytest
import torch
from support.trainers import svd_norms
from torch import nn

from lightning_lip import (
    CertifiedValidation,
    LipschitzConstraint,
    LipschitzPenalty,
    LipschitzProjector,
    LipschitzRegularizer,
)


class TwoOptimisers(lightning.LightningModule):
    """A layer with an optimiser of its own; in the second epoch another parameter takes the place of its weight."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(0 * self.second(self.first(batch[0])).sum())
            optimizer.step()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.first.weight = nn.Parameter(self.first.weight.detach().clone())
            self.trainer.optimizers[0].param_groups[0]["params"][0] = self.first.weight

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.first, self.second)]


def test_a_parameter_that_takes_anothers_place_is_penalised(fit):
    module = TwoOptimisers()
    norms = []

    class Watch(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            norms.append(svd_norms(pl_module)[0])

    fit(LipschitzPenalty(0.1), Watch(), module=module, max_epochs=3)
    assert norms[1] < 0.99 * norms[0]
    assert norms[2] < 0.99 * norms[1]


def test_an_optimiser_of_an_attack_does_not_count(fit, make_module):
    module = make_module(lightning)
    step = module.training_step

    def attacked(batch, batch_idx):
        shift = torch.zeros_like(batch[0], requires_grad=True)
        attack = torch.optim.SGD([shift], 0.1, maximize=True)
        if batch_idx % 4:  # the trainer's steps every fourth batch only
            for _ in range(3):
                attack.zero_grad()
                step((batch[0] + shift, batch[1]), batch_idx).backward(inputs=[shift])
                attack.step()
        return step((batch[0] + shift.detach(), batch[1]), batch_idx)

    module.training_step = attacked
    constraint = LipschitzConstraint(0.5, initial_target=2.0, tighten_steps=100)
    fit(constraint, module=module, accumulate_grad_batches=4)
    assert constraint.state_dict()["n_steps"] == 3


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x, y: (x, y[:, 0]), r"target's shape"),
        (lambda x, y: (x * math.nan, y), "`inputs` without NaN and infinity"),
        (lambda x, y: (x, y / 0), "`target` without NaN and infinity"),
        (lambda x, y: {"x": x, "y": y}, "got a dict"),
    ],
)
def test_a_validation_that_cannot_be_certified_fails_before_training(fit, make_module, regression_data, spoil, said):
    module = make_module(lightning)
    module.training_step = lambda *_: pytest.fail("it trained first")
    x, y = regression_data.dataset.tensors
    batches = torch.utils.data.DataLoader([spoil(x[:8], y[:8])], batch_size=None)
    with pytest.raises((TypeError, ValueError), match=said):
        fit(CertifiedValidation(task="regression"), module=module, validation=batches)


def test_the_sanity_check_logs_nothing_and_moves_no_random_number(fit, make_module):
    weights = []
    for n_batches in (0, 2):
        torch.manual_seed(3)
        module, trainer = fit(
            CertifiedValidation(task="regression"), validation=True, num_sanity_val_steps=n_batches, max_epochs=1
        )
        weights.append([p.detach().clone() for p in module.parameters()] + [torch.rand(3)])
        assert "lipschitz/certified" in trainer.callback_metrics
    assert all(map(torch.equal, *weights))


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))


def test_a_loaded_block_of_zeros_starts_afresh():
    model = network()
    for core, key in ((LipschitzRegularizer(model, 1.0), "vectors"), (LipschitzProjector(model, 100.0), "blocks")):
        (core.add_grad_ if key == "vectors" else core.step)()
        state = core.state_dict()
        state[key]["0"].zero_()

        def norms(core=core, key=key, state=state):
            core.load_state_dict(state)
            return core.spectral_norms() if key == "vectors" else core.step().norms

        with pytest.warns(UserWarning, match=r"layer '0' .*not all zero: its iteration starts afresh"):
            found = norms()
        assert float(found["0"]) == pytest.approx(svd_norms(model)[0], rel=1e-3)
