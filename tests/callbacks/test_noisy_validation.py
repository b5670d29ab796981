import copy
import os
import random
import subprocess
import sys
import warnings
from collections import UserList

import lightning.pytorch as pl
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support import trainers
from support.metrics import check_examples
from support.noisy import true_errors
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_lip import NoisyValidation

OWN_PROCESS = "LIGHTNING_LIP_OWN_PROCESS"
LEVELS = (0.0, 0.2, 0.6)
NAMES = ["val/noisy_mae/eta=0", "val/noisy_mae/eta=0.2", "val/noisy_mae/eta=0.6"]


def make_data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0])
    x[-1] = 1.1 * x.amax(dim=0)  # so that a loader that drops its last batch has other ranges
    return TensorDataset(x, x @ torch.tensor([[1.0], [-0.1], [3.0], [0.2]]))


TRAIN, VAL = make_data(22, 0), make_data(9, 1)
TRAIN_LOW, TRAIN_HIGH = TRAIN.tensors[0].amin(0).double(), TRAIN.tensors[0].amax(0).double()


def module_class(package=pl):
    """Return a class of modules of a Lightning package: the small module of the tests, which logs nothing."""
    return type("Module", (type(trainers.make_module(package)),), {"validation_step": lambda self, *batch: None})


Module = module_class()


def make_trainer(*callbacks, package=pl, **settings):
    return trainers.make_trainer(package, callbacks, **({"max_epochs": 2} | settings))


def train_loader(dataset=TRAIN, **kwargs):
    return DataLoader(dataset, **{"batch_size": 4, "shuffle": True, **kwargs})


def val_loader(dataset=VAL):
    return DataLoader(dataset, batch_size=5)


def fit(*callbacks, module=None, train=None, validation=None, package=pl, ckpt_path=None, **settings):
    """Return the module and the trainer after training on TRAIN, and validating on VAL, unless other data are given."""
    module, trainer = module or Module(), make_trainer(*callbacks, package=package, **settings)
    train = train_loader() if train is None else train
    trainer.fit(module, train, val_loader() if validation is None else validation, ckpt_path=ckpt_path)
    return module, trainer


def truth(module, dataset=VAL, batch_size=5, low=TRAIN_LOW, high=TRAIN_HIGH, levels=LEVELS, ranks=1, symmetric=False):
    """Float64 values over the (sequential, unpadded) shards of all ranks, each rank's seed replayed."""
    net, errors = copy.deepcopy(module.net).double(), []
    for rank in range(ranks):
        batches = list(zip(*(part[rank::ranks].split(batch_size) for part in dataset.tensors), strict=True))
        errors.append(true_errors(batches, levels, low, high, symmetric, rank=rank, predict=net))
    return sum(sums.sum(axis=0) for sums, _ in errors) / sum(counts.sum() for _, counts in errors)


def logged(trainer, names=NAMES):
    return [trainer.callback_metrics[name].item() for name in names]


class Record(pl.Callback):
    """What the metrics were after every validation, the sanity check included."""

    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        self.values.append((trainer.sanity_checking, {k: v.item() for k, v in trainer.callback_metrics.items()}))


