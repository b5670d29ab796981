"""Test-wide settings: the installed package is what is tested, on one thread, without noise."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# The checkout goes last: `kernels/` is imported as `lightning_lip.kernels`, never as a top-level package.
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == ROOT)


@pytest.fixture(autouse=True)
def _one_thread_and_quiet(tmp_path, monkeypatch):
    """Run every test in a folder of its own, on one thread, without Lightning's advice."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        yield
    torch.set_num_threads(threads)
