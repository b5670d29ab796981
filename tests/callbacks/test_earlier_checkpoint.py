"""A checkpoint of an earlier version of this package loads with equal tensors, and training goes on from it.

``data/c6b1ec0.ckpt`` was written at commit c6b1ec0, with torch 2.13.0 and Lightning 2.6.6 on a CPU, by this very file
(``python tests/callbacks/test_earlier_checkpoint.py c6b1ec0.ckpt``, with the package of that commit installed): it uses
public names only.
"""

import sys
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_lip import (
    LipschitzConstraint,
    LipschitzMixin,
    LipschitzMonitor,
    LipschitzPenalty,
    LipschitzRegularizer,
    NoisyValidation,
)
from lightning_lip.paper import PaperRegressor

PATH = Path(__file__).parent / "data" / "c6b1ec0.ckpt"


class Penalised(LipschitzMixin, PaperRegressor):
    """The paper's network in small; its mixin's singular vectors are in the checkpoint too."""

    def configure_lipschitz(self):
        return LipschitzRegularizer(self, 0.01, penalty="softplus_log", block_size=2, seed=1)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.lipschitz_penalty()


def module():
    return Penalised(in_features=3, width=4, depth=2, learning_rate=0.01, seed=2)


def callbacks():
    return [
        LipschitzPenalty(0.05, "product", block_size=2, n_iterations=1, every_n_steps=2, warmup_steps=9, seed=3),
        LipschitzConstraint(1.5, "joint", "relative", initial_target=2.0, tighten_steps=9, block_size=2, seed=4),
        LipschitzMonitor(layers="net.2", block_size=2, n_iterations=1, seed=5, name="one"),
        NoisyValidation(noise_levels=(0.0, 0.2), seed=6),
    ]


def fit(max_epochs, *more, **arguments):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*callbacks(), *more],
    )
    trainer.fit(module(), data, data, **arguments)
    return trainer


def leaves(value, key=()):
    """Yield what is in nested dicts and lists, each with the keys that lead to it; an empty one is a leaf."""
    if isinstance(value, dict | list) and value:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*key, name))
    else:
        yield key, value


def assert_equal(ours, theirs):
    ours, theirs = dict(leaves(ours)), dict(leaves(theirs))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[key], value), key
        else:
            # The certified bound is computed anew: another BLAS may round it otherwise.
            assert ours[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key


def saved(trainer):
    """Return what a checkpoint of the present state would hold of ours."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    return {key: checkpoint[key] for key in ("callbacks", "lipschitz", "lightning_lip_module", "hyper_parameters")}


@pytest.fixture
def checkpoint():
    return torch.load(PATH, weights_only=True)


def test_it_holds_every_state(checkpoint):
    states = {key: state for key, state in checkpoint["callbacks"].items() if "Lipschitz" in key or "Noisy" in key}
    assert {key: set(state) for key, state in states.items()} == {
        "LipschitzPenalty": {"n_steps", "optimizer_steps", "regularizer"},
        "LipschitzConstraint": {"n_steps", "projector", "target", "certified_bound"},
        "LipschitzMonitor[one]": {"histories", "own"},
        "NoisyValidation[prefix='val/noisy_mae']": {"feature_min", "feature_max"},
    }
    vectors = checkpoint["lipschitz"]["vectors"], states["LipschitzPenalty"]["regularizer"]["vectors"]
    assert all(set(blocks) == {"net.0", "net.2", "net.4"} for blocks in vectors)
    assert set(states["LipschitzConstraint"]["projector"]["blocks"]) == {"net.0", "net.2", "net.4"}
    assert set(states["LipschitzMonitor[one]"]["own"]["vectors"]) == {"net.2"}


def test_the_network_loads_by_the_name_in_the_file(checkpoint):
    from lightning_lip.audit.checkpoints import load_network

    for model in (
        load_network(str(PATH)),
        Penalised.load_from_checkpoint(PATH),
        PaperRegressor.load_from_checkpoint(PATH),
    ):
        assert_equal(dict(model.state_dict()), dict(checkpoint["state_dict"]))


@pytest.mark.filterwarnings("error:The saved singular vectors", "error:.*singular vectors.*")
def test_training_goes_on_from_equal_states(checkpoint):
    class Look(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            found = saved(trainer)
            assert_equal(found, {key: checkpoint[key] for key in found})
            self.looked = True

    fit(2, look := Look(), ckpt_path=PATH)
    assert look.looked


def test_two_resumed_runs_agree_bit_for_bit():
    first, second = (fit(3, ckpt_path=PATH) for _ in range(2))
    assert_equal(saved(first), saved(second))
    assert_equal(dict(first.lightning_module.state_dict()), dict(second.lightning_module.state_dict()))
    assert first.callbacks[0].state_dict()["n_steps"] == 18


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(1).save_checkpoint(sys.argv[1])