@pytest.mark.parametrize("package", [pl, pytorch_lightning], ids=["lightning", "standalone"])
def test_logs_the_noisy_error_with_learnt_ranges(package):
    callback = NoisyValidation(LEVELS)
    module, trainer = fit(callback, module=module_class(package)(), package=package)
    assert torch.equal(callback.feature_min, TRAIN_LOW)
    assert torch.equal(callback.feature_max, TRAIN_HIGH)
    assert sorted(trainer.callback_metrics) == NAMES
    np.testing.assert_allclose(logged(trainer), truth(module), rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_given_ranges_and_options(symmetric):
    class NoPass(Module):
        def train_dataloader(self):
            raise AssertionError("no pass is needed")

    callback = NoisyValidation(
        (0.1, 1), feature_min=-1.0, feature_max=[1.0, 2.0, 3.0, 4.0], symmetric=symmetric, prefix="robust"
    )
    trainer = make_trainer(callback)
    module = NoPass()
    trainer.validate(module, val_loader(), verbose=False)
    np.testing.assert_allclose(
        logged(trainer, ["robust/eta=0.1", "robust/eta=1"]),
        truth(module, low=-1.0, high=torch.tensor([1.0, 2.0, 3.0, 4.0]), levels=(0.1, 1.0), symmetric=symmetric),
        rtol=1e-5,
    )
    assert callback.state_dict() == {}


def test_given_ranges_make_no_pass_in_fit():
    class Counted(Module):
        calls = 0

        def train_dataloader(self):
            self.calls += 1
            return train_loader()

    module = Counted()
    make_trainer(NoisyValidation(LEVELS, 0.0, 1.0)).fit(module, val_dataloaders=val_loader())
    assert module.calls == 1
    module = Counted()
    make_trainer(callback := NoisyValidation(LEVELS)).fit(module, val_dataloaders=val_loader())
    assert module.calls == 2
    assert torch.equal(callback.feature_min, TRAIN_LOW)


def test_same_noise_at_every_epoch_and_nothing_logged_in_the_sanity_check():
    class Frozen(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    fit(NoisyValidation(LEVELS), record := Record(), module=Frozen(), max_epochs=3)
    assert record.values[0] == (True, {})
    assert [sanity for sanity, _ in record.values[1:]] == [False] * 3
    assert record.values[1][1].keys() == set(NAMES)
    assert record.values[1] == record.values[2] == record.values[3]


def test_values_can_be_monitored_and_reach_the_logger(tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor=NAMES[1])
    stopping = EarlyStopping(NAMES[2], patience=100, strict=True)
    fit(NoisyValidation(LEVELS), stopping, checkpoint, enable_checkpointing=True, logger=logger)
    assert checkpoint.best_model_score is not None
    assert stopping.best_score.isfinite()
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert all(name in text for name in NAMES)


class RandomTransform(Dataset):
    """Draws from all three global generators for every sample."""

    def __len__(self):
        return len(TRAIN)

    def __getitem__(self, index):
        x, y = TRAIN[index]
        return x + 0.1 * torch.rand(4) + 0.1 * float(np.random.rand()) + 0.1 * random.random(), y  # noqa: NPY002


class Dropping(Module):
    """Uses random numbers in every forward, in training and in validation."""

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.2, training=True))


class Shuffled(Sampler):
    """A sampler with a generator of its own, as users write them."""

    def __init__(self, n):
        self.n, self.generator = n, np.random.default_rng(0)

    def __iter__(self):
        return iter(self.generator.permutation(self.n).tolist())

    def __len__(self):
        return self.n


@pytest.mark.parametrize(
    "make_loader",
    [
        train_loader,
        lambda: train_loader(generator=torch.Generator().manual_seed(1)),
        lambda: train_loader(RandomTransform()),
        lambda: train_loader(RandomTransform(), num_workers=1, persistent_workers=True, multiprocessing_context="fork"),
        lambda: train_loader(shuffle=False, sampler=Shuffled(len(TRAIN))),
        lambda: DataLoader(TRAIN, batch_sampler=BatchSampler(Shuffled(len(TRAIN)), 4, True)),
        lambda: DataLoader(TRAIN, batch_size=None, sampler=BatchSampler(RandomSampler(TRAIN), 4, False)),
    ],
    ids=["shuffled", "generator", "transform", "workers", "sampler", "batch_sampler", "unbatched"],
)
def test_training_is_bit_identical_with_and_without(make_loader):
    def final(*callbacks, seed=5):
        module = Dropping()
        pl.seed_everything(seed, verbose=False)
        make_trainer(*callbacks).fit(module, make_loader(), val_loader())
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    reference = final()
    assert torch.equal(final(), reference)
    assert not torch.equal(final(seed=6), reference)
    assert torch.equal(final(NoisyValidation(LEVELS)), reference)
    assert torch.equal(final(NoisyValidation(LEVELS, 0.0, 1.0)), reference)


