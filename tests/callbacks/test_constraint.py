"""LipschitzConstraint on real Trainers: the budget holds in training, and certifiably in every checkpoint."""

import copy
import inspect
import math
import pickle
import subprocess
import sys

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip import LipschitzConstraint, LipschitzMonitor, LipschitzPenalty, UnsupportedLayerError, certify
from lightning_lip.certificates.interval import certified_matrix_norm

TARGET = 0.5  # the initial product of `make_module` is 1.0, and training raises it


def certified(state_dict):
    """The certified product of all matrices of a checkpoint."""
    return math.prod(certified_matrix_norm(w) for key, w in state_dict.items() if w.dim() == 2)


def product(module):
    matrices = [p.detach().double() for p in module.parameters() if p.dim() == 2]
    return math.prod(float(torch.linalg.svdvals(w)[0]) for w in matrices)


def weights_of(module):
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


class Watch(lightning.Callback):
    """Notes the true product after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(product(pl_module))


def test_holds_after_every_step_and_certifiably_at_the_end(pl, make_module, make_trainer, regression_data):
    watch = Watch()
    module = make_module(pl)
    make_trainer(pl, callbacks=[LipschitzConstraint(TARGET), watch], max_epochs=3).fit(module, regression_data)
    assert len(watch.seen) == 36
    assert max(watch.seen) <= TARGET * (1 + 1e-4)
    assert max(watch.seen) >= TARGET * (1 - 1e-2)
    assert certified(module.state_dict()) <= TARGET
    assert not module._state_dict_pre_hooks


def test_feasible_weights_stay_bit_for_bit(make_module, make_trainer, regression_data):
    results = []
    for callbacks in ([], [LipschitzConstraint(1e3)]):
        module = make_module(lightning)
        make_trainer(lightning, callbacks=callbacks, max_epochs=2).fit(module, regression_data)
        results.append(weights_of(module))
    assert torch.equal(*results)


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_is_certified(pl, make_module, make_trainer, regression_data, tmp_path, weights_only):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():  # what training may do to the weights after the projection
                pl_module.net[0].weight.mul_(1.1)
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "by_hand.ckpt", weights_only=weights_only)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise RuntimeError("an exception in training")

    keep = {"dirpath": tmp_path, "save_top_k": -1, "save_weights_only": weights_only}
    checkpoints = [
        pl.callbacks.ModelCheckpoint(every_n_train_steps=5, filename="step-{step}", **keep),
        pl.callbacks.ModelCheckpoint(
            every_n_epochs=1, monitor="val_loss", filename="val-{epoch}", save_last=True, **keep
        ),
    ]
    on_exception = "save_on_exception" in inspect.signature(pl.callbacks.ModelCheckpoint).parameters  # not in 2.5
    if on_exception:
        checkpoints.append(pl.callbacks.ModelCheckpoint(save_on_exception=True, filename="exc-{epoch}", **keep))
    module = make_module(pl)
    trainer = make_trainer(
        pl, callbacks=[LipschitzConstraint(TARGET), Save(), *checkpoints], enable_checkpointing=True, max_epochs=3
    )
    with pytest.raises(RuntimeError, match="an exception in training"):
        trainer.fit(module, regression_data, regression_data)
    files = sorted(tmp_path.glob("*.ckpt"))
    names = {file.name for file in files}
    assert {"by_hand.ckpt", "last.ckpt", "step-step=5.ckpt", "val-epoch=0.ckpt"} <= names
    assert any(name.startswith("exc") for name in names) == on_exception
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert certified(checkpoint["state_dict"]) <= TARGET
        assert certified(checkpoint["state_dict"]) > 0.99 * TARGET
        if not weights_only:
            state = checkpoint["callbacks"]["LipschitzConstraint"]
            assert state["target"] == TARGET
            assert certified(checkpoint["state_dict"]) <= state["certified_bound"] * (1 + 1e-14) <= TARGET * (1 + 1e-14)


def test_what_is_validated_is_what_is_saved(make_module, make_trainer, regression_data):
    seen = []

    class Check(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                pl_module.net[0].weight.mul_(1.1)

        def on_validation_batch_start(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                seen.append(certified(dict(pl_module.named_parameters())))

    trainer = make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET), Check()], val_check_interval=4)
    trainer.fit(make_module(lightning), regression_data, regression_data)
    assert len(seen) == 36
    assert max(seen) <= TARGET


@pytest.mark.parametrize("at_step", [None, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(make_module, make_trainer, regression_data, tmp_path, at_step):
    if at_step is not None:
        # Lightning starts a resumed epoch's loader from its first batch: all batches are the same here.
        data = torch.utils.data.TensorDataset(*(t[:4].repeat(12, 1) for t in regression_data.dataset.tensors))
        regression_data = torch.utils.data.DataLoader(data, batch_size=4)

    def checkpoint(folder):
        # In the middle of an epoch a checkpoint projects exactly: both runs must make it.
        every = {"every_n_epochs": 1} if at_step is None else {"every_n_train_steps": at_step}
        return ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **every)

    def run(epochs, folder, **fit):
        module = make_module(lightning)
        constraint = LipschitzConstraint(0.3, initial_target=0.6, tighten_steps=20)
        trainer = make_trainer(
            lightning, callbacks=[constraint, checkpoint(folder)], enable_checkpointing=True, max_epochs=epochs
        )
        trainer.fit(module, regression_data, **fit)
        return weights_of(module), constraint

    whole, constraint = run(3, tmp_path / "a")
    run(1, tmp_path / "b")
    (path,) = (tmp_path / "b").glob("epoch=0-step=12.ckpt" if at_step is None else "epoch=0-step=7.ckpt")
    resumed, other = run(3, tmp_path / "c", ckpt_path=path)
    assert torch.equal(whole, resumed)
    assert constraint.state_dict()["n_steps"] == other.state_dict()["n_steps"] == 36
    for name, block in constraint.state_dict()["projector"]["blocks"].items():
        assert torch.equal(block, other.state_dict()["projector"]["blocks"][name])


def test_checkpoints_after_an_epoch_do_not_change_training(make_module, make_trainer, regression_data, tmp_path):
    results = []
    for callbacks in ([ModelCheckpoint(tmp_path, save_top_k=0)], [ModelCheckpoint(tmp_path, save_top_k=-1)]):
        module = make_module(lightning)
        make_trainer(
            lightning,
            callbacks=[LipschitzConstraint(TARGET), *callbacks],
            enable_checkpointing=bool(callbacks),
            max_epochs=3,
        ).fit(module, regression_data)
        results.append(weights_of(module))
    assert torch.equal(*results)


def test_the_target_tightens(make_module, make_trainer, regression_data):
    watch = Watch()
    constraint = LipschitzConstraint(0.1, initial_target=0.4, tighten_steps=10)
    make_trainer(lightning, callbacks=[watch, constraint]).fit(make_module(lightning), regression_data)
    targets = [0.4 ** (1 - min(n / 10, 1)) * 0.1 ** min(n / 10, 1) for n in range(12)]
    assert all(seen <= target * (1 + 1e-4) for seen, target in zip(watch.seen, targets, strict=True))
    assert watch.seen[5] > 0.19
    assert constraint.projector.target == pytest.approx(0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision(make_module, make_trainer, regression_data, precision):
    module = make_module(lightning)
    make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET)], precision=precision).fit(module, regression_data)
    assert 0.95 * TARGET < certified(module.state_dict()) <= TARGET


def test_a_step_that_the_scaler_skips_counts_for_nothing(make_module, make_trainer, regression_data):
    # fp16 overflows at this scale: the first steps are skipped, and the scale halves until one is not.
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**22))
    constraint = LipschitzConstraint(TARGET)
    trainer = make_trainer(lightning, callbacks=[constraint], plugins=plugin)
    module = make_module(lightning)
    trainer.fit(module, regression_data)
    assert trainer.global_step == 12
    assert 0 < constraint.state_dict()["n_steps"] < 12
    assert certified(module.state_dict()) <= TARGET


def test_accumulation_projects_after_optimiser_steps_only(make_module, make_trainer, regression_data):
    constraint = LipschitzConstraint(TARGET)
    make_trainer(lightning, callbacks=[constraint], accumulate_grad_batches=3).fit(
        make_module(lightning), regression_data
    )
    assert constraint.state_dict()["n_steps"] == 4
    assert constraint.projector.state_dict()["n_steps"] == 4


def test_every_n_steps(make_module, make_trainer, regression_data):
    constraint = LipschitzConstraint(TARGET, every_n_steps=5)
    module = make_module(lightning)
    make_trainer(lightning, callbacks=[constraint]).fit(module, regression_data)
    assert constraint.projector.state_dict()["n_steps"] == 2
    assert certified(module.state_dict()) <= TARGET


def test_lbfgs(make_module, make_trainer, regression_data):
    module = make_module(lightning, optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, line_search_fn="strong_wolfe"))
    watch = Watch()
    make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET), watch]).fit(module, regression_data)
    assert max(watch.seen) <= TARGET * (1 + 1e-4)


class Adversarial(lightning.LightningModule):
    """Two networks, two optimisers, manual optimisation; the second optimiser may be stepped past Lightning."""

    def __init__(self, past_lightning):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.past_lightning = past_lightning
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers(use_pl_optimizer=not self.past_lightning)
        for optimizer, sign in zip(optimizers, (-1, 1), strict=True):
            loss = sign * (self.critic(self.generator(batch[0])) - self.critic(batch[0])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), 1e-2) for net in (self.generator, self.critic)]


@pytest.mark.parametrize("past_lightning", [False, True])
def test_two_networks_in_manual_optimisation(make_trainer, regression_data, past_lightning):
    module = Adversarial(past_lightning)
    generator_before = copy.deepcopy(module.generator)
    watch = []

    class Check(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            watch.append((product(pl_module.generator), product(pl_module.critic)))

    both = [
        LipschitzConstraint(0.3, layers="critic", name="critic"),
        LipschitzConstraint(5.0, layers="generator", name="generator"),
    ]
    make_trainer(lightning, callbacks=[*both, Check()], max_epochs=2).fit(module, regression_data)
    assert max(critic for _, critic in watch) <= 0.3 * (1 + 1e-4)
    assert max(generator for generator, _ in watch) < 5
    assert product(module.generator) != product(generator_before)
    assert {c.state_key for c in both} == {"LipschitzConstraint[critic]", "LipschitzConstraint[generator]"}


def test_a_bound_over_the_graph_with_batch_norm(make_trainer, tmp_path):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.example_input_array = torch.zeros(2, 1, 4, 4)
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)
            )

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return (self(batch).squeeze(1) - batch.sum((1, 2, 3))).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Net()
    images = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4)
    constraint = LipschitzConstraint(1.0)
    trainer = make_trainer(lightning, callbacks=[constraint, checkpoint], enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=4))
    assert constraint.projector.bound_kind == "bound"
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 6
    for file in files:
        saved = Net()
        saved.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        assert certify(saved, torch.zeros(2, 1, 4, 4)).upper <= 1.0


def test_convolutions_of_a_size_that_the_first_batch_shows(make_trainer, tmp_path):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))

        def training_step(self, batch, batch_idx):
            return (self.net(batch).squeeze(1) - batch.sum((1, 2, 3))).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Net()
    images = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    constraint = LipschitzConstraint(0.5)
    trainer = make_trainer(lightning, callbacks=[constraint], max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=4))
    assert certify(module.net, torch.zeros(2, 1, 4, 4)).upper <= 0.5 * (1 + 1e-12)
    assert constraint.state_dict()["certified_bound"] <= 0.5


def test_stochastic_weight_averaging_ends_certified(make_module, make_trainer, regression_data):
    class Scale(lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            # The average of these runs happens to lie within the budget: make it one that does not.
            with torch.no_grad():
                pl_module.net[0].weight.mul_(3)

    module = make_module(lightning)
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    callbacks = [LipschitzConstraint(TARGET), averaging, Scale()]
    make_trainer(lightning, callbacks=callbacks, max_epochs=4).fit(module, regression_data)
    assert certified(module.state_dict()) <= TARGET


@pytest.mark.parametrize("averaging", ["WeightAveraging", "EMAWeightAveraging"])
def test_weight_averaging_is_refused(make_module, make_trainer, regression_data, averaging):
    if not hasattr(lightning_callbacks, averaging):
        pytest.skip(f"this Lightning has no {averaging}")
    callback = getattr(lightning_callbacks, averaging)()
    trainer = make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET), callback])
    with pytest.raises(RuntimeError, match=r"beside WeightAveraging.*no convex set"):
        trainer.fit(make_module(lightning), regression_data)


def test_layers_unfrozen_in_training_are_projected(make_trainer, regression_data):
    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.head = nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=5e-2)

    watch, norms = Watch(), []

    class Check(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            norms.append(pl_module.backbone[0].weight.detach().clone())

    module = Net()
    start = module.backbone[0].weight.detach().clone()
    callbacks = [
        LipschitzConstraint(0.3),
        BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False),
        watch,
        Check(),
    ]
    make_trainer(lightning, callbacks=callbacks, max_epochs=4).fit(module, regression_data)
    assert torch.equal(norms[1], start)
    assert not torch.equal(norms[3], start)
    assert max(watch.seen) <= 0.3 * (1 + 1e-4)


def test_logs(pl, make_module, make_trainer, regression_data, tmp_path):
    def metrics(*others):
        logger = pl.loggers.CSVLogger(tmp_path, name=f"{len(others)}")
        callbacks = [LipschitzConstraint(TARGET), *others]
        trainer = make_trainer(pl, callbacks=callbacks, logger=logger, log_every_n_steps=4)
        trainer.fit(make_module(pl), regression_data)
        assert trainer.callback_metrics["lipschitz/target"] == TARGET
        assert float(trainer.callback_metrics["lipschitz/product"]) <= TARGET * (1 + 1e-4)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            return file.readline().strip().split(","), trainer.callback_metrics

    columns, logged = metrics()
    assert {"lipschitz/target", "lipschitz/distance", "lipschitz/product"} <= set(columns)
    assert 0 < float(logged["lipschitz/distance"]) < 1
    columns, _ = metrics(LipschitzMonitor(), LipschitzPenalty(1e-3))
    assert {"lipschitz/target", "lipschitz/distance", "lipschitz/product", "lipschitz/penalty"} <= set(columns)


def test_validate_before_fit_and_fit_twice(make_module, make_trainer, regression_data):
    module = make_module(lightning)
    constraint = LipschitzConstraint(TARGET)
    make_trainer(lightning, callbacks=[constraint]).validate(module, regression_data, verbose=False)
    make_trainer(lightning, callbacks=[constraint]).fit(module, regression_data, regression_data)
    make_trainer(lightning, callbacks=[constraint]).fit(module, regression_data)
    assert constraint.state_dict()["n_steps"] == 24
    assert certified(module.state_dict()) <= TARGET
    make_trainer(lightning, callbacks=[constraint]).fit(make_module(lightning), regression_data)
    assert constraint.state_dict()["n_steps"] == 12


def test_several_budgets_of_the_same_layers_hold_together(make_module, make_trainer, regression_data):
    module = make_module(lightning)
    whole = LipschitzConstraint(TARGET, name="whole")
    first = LipschitzConstraint(0.3, layers="net.0", name="first")
    two = LipschitzConstraint(0.15, layers=["net.0", "net.2"], method="scaling", name="two")
    make_trainer(lightning, callbacks=[two, whole, first]).fit(module, regression_data)
    norms = [certified_matrix_norm(module.net[i].weight.detach()) for i in (0, 2, 4)]
    assert norms[0] <= 0.3
    assert norms[0] * norms[1] <= 0.15
    assert math.prod(norms) <= TARGET


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_fit_that_trains_nothing_changes_nothing(make_module, make_trainer, regression_data, settings):
    module = make_module(lightning)
    before = weights_of(module)
    make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET)], **settings).fit(module, regression_data)
    assert torch.equal(weights_of(module), before)


def test_a_finished_run_resumed(make_module, make_trainer, regression_data, tmp_path):
    trainer = make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET)])
    trainer.fit(make_module(lightning), regression_data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    module = make_module(lightning)
    trainer = make_trainer(lightning, callbacks=[LipschitzConstraint(TARGET)])
    trainer.fit(module, regression_data, ckpt_path=tmp_path / "end.ckpt")
    assert certified(module.state_dict()) <= TARGET


@pytest.mark.parametrize("taken_by", ["this trainer", "another"])
def test_after_an_exception_another_stage_is_left_alone(pl, make_module, make_trainer, regression_data, taken_by):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("an exception in training")

    module = make_module(pl)
    trainer = make_trainer(pl, callbacks=[LipschitzConstraint(TARGET), Stop()])
    with pytest.raises(RuntimeError, match="an exception in training"):
        trainer.fit(module, regression_data)
    if taken_by == "another":
        trainer = make_trainer(pl)
    with torch.no_grad():
        module.net[0].weight.mul_(3)
    before = weights_of(module)
    trainer.validate(module, regression_data, verbose=False)
    module.state_dict()
    assert torch.equal(weights_of(module), before)


def test_a_refused_start_leaves_no_hook(make_module, make_trainer, regression_data):
    module = make_module(lightning)
    module.requires_grad_(False)
    module.net[4].requires_grad_(True)
    with pytest.raises(ValueError, match="no selected layer is trainable"):
        make_trainer(lightning, callbacks=[LipschitzConstraint(0.01, layers="net.0")]).fit(module, regression_data)
    module.state_dict()


def test_a_state_dict_that_passes_by_is_refused(pl, make_module, make_trainer, regression_data):
    own = make_module(pl)
    type(own).state_dict = lambda self, *args, **kwargs: self.net.state_dict(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"call super\(\)\.state_dict\(\)"):
        make_trainer(pl, callbacks=[LipschitzConstraint(TARGET)]).fit(own, regression_data)
    module = make_module(pl)
    type(module).state_dict = lambda self, *args, **kwargs: pl.LightningModule.state_dict(self, *args, **kwargs)
    make_trainer(pl, callbacks=[LipschitzConstraint(TARGET)]).fit(module, regression_data)
    assert certified(module.state_dict()) <= TARGET


def test_copies_leave_the_model_behind(make_module, make_trainer, regression_data):
    copied = []

    class Copy(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                module = copy.copy(pl_module)
                module._trainer = None
                copied.append(copy.deepcopy(module))

    module = make_module(lightning)
    constraint = LipschitzConstraint(TARGET)
    make_trainer(lightning, callbacks=[constraint, Copy()]).fit(module, regression_data)
    with torch.no_grad():
        copied[0].net[0].weight.mul_(10)
    assert certified(copied[0].state_dict()) > TARGET  # a copy is no module in training: its hook does nothing
    for other in (pickle.loads(pickle.dumps(constraint)), copy.deepcopy(constraint)):
        fresh = make_module(lightning)
        make_trainer(lightning, callbacks=[other]).fit(fresh, regression_data)
        assert certified(fresh.state_dict()) <= TARGET
        assert other.state_dict()["projector"]["n_steps"] == 24


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_hide_weights_are_refused(make_module, make_trainer, regression_data, name):
    strategy = type(name, (SingleDeviceStrategy,), {})(device="cpu")
    with pytest.raises(RuntimeError, match=f"LipschitzConstraint does not support {name}"):
        make_trainer(lightning, callbacks=[LipschitzConstraint(1.0)], strategy=strategy).fit(
            make_module(lightning), regression_data
        )


def test_a_parametrised_weight_is_refused(make_module, make_trainer, regression_data):
    module = make_module(lightning, net=nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 1))))
    with pytest.raises(UnsupportedLayerError, match=r"net\.0: its weight is parametrised"):
        make_trainer(lightning, callbacks=[LipschitzConstraint(1.0)]).fit(module, regression_data)


def test_a_diverged_weight_is_told_and_not_saved(make_module, make_trainer, regression_data, tmp_path):
    module = make_module(lightning, optimizer=lambda p: torch.optim.SGD(p, lr=math.inf))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        make_trainer(lightning, callbacks=[LipschitzConstraint(1.0)]).fit(module, regression_data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "`target` to be a positive finite number"),
        ({"initial_target": -1.0, "tighten_steps": 3}, "`initial_target` to be a positive finite number"),
        ({"initial_target": 2.0}, "`tighten_steps` to be an integer of at least 1"),
        ({"tighten_steps": 3}, "asks for the `initial_target`"),
        ({"method": "clip"}, "`method` to be one of"),
        ({"metric": "l2"}, "`metric` to be one of"),
        ({"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1"),
        ({"block_size": True}, "`block_size` to be an integer of at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LipschitzConstraint(**({"target": 1.0} | arguments))


def test_no_projector_before_training():
    with pytest.raises(RuntimeError, match="no projector before"):
        _ = LipschitzConstraint(1.0).projector
    assert LipschitzConstraint(1.0).state_dict() == {"n_steps": 0, "projector": None}


SCRIPT = """
import sys, math
import torch, lightning as L
from torch import nn
from lightning_lip import LipschitzConstraint
from lightning_lip.certificates import certified_matrix_norm

