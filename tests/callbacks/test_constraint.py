"""LipschitzConstraint on real Trainers: the budget holds in training, and certifiably in every checkpoint."""

import copy
import inspect
import math
import pickle

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import BackboneFinetuning, LambdaCallback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from support.trainers import TwoNets, svd_norms, weights_of, with_backbone
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lip import LipschitzConstraint, LipschitzMonitor, LipschitzPenalty, UnsupportedLayerError, certify
from lightning_lip.certificates.interval import certified_matrix_norm

TARGET = 0.5  # the initial product of `make_module` is 1.0, and training raises it


def certified(state_dict):
    """The certified product of all matrices of a checkpoint."""
    return math.prod(certified_matrix_norm(w) for key, w in state_dict.items() if w.dim() == 2)


class Watch(lightning.Callback):
    """Notes the true product after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(math.prod(svd_norms(pl_module)))


def test_holds_after_every_step_and_certifiably_at_the_end(pl, fit):
    module, _ = fit(LipschitzConstraint(TARGET), watch := Watch(), package=pl, max_epochs=3)
    assert len(watch.seen) == 36
    assert max(watch.seen) <= TARGET * (1 + 1e-4)
    assert max(watch.seen) >= TARGET * (1 - 1e-2)
    assert certified(module.state_dict()) <= TARGET
    assert not module._state_dict_pre_hooks


def test_feasible_weights_stay_bit_for_bit(fit):
    results = [weights_of(fit(*callbacks, max_epochs=2)[0]) for callbacks in ([], [LipschitzConstraint(1e3)])]
    assert torch.equal(*results)


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_is_certified(pl, fit, tmp_path, weights_only):
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
    make = pl.callbacks.ModelCheckpoint
    checkpoints = [
        make(every_n_train_steps=5, filename="step-{step}", **keep),
        make(every_n_epochs=1, monitor="val_loss", filename="val-{epoch}", save_last=True, **keep),
    ]
    on_exception = "save_on_exception" in inspect.signature(make).parameters  # not in 2.5
    if on_exception:
        checkpoints.append(make(save_on_exception=True, filename="exc-{epoch}", **keep))
    callbacks = [LipschitzConstraint(TARGET), Save(), *checkpoints]
    with pytest.raises(RuntimeError, match="an exception in training"):
        fit(*callbacks, package=pl, validation=True, enable_checkpointing=True, max_epochs=3)
    files = sorted(tmp_path.glob("*.ckpt"))
    names = {file.name for file in files}
    assert {"by_hand.ckpt", "last.ckpt", "step-step=5.ckpt", "val-epoch=0.ckpt"} <= names
    assert any(name.startswith("exc") for name in names) == on_exception
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert 0.99 * TARGET < certified(checkpoint["state_dict"]) <= TARGET
        if not weights_only:
            state = checkpoint["callbacks"]["LipschitzConstraint"]
            assert state["target"] == TARGET
            assert certified(checkpoint["state_dict"]) <= state["certified_bound"] * (1 + 1e-14) <= TARGET * (1 + 1e-14)


def test_what_is_validated_is_what_is_saved(fit):
    seen = []

    class Check(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                pl_module.net[0].weight.mul_(1.1)

        def on_validation_batch_start(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                seen.append(certified(dict(pl_module.named_parameters())))

    fit(LipschitzConstraint(TARGET), Check(), validation=True, val_check_interval=4)
    assert len(seen) == 36
    assert max(seen) <= TARGET


@pytest.mark.parametrize("at_step", [None, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(fit, regression_data, tmp_path, at_step):
    if at_step is not None:
        # Lightning starts a resumed epoch's loader from its first batch: all batches are the same here.
        data = torch.utils.data.TensorDataset(*(t[:4].repeat(12, 1) for t in regression_data.dataset.tensors))
        regression_data = torch.utils.data.DataLoader(data, batch_size=4)

    def run(epochs, folder, ckpt_path=None):
        constraint = LipschitzConstraint(0.3, initial_target=0.6, tighten_steps=20)
        # In the middle of an epoch a checkpoint projects exactly: both runs must make it.
        every = {"every_n_epochs": 1} if at_step is None else {"every_n_train_steps": at_step}
        checkpoint = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}-{step}", **every)
        settings = {"enable_checkpointing": True, "max_epochs": epochs, "ckpt_path": ckpt_path}
        return weights_of(fit(constraint, checkpoint, data=regression_data, **settings)[0]), constraint

    whole, constraint = run(3, tmp_path / "a")
    run(1, tmp_path / "b")
    (path,) = (tmp_path / "b").glob("epoch=0-step=12.ckpt" if at_step is None else "epoch=0-step=7.ckpt")
    resumed, other = run(3, tmp_path / "c", path)
    assert torch.equal(whole, resumed)
    assert constraint.state_dict()["n_steps"] == other.state_dict()["n_steps"] == 36
    for name, block in constraint.state_dict()["projector"]["blocks"].items():
        assert torch.equal(block, other.state_dict()["projector"]["blocks"][name])


def test_checkpoints_after_an_epoch_do_not_change_training(fit, tmp_path):
    results = []
    for top in (0, -1):
        callbacks = [LipschitzConstraint(TARGET), ModelCheckpoint(tmp_path, save_top_k=top)]
        results.append(weights_of(fit(*callbacks, enable_checkpointing=True, max_epochs=3)[0]))
    assert torch.equal(*results)


def test_the_target_tightens(fit):
    fit(watch := Watch(), constraint := LipschitzConstraint(0.1, initial_target=0.4, tighten_steps=10))
    targets = [0.4 ** (1 - min(n / 10, 1)) * 0.1 ** min(n / 10, 1) for n in range(12)]
    assert all(seen <= target * (1 + 1e-4) for seen, target in zip(watch.seen, targets, strict=True))
    assert watch.seen[5] > 0.19
    assert constraint.projector.target == pytest.approx(0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision(fit, precision):
    module, _ = fit(LipschitzConstraint(TARGET), precision=precision)
    assert 0.95 * TARGET < certified(module.state_dict()) <= TARGET


def test_a_step_that_the_scaler_skips_counts_for_nothing(fit):
    # fp16 overflows at this scale: the first steps are skipped, and the scale halves until one is not.
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**22))
    module, trainer = fit(constraint := LipschitzConstraint(TARGET), plugins=plugin)
    assert trainer.global_step == 12
    assert 0 < constraint.state_dict()["n_steps"] < 12
    assert certified(module.state_dict()) <= TARGET


def test_accumulation_projects_after_optimiser_steps_only(fit):
    fit(constraint := LipschitzConstraint(TARGET), accumulate_grad_batches=3)
    assert constraint.state_dict()["n_steps"] == 4
    assert constraint.projector.state_dict()["n_steps"] == 4


def test_every_n_steps(fit):
    module, _ = fit(constraint := LipschitzConstraint(TARGET, every_n_steps=5))
    assert constraint.projector.state_dict()["n_steps"] == 2
    assert certified(module.state_dict()) <= TARGET


def test_lbfgs(fit, make_module):
    module = make_module(lightning, optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, line_search_fn="strong_wolfe"))
    fit(LipschitzConstraint(TARGET), watch := Watch(), module=module)
    assert max(watch.seen) <= TARGET * (1 + 1e-4)


@pytest.fixture
def images():
    x = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum((1, 2, 3))[:, None]), batch_size=4)


@pytest.mark.parametrize("past_lightning", [False, True])
def test_two_networks_in_manual_optimisation(fit, past_lightning):
    class Module(TwoNets):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=not past_lightning)

    module = Module()
    before = weights_of(module.a)
    watch = []

    def note(trainer, module, *batch):
        watch.append([math.prod(svd_norms(net)) for net in (module.a, module.b)])

    both = [
        LipschitzConstraint(0.3, layers="b", name="b"),
        LipschitzConstraint(5.0, layers="a", name="a"),
    ]
    fit(*both, LambdaCallback(on_train_batch_start=note), module=module, max_epochs=2)
    assert 0.3 * (1 - 1e-2) <= max(b for _, b in watch) <= 0.3 * (1 + 1e-4)
    assert max(a for a, _ in watch) < 5
    assert not torch.equal(weights_of(module.a), before)
    assert {c.state_key for c in both} == {"LipschitzConstraint[a]", "LipschitzConstraint[b]"}


def test_a_bound_over_the_graph_with_batch_norm(fit, make_module, images, tmp_path):
    head = [nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)]
    module = make_module(lightning, net=nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), *head))
    module.example_input_array = torch.zeros(2, 1, 4, 4)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4)
    constraint = LipschitzConstraint(1.0)
    fit(constraint, checkpoint, module=module, data=images, enable_checkpointing=True, max_epochs=2)
    assert constraint.projector.bound_kind == "bound"
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 6
    for file in files:
        module.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        assert certify(module, torch.zeros(2, 1, 4, 4)).upper <= 1.0


def test_convolutions_of_a_size_that_the_first_batch_shows(fit, make_module, images):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))
    fit(constraint := LipschitzConstraint(0.5), module=make_module(lightning, net=net), data=images, max_epochs=2)
    assert certify(net, torch.zeros(2, 1, 4, 4)).upper <= 0.5 * (1 + 1e-12)
    assert constraint.state_dict()["certified_bound"] <= 0.5


def test_stochastic_weight_averaging_ends_certified(fit):
    # The average of these runs happens to lie within the budget: make it one that does not.
    scale = LambdaCallback(on_train_end=lambda trainer, module: module.net[0].weight.data.mul_(3))
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    module, _ = fit(LipschitzConstraint(TARGET), averaging, scale, max_epochs=4)
    assert certified(module.state_dict()) <= TARGET


@pytest.mark.parametrize("averaging", ["WeightAveraging", "EMAWeightAveraging"])
def test_weight_averaging_is_refused(fit, averaging):
    if not hasattr(lightning_callbacks, averaging):
        pytest.skip(f"this Lightning has no {averaging}")
    with pytest.raises(RuntimeError, match=r"beside WeightAveraging.*no convex set"):
        fit(LipschitzConstraint(TARGET), getattr(lightning_callbacks, averaging)())


def test_layers_unfrozen_in_training_are_projected(fit, make_module):
    watch, weights = Watch(), []
    check = LambdaCallback(
        on_train_epoch_end=lambda _, module: weights.append(module.backbone[0].weight.detach().clone())
    )
    module = with_backbone(make_module(lightning, optimizer=lambda p: torch.optim.Adam(p, lr=5e-2)))
    start = module.backbone[0].weight.detach().clone()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    fit(LipschitzConstraint(0.3), finetuning, watch, check, module=module, max_epochs=4)
    assert torch.equal(weights[1], start)
    assert not torch.equal(weights[3], start)
    assert max(watch.seen) <= 0.3 * (1 + 1e-4)


def test_logs(pl, fit, tmp_path):
    def metrics(*others):
        logger = pl.loggers.CSVLogger(tmp_path, name=f"{len(others)}")
        _, trainer = fit(LipschitzConstraint(TARGET), *others, package=pl, logger=logger, log_every_n_steps=4)
        assert trainer.callback_metrics["lipschitz/target"] == TARGET
        assert float(trainer.callback_metrics["lipschitz/product"]) <= TARGET * (1 + 1e-4)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            return file.readline().strip().split(","), trainer.callback_metrics

    columns, logged = metrics()
    assert {"lipschitz/target", "lipschitz/distance", "lipschitz/product"} <= set(columns)
    assert 0 < float(logged["lipschitz/distance"]) < 1
    columns, _ = metrics(LipschitzMonitor(), LipschitzPenalty(1e-3))
    assert {"lipschitz/target", "lipschitz/distance", "lipschitz/product", "lipschitz/penalty"} <= set(columns)


def test_validate_before_fit_and_fit_twice(fit, make_module, make_trainer, regression_data):
    module = make_module(lightning)
    constraint = LipschitzConstraint(TARGET)
    make_trainer(lightning, callbacks=[constraint]).validate(module, regression_data, verbose=False)
    fit(constraint, module=module, validation=True)
    fit(constraint, module=module)
    assert constraint.state_dict()["n_steps"] == 24
    assert certified(module.state_dict()) <= TARGET
    fit(constraint)
    assert constraint.state_dict()["n_steps"] == 12


def test_several_budgets_of_the_same_layers_hold_together(fit):
    whole = LipschitzConstraint(TARGET, name="whole")
    first = LipschitzConstraint(0.3, layers="net.0", name="first")
    two = LipschitzConstraint(0.15, layers=["net.0", "net.2"], method="scaling", name="two")
    module, _ = fit(two, whole, first)
    norms = [certified_matrix_norm(module.net[i].weight.detach()) for i in (0, 2, 4)]
    assert norms[0] <= 0.3
    assert norms[0] * norms[1] <= 0.15
    assert math.prod(norms) <= TARGET


@pytest.mark.parametrize("settings", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_a_fit_that_trains_nothing_changes_nothing(fit, make_module, settings):
    module = make_module(lightning)
    before = weights_of(module)
    fit(LipschitzConstraint(TARGET), module=module, **settings)
    assert torch.equal(weights_of(module), before)


def test_a_finished_run_resumed(fit, tmp_path):
    _, trainer = fit(LipschitzConstraint(TARGET))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    module, _ = fit(LipschitzConstraint(TARGET), ckpt_path=tmp_path / "end.ckpt")
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


def test_a_refused_start_leaves_no_hook(fit, make_module):
    module = make_module(lightning)
    module.requires_grad_(False)
    module.net[4].requires_grad_(True)
    with pytest.raises(ValueError, match="no selected layer is trainable"):
        fit(LipschitzConstraint(0.01, layers="net.0"), module=module)
    module.state_dict()


def test_a_state_dict_that_passes_by_is_refused(pl, fit, make_module):
    own = make_module(pl)
    type(own).state_dict = lambda self, *args, **kwargs: self.net.state_dict(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"call super\(\)\.state_dict\(\)"):
        fit(LipschitzConstraint(TARGET), package=pl, module=own)
    module = make_module(pl)
    type(module).state_dict = lambda self, *args, **kwargs: pl.LightningModule.state_dict(self, *args, **kwargs)
    fit(LipschitzConstraint(TARGET), package=pl, module=module)
    assert certified(module.state_dict()) <= TARGET


def test_copies_leave_the_model_behind(fit):
    copied = []

    class Copy(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                module = copy.copy(pl_module)
                module._trainer = None
                copied.append(copy.deepcopy(module))

    fit(constraint := LipschitzConstraint(TARGET), Copy())
    with torch.no_grad():
        copied[0].net[0].weight.mul_(10)
    assert certified(copied[0].state_dict()) > TARGET  # a copy is no module in training: its hook does nothing
    for other in (pickle.loads(pickle.dumps(constraint)), copy.deepcopy(constraint)):
        fresh, _ = fit(other)
        assert certified(fresh.state_dict()) <= TARGET
        assert other.state_dict()["projector"]["n_steps"] == 24


def test_a_parametrised_weight_is_refused(fit, make_module):
    module = make_module(lightning, net=nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 1))))
    with pytest.raises(UnsupportedLayerError, match=r"net\.0: its weight is parametrised"):
        fit(LipschitzConstraint(1.0), module=module)


def test_a_diverged_weight_is_told_and_not_saved(fit, make_module):
    with pytest.raises(ValueError, match="NaN or an infinity"):
        fit(LipschitzConstraint(1.0), module=make_module(lightning, optimizer=lambda p: torch.optim.SGD(p, math.inf)))