def learn(loader, module=None, **settings):
    callback = NoisyValidation(LEVELS, **settings.pop("callback", {}))
    fit(callback, module=module, train=loader, **{"max_epochs": 1, **settings})
    return callback.feature_min, callback.feature_max


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from TRAIN


class PlainIterable:
    """Any object that makes batches; it has no length."""

    def __iter__(self):
        return iter(DataLoader(TRAIN, batch_size=4))


@pytest.mark.parametrize(
    ("make_loader", "kwargs", "n_seen"),
    [
        (lambda: train_loader(drop_last=True), {}, 22),  # drop_last leaves 20
        (lambda: DataLoader(TRAIN, batch_size=None, sampler=BatchSampler(RandomSampler(TRAIN), 4, True)), {}, 22),
        (lambda: DataLoader(TRAIN, batch_sampler=BatchSampler(range(22), 4, True)), {}, 22),
        (lambda: train_loader(shuffle=False, sampler=SubsetRandomSampler(range(10))), {}, 10),
        (lambda: train_loader(Stream(), shuffle=False), {}, 22),
        (lambda: train_loader(Endless(), shuffle=False), {"limit_train_batches": 2}, 8),
        (PlainIterable, {}, 22),
        (PlainIterable, {"limit_train_batches": 3}, 12),
        (lambda: UserList(DataLoader(TRAIN, batch_size=4)), {}, 22),
        (lambda: train_loader(shuffle=False), {"limit_train_batches": 1}, 22),  # later epochs may see the rest
        (lambda: train_loader(shuffle=False), {"fast_dev_run": 2}, 8),
    ],
)
def test_ranges_are_those_of_the_training_data(make_loader, kwargs, n_seen):
    low, high = learn(make_loader(), **kwargs)
    x = TRAIN.tensors[0][:n_seen]
    assert torch.equal(low, x.amin(0).double())
    assert torch.equal(high, x.amax(0).double())


def test_ranges_from_a_datamodule_with_batch_to_xy():
    class DictModule(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch["y"]), batch_idx)

        def validation_step(self, batch, batch_idx):
            # The callback reads the batch before this.
            del batch["x"]

    callback = NoisyValidation(LEVELS, batch_to_xy=lambda batch: (batch["x"], batch["y"]))
    trainer = make_trainer(callback)
    module = DictModule()
    datasets = [StackDataset(x=dataset.tensors[0], y=dataset.tensors[1]) for dataset in (TRAIN, VAL)]
    trainer.fit(module, datamodule=pl.LightningDataModule.from_datasets(*datasets, batch_size=5))
    assert torch.equal(callback.feature_max, TRAIN_HIGH)
    np.testing.assert_allclose(logged(trainer), truth(module), rtol=1e-5)


def test_several_validation_loaders_are_named_as_lightning_names_them():
    other = make_data(4, 2)
    module = Module()
    module.validation_step = lambda batch, batch_idx, dataloader_idx=0: module.log("own", 1.0)
    _, trainer = fit(NoisyValidation(LEVELS), module=module, validation=[val_loader(), val_loader(other)])
    # Lightning 2.5 keeps the ending to itself.
    ending = "dataloader_idx" if f"{NAMES[0]}/dataloader_idx_0" in trainer.callback_metrics else "dataloader"
    assert ending == "dataloader_idx" or pl.__version__.startswith("2.5.")
    for index, dataset in enumerate((VAL, other)):
        names = [f"{name}/{ending}_{index}" for name in NAMES]
        np.testing.assert_allclose(logged(trainer, names), truth(module, dataset), rtol=1e-5)
        assert f"own/dataloader_idx_{index}" in trainer.callback_metrics
    assert len(trainer.callback_metrics) == 8


