import sys

import lightning.pytorch
import pytest
import torch
from support.audits import NETWORKS

from lightning_lip.paper.regimes.settings import Run


@pytest.fixture
def networks(tmp_path):
    (tmp_path / "audited_networks.py").write_text(NETWORKS)
    path = list(sys.path)
    yield "audited_networks"
    sys.modules.pop("audited_networks", None)
    assert sys.path == path, "the working folder must not stay on the path"


@pytest.fixture
def save_lightning(make_trainer):
    """Return a function that saves a Lightning checkpoint of a module, with changes to its contents."""

    def save(module, path, **changes):
        trainer = make_trainer(lightning.pytorch)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        if changes:
            torch.save(torch.load(path, weights_only=True) | changes, path)
        return str(path)

    return save


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory):
    """The checkpoint that the command `reproduce` leaves, after one epoch."""
    pytest.importorskip("mlxtend")
    pytest.importorskip("matplotlib")
    from lightning_lip.paper.data import load_boston
    from lightning_lip.paper.regimes.training import artefacts_of, train

    out = tmp_path_factory.mktemp("reproduced")
    run = Run("product", 0, n_norms=3, coefficient=0.0562, epochs=1)
    train(run, load_boston(), str(out))
    return out / artefacts_of(run)["checkpoint"]
