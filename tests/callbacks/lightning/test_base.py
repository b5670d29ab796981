"""What all callbacks that select layers have in common."""

import contextlib

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_lip import LipschitzConstraint, LipschitzMonitor, LipschitzPenalty, MaxNorm, SpectralCaps


def constraint(**arguments):
    return LipschitzConstraint(10.0, **arguments)


def caps(**arguments):
    return SpectralCaps(1.0, **arguments)


REPORTING = pytest.mark.parametrize("make", [LipschitzPenalty, LipschitzMonitor, constraint])
"""Those that log a product."""
SELECTING = pytest.mark.parametrize("make", [LipschitzPenalty, LipschitzMonitor, constraint, caps])


@SELECTING
def test_the_name_tells_callbacks_apart(make, make_trainer):
    assert (make().state_key, make().tag) == (type(make()).__name__, "lipschitz")
    assert (make(name="a").state_key, make(name="a").tag) == (f"{type(make()).__name__}[a]", "lipschitz/a")
    assert type("Own", (type(make()),), {}).key == make().key  # a checkpoint serves a user's subclass, too
    make_trainer(lightning, callbacks=[make(), make(name="a"), make(name="b")])
    with pytest.raises(RuntimeError, match="state_key"):
        make_trainer(lightning, callbacks=[make(), make()])


def test_before_training_there_are_no_layers():
    with pytest.raises(RuntimeError, match="no regulariser before that"):
        _ = LipschitzPenalty().regularizer
    with pytest.raises(RuntimeError, match="no projector before that"):
        _ = constraint().projector
    assert constraint().state_dict() == {"n_steps": 0, "projector": None}
    assert LipschitzPenalty().state_dict() == {"n_steps": 0, "optimizer_steps": {}, "regularizer": None}
    assert LipschitzMonitor().state_dict() == {}


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
@pytest.mark.parametrize("make", [LipschitzPenalty, LipschitzMonitor, constraint, lambda: MaxNorm(1.0), caps])
def test_strategies_that_hide_weights_or_gradients_are_refused(fit, make, name):
    # Neither starts on a machine without a GPU; what is asked is the class's name.
    strategy = type(name, (SingleDeviceStrategy,), {})(device="cpu")
    with pytest.raises(RuntimeError, match=f"{type(make()).__name__} does not support {name}"):
        fit(make(), strategy=strategy)


@REPORTING
@pytest.mark.parametrize("interval", [0.25, 3])
def test_a_watched_bound_is_there_at_validations_within_an_epoch(fit, make, interval):
    seen = []

    class Stopping(EarlyStopping):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics[self.monitor]))

    stopping = Stopping("lipschitz/product", patience=100, check_on_train_epoch_end=False)
    fit(make(), stopping, validation=True, val_check_interval=interval)
    assert len(set(seen)) == 4


@SELECTING
def test_layers_that_are_replaced_in_training(fit, make_module, make):
    class Replace(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net[2] = nn.Linear(8, 8)

    module = make_module(lightning)
    with pytest.raises(RuntimeError, match=r": the layers \['net.2'\] are no longer part of the model"):
        fit(make(), Replace(), module=module, max_epochs=2)
    fit(make(), module=module)  # another fit selects anew


@SELECTING
@pytest.mark.parametrize(("convolutions", "fails"), [("spatial", False), ("spatial", True), ("symbol", False)])
def test_no_hook_stays_on_a_convolution(fit, make_module, make, convolutions, fails):
    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert bool(pl_module.net[0]._forward_pre_hooks) == (convolutions == "spatial")
            if fails:
                raise KeyError("stop")

    module = make_module(lightning, net=nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 1)))
    data = torch.utils.data.DataLoader([(torch.ones(2, 1, 6, 6), torch.ones(2, 1))] * 2, batch_size=None)
    with pytest.raises(KeyError, match="stop") if fails else contextlib.nullcontext():
        fit(make(convolutions=convolutions), Look(), module=module, data=data)
    assert not module.net[0]._forward_pre_hooks
    torch.jit.script(module.net)