case = sys.argv[1]

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm2d(3)] if case == "batch norm" else []
        head = [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 1)]
        self.net = nn.Sequential(nn.Conv2d(1, 3, 3), *norm, *head)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        if case == "sizes" and self.global_rank == 1:
            batch = batch[..., :5]
        return (self.net(batch) - 3 * batch.mean()).square().mean()

    def on_train_end(self):
        mine = torch.cat([p.detach().flatten() for p in self.parameters()])
        others = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(others, mine)
        assert torch.equal(*others), "the ranks have drifted apart"

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

if __name__ == "__main__":
    torch.set_num_threads(1)
    example = torch.zeros(1, 1, 6, 6) if case in ("batch norm", "traced") else None
    images = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    checkpoint = L.pytorch.callbacks.ModelCheckpoint("saved", every_n_train_steps=3, save_top_k=-1)
    constraint = LipschitzConstraint(0.05, example_input=example, block_size=4)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[constraint, checkpoint],
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(images, batch_size=4))
    import glob
    for file in glob.glob("saved/*.ckpt"):
        state = torch.load(file, weights_only=True)["callbacks"]["LipschitzConstraint"]
        assert 0.045 < state["certified_bound"] <= 0.05
        print("SAME")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("product", "SAME"),
        ("traced", "SAME"),
        ("sizes", "inputs of different sizes on different ranks"),
        ("batch norm", "running statistics of ['net.1'], which differ between ranks"),
    ],
)
def test_two_ranks(tmp_path, case, said):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, case], capture_output=True, text=True, timeout=200, check=False)
    assert said in done.stdout + done.stderr, done.stderr[-3000:]
    assert (done.returncode == 0) == (said == "SAME")
