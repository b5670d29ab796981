"""Test-wide settings: the installed package is what is tested, seeded, on one thread, in a folder of its own."""

import importlib.util
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_utilities.core import rank_zero

ROOT = Path(__file__).resolve().parent.parent
# The checkout goes last: `kernels/` is imported as `lightning_lip.kernels`, never as a top-level package.
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == ROOT)
# What a test draws without a seed of its own is the same in every run; another number shakes the whole suite.
_spec = importlib.util.spec_from_file_location(
    "support",
    ROOT / "tests" / "support" / "__init__.py",
    submodule_search_locations=[str(ROOT / "tests" / "support")],
)
sys.modules["support"] = importlib.util.module_from_spec(_spec)
SEED = int(os.environ.get("LIGHTNING_LIP_TEST_SEED", "0"))
# What tests set for good, Lightning's `seed_everything` first, and what would change the text that is printed.
SET_BY_TESTS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
OF_TERMINALS = ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS")


def pytest_collectstart(collector):
    """Seed what a file draws while it is imported, whatever was collected before it."""
    if isinstance(collector, pytest.Module):
        _seed()


def _seed():
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  the global generator, which code under test may draw from
    random.seed(SEED)


@pytest.fixture(scope="module", autouse=True)
def _seeded_on_one_thread():
    """Run what a file's tests share on one thread, from one seed; it comes before the fixture of each test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _seed()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread_in_a_folder(tmp_path, monkeypatch):
    """Run every test in a folder of its own, on one thread, from one seed, in the environment that it found."""
    monkeypatch.chdir(tmp_path)
    for name in (*SET_BY_TESTS, *OF_TERMINALS):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
    _seed()
    yield
    torch.set_num_threads(1)
    for name in SET_BY_TESTS:
        os.environ.pop(name, None)
    # An autocast region left open would make every later one of this process keep the weights that it cast first.
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0, "an autocast region was left open"
    assert torch.is_grad_enabled(), "gradients were left disabled"


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    """Both Lightning packages: their classes differ, the callbacks must serve either."""
    # Before 2.6, pytorch_lightning refuses the callbacks of lightning.pytorch ("Expected a parent").
    return pytest.importorskip(request.param, minversion="2.6" if request.param == "pytorch_lightning" else None)


@pytest.fixture
def told(monkeypatch):
    """Return the texts that the package has told for information since the test began."""
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = rank_zero.log
    # Whatever an earlier test in this process made of them.
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 0, raising=False)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def make_trainer():
    """Return a factory of quiet CPU trainers of a Lightning package."""
    from support import trainers

    return trainers.make_trainer


@pytest.fixture
def regression_data():
    """Return a loader of 48 samples in 12 batches of 4, unshuffled: 4 features, one target."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, generator=generator)
    y = torch.sin(x).sum(1, keepdim=True)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


@pytest.fixture
def make_module():
    """Return a factory of small regression modules of a Lightning package; `loss_term(weights)` joins the loss."""
    from support import trainers

    return trainers.make_module
