"""What every metric is checked for, beside its values: copies, several ranks, its documentation."""

import copy
import doctest
import importlib
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

copies = pytest.mark.parametrize(
    "copy_of", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, lambda m: m.clone()]
)


def on_two_ranks(make, work, folder):
    """Make a metric in each of two processes, before their group exists, and return what `work(metric, rank)` does."""
    # fork: the functions live in a test module that a new interpreter cannot import.
    torch.multiprocessing.start_processes(_run, args=(make, work, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def _run(rank, make, work, folder):
    torch.set_num_threads(1)
    metric = make()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(work(metric, rank), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def check_examples(owner, least):
    """Run the examples in the docstrings of a class's module, which are at least so many lines."""
    # By name: the package may export a function of the module's name.
    result = doctest.testmod(importlib.import_module(owner.__module__))
    assert result.attempted >= least
    assert result.failed == 0
