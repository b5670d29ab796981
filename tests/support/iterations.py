"""What the tests of the kernels share: a penalised step with its defaults, forked processes, Numba's cache."""

import math
import multiprocessing
import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

from lightning_lip.kernels import PENALTY_CODES


def penalise(iteration, weights, grads, penalty="product", n_iterations=1, level=1.0, scale=1.0, uses=None):
    """Make a penalised step of an iteration, each layer used once if nothing else is said."""
    uses = [1] * len(weights) if uses is None else uses
    return iteration.penalise_(weights, grads, n_iterations, PENALTY_CODES[penalty], level, scale, uses)


def check_a_product_beyond_fp32(kind, knee):
    """Check a step of an implementation on four weights whose product of norms is 1e40, more than fp32 holds."""
    weights = [1e10 * torch.eye(n) for n in (3, 4, 5, 6)]
    grads = [torch.zeros_like(w) for w in weights]
    start = [torch.eye(n)[:1] for n in (3, 4, 5, 6)]
    value = penalise(kind(weights, start), weights, grads, level=knee, scale=1e-3)
    assert float(value) == pytest.approx(1e-3 * knee * (1 + 40 * math.log(10) - math.log(knee)), rel=1e-5)
    for grad in grads:
        assert float(grad.norm()) == pytest.approx(1e-3 * knee / 1e10, rel=1e-5)


def in_a_fork(function, *arguments):
    """Return what a function returns in a forked process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function(*arguments)), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return queue.get()


def run_apart(file, folder, *options, **environment):
    """Run a file of tests in a process of its own; returns the cases of JUnit's XML, and the output.

    The checkout must not be its working directory: `kernels` is a subpackage of the installed one.
    """
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", str(file), "-q", "--import-mode=importlib", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", *options]
    environment = os.environ | environment
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return cases, run.stdout + run.stderr


def cache_hits_and_misses(use, module):
    """Return how often Numba's cache had the function `run` of a compiled module, and how often not, in a new process.

    Args:
        use: Code that needs the function.
        module: Its module's name in kernels/cpu/compiled.
    """
    script = f"from lightning_lip.kernels.cpu.compiled.{module} import run\n{use}\n"
    script += "print(sum(run.stats.cache_hits.values()), sum(run.stats.cache_misses.values()))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, out.split()))