def test_combined_validation_loaders_that_give_one_batch_at_a_time():
    combined = pl.utilities.CombinedLoader([val_loader(), val_loader(make_data(4, 2))], "max_size")
    # A training batch is (x, y), a validation batch [(x, y), (x, y) or None].
    first_pair = NoisyValidation(
        LEVELS, batch_to_xy=lambda batch: batch if isinstance(batch[0], torch.Tensor) else batch[0]
    )
    module, trainer = fit(first_pair, validation=combined)
    np.testing.assert_allclose(logged(trainer), truth(module), rtol=1e-5)
    assert len(trainer.callback_metrics) == len(LEVELS)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)])
def test_predictions_in_the_precision_of_the_trainer(precision, dtype):
    class Recording(Module):
        def forward(self, x):
            predictions = self.net(x)
            self.seen.append((x.dtype, predictions.dtype))
            return predictions

    module = Recording()
    module.seen = []
    _, trainer = fit(NoisyValidation(LEVELS), module=module, precision=precision)
    inputs_dtype = torch.float32 if precision == "bf16-mixed" else torch.float64
    assert set(module.seen) == {(inputs_dtype, dtype)}
    assert trainer.callback_metrics[NAMES[0]].dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    # 8 bits of mantissa in the products of a two-layer net; float64 has nothing to round.
    np.testing.assert_allclose(logged(trainer), truth(module), rtol=2e-2 if dtype == torch.bfloat16 else 1e-12)


def test_checkpoint_holds_learnt_ranges(tmp_path):
    learnt = NoisyValidation(LEVELS)
    path = tmp_path / "last.ckpt"
    fit(learnt)[1].save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"][learnt.state_key]
    assert torch.equal(state["feature_min"], TRAIN_LOW)

    # Validation without fit: no training data is needed.
    trainer = make_trainer(NoisyValidation(LEVELS))
    module = Module()
    trainer.validate(module, val_loader(), ckpt_path=path, verbose=False)
    np.testing.assert_allclose(logged(trainer), truth(module), rtol=1e-5)

    # A resumed fit keeps the loaded ranges; a fresh fit of the same callback learns its own.
    other = make_data(8, 4)
    resumed = NoisyValidation(LEVELS)
    fit(resumed, train=train_loader(other), ckpt_path=path, max_epochs=3)
    assert torch.equal(resumed.feature_min, TRAIN_LOW)
    fit(resumed, train=train_loader(other))
    assert torch.equal(resumed.feature_min, other.tensors[0].amin(0).double())

    # Ranges that are given win.
    fit(given := NoisyValidation(LEVELS, 0.0, 1.0), ckpt_path=path, max_epochs=3)
    assert given.feature_max == 1.0


def test_validation_after_fit_uses_the_learnt_ranges():
    module, trainer = fit(NoisyValidation(LEVELS))
    expected = logged(trainer)
    trainer.validate(module, val_loader(), verbose=False)
    assert logged(trainer) == expected


def test_two_callbacks_with_different_prefixes():
    both = NoisyValidation(LEVELS), NoisyValidation(LEVELS, symmetric=True, prefix="val/two_sided")
    _, trainer = fit(*both)
    assert len(trainer.callback_metrics) == 6
    assert trainer.callback_metrics[NAMES[0]] == trainer.callback_metrics["val/two_sided/eta=0"]
    assert trainer.callback_metrics[NAMES[1]] != trainer.callback_metrics["val/two_sided/eta=0.2"]


class Quiet(Module):
    """Fails where Lightning recommends sync_dist."""

    def on_fit_start(self):
        warnings.filterwarnings("error", ".*sync_dist.*")


class Shard(IterableDataset):
    """A stream of which every rank sees a part of its own."""

    def __iter__(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return iter([TRAIN[i] for i in range(rank, len(TRAIN), 2)])


class SaveRanges(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        noisy = next(c for c in trainer.callbacks if isinstance(c, NoisyValidation))
        torch.save((noisy.feature_min, noisy.feature_max), f"ranges{trainer.global_rank}.pt")


@pytest.mark.parametrize("dataset", [TRAIN, Shard()], ids=["map", "stream"])
def test_ddp(dataset, tmp_path, request):
    if OWN_PROCESS not in os.environ:
        # Once a backward pass ran inside another one, autograd refuses to work in a fork.
        command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::{request.node.name}", "-p", "no:cacheprovider"]
        done = subprocess.run(command, env=os.environ | {OWN_PROCESS: "1"}, capture_output=True, text=True, check=False)
        assert "1 passed" in done.stdout, done.stdout[-4000:]
        return
    # fork: a new interpreter cannot import this module. Each rank validates on its half, in loader order.
    even = make_data(10, 1)

    class Halves(Quiet):
        def val_dataloader(self):
            rank = self.trainer.global_rank
            return DataLoader(TensorDataset(*(part[rank::2] for part in even.tensors)), batch_size=3)

    module = Halves()
    trainer = make_trainer(
        NoisyValidation(LEVELS), SaveRanges(), strategy="ddp_fork", devices=2, use_distributed_sampler=False
    )
    trainer.fit(module, DataLoader(dataset, batch_size=4))
    for rank in range(2):
        low, high = torch.load(tmp_path / f"ranges{rank}.pt")
        assert torch.equal(low, TRAIN_LOW)
        assert torch.equal(high, TRAIN_HIGH)
    np.testing.assert_allclose(logged(trainer), truth(module, even, batch_size=3, ranks=2), rtol=1e-5)


def test_validate_without_ranges():
    with pytest.raises(RuntimeError, match="to validate without either, pass feature_min and feature_max"):
        make_trainer(NoisyValidation()).validate(Module(), val_loader(), verbose=False)


class Holding(Shuffled):
    """A sampler that cannot be copied."""

    def __init__(self, n):
        super().__init__(n)
        self.stream = (i for i in range(n))


HAS_NAN = TensorDataset(TRAIN.tensors[0].index_fill(0, torch.tensor(7), torch.nan), TRAIN.tensors[1])


@pytest.mark.parametrize(
    ("make_loader", "kwargs", "error", "message"),
    [
        (
            lambda: [train_loader(), train_loader()],
            {},
            RuntimeError,
            "one training loader only, got a list: pass feature_min",
        ),
        (lambda: pl.utilities.CombinedLoader([train_loader()]), {}, RuntimeError, "loader only, got a CombinedLoader"),
        (lambda: iter(train_loader()), {}, RuntimeError, "use up: pass feature_min"),
        (lambda: 3, {}, RuntimeError, "one training loader only, got a int"),
        (
            lambda: train_loader(shuffle=False, sampler=Holding(22)),
            {},
            RuntimeError,
            "sampler BatchSampler cannot be copied: pass feature_min",
        ),
        (lambda: train_loader(HAS_NAN, shuffle=False), {}, ValueError, "training inputs hold NaN"),
        (
            lambda: train_loader(TensorDataset(torch.zeros(4, 4))),
            {},
            TypeError,
            r"a batch to be .* got a list of \['Tensor'\]: pass batch_to_xy=",
        ),
        (lambda: train_loader([{"x": 0.0}] * 4), {}, TypeError, "a batch to be .* got a dict: pass batch_to_xy="),
        (
            train_loader,
            {"batch_to_xy": lambda batch: (batch[0], None)},
            TypeError,
            r"what batch_to_xy returns to be .* of \['Tensor', 'NoneType'\]",
        ),
    ],
)
def test_training_data_that_ranges_cannot_be_learnt_from(make_loader, kwargs, error, message):
    with pytest.raises(error, match=message):
        learn(make_loader(), callback=kwargs)


def test_fit_without_training_data():
    # Lightning itself refuses this before the callback could: the callback is asked directly.
    trainer = make_trainer(callback := NoisyValidation())
    module = Module()
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, val_dataloaders=val_loader())
    with pytest.raises(RuntimeError, match="there is no training data: pass feature_min"):
        callback.on_fit_start(trainer, module)


def test_prediction_shape_is_checked_in_the_sanity_check():
    class Flat(Module):
        def forward(self, x):
            return self.net(x)[:, 0]

    with pytest.raises(ValueError, match="never broadcast"):
        learn(train_loader(), Flat())


def test_doctest():
    check_examples(NoisyValidation, 4)
