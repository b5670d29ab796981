"""Training within a budget: how closely it is kept, what it leaves of the accuracy, and what a projection costs.

``python -m lightning_lip.bench.studies.constraint [--quick] [--output FOLDER]`` trains an MLP 64-128-128-128-10 on
scikit-learn's digits with each optimiser, budget M and metric, calls ``LipschitzProjector.step()`` after every step,
and writes ``constraint.csv``: the accuracy on the held-out digits, the largest true ``P / M - 1`` (by float64 SVD,
every 10th step), and the time of a projection beside that of a full fp32 SVD of all layers, taken in turn in the same
run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip import LipschitzProjector
from lightning_lip.bench.contenders.models import mlp
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.bench.studies.tracking import accuracy_of, batches_of, digits
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished

BATCH = 50
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}
COLUMNS = ["optimiser", "target", "metric", "steps", "accuracy", "largest_excess"]
COLUMNS += [f"{what}_us_{p}" for what in ("projection", "svd") for p in ("p20", "p50", "p80")]


def train(optimiser: str, target: float | None, metric: str, epochs: int) -> list[Any]:
    """Return one row of the table; without a target nothing is projected."""
    torch.manual_seed(0)
    inputs, labels, *test = digits()
    model = mlp(64, 128, 128, 128, 10)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    optimizer = OPTIMIZERS[optimiser](model.parameters())
    projector = None if target is None else LipschitzProjector(model, target, metric=metric)  # type: ignore[arg-type]
    if projector is not None:
        projector.exact()
    times: dict[str, list[float]] = {"projection": [], "svd": []}
    excess, n_steps = -np.inf, 0
    for x, y in batches_of(inputs, labels, BATCH, epochs):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        n_steps += 1
        if projector is None:
            continue
        if n_steps % 10 == 0:
            start = time.perf_counter()
            for weight in weights:
                torch.linalg.svd(weight.detach(), full_matrices=False)
            times["svd"].append(time.perf_counter() - start)
        start = time.perf_counter()
        projector.step()
        times["projection"].append(time.perf_counter() - start)
        if n_steps % 10 == 0:
            norms = [float(torch.linalg.matrix_norm(w.detach().double(), 2)) for w in weights]
            excess = max(excess, float(np.prod(norms)) / projector.target - 1)
    accuracy = f"{accuracy_of(model, *test):.3f}"
    row = [optimiser, target or "", metric, n_steps, accuracy, "" if target is None else f"{excess:.1e}"]
    for taken in times.values():
        row += [f"{1e6 * q:.0f}" for q in np.quantile(taken, [0.2, 0.5, 0.8])] if taken else ["", "", ""]
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print a table, write the CSV."""
    options = study_parser(__doc__, quick="one epoch instead of 10").parse_args(arguments)
    torch.set_num_threads(1)
    versions_used = versions("numba", "numpy")
    finished = Finished(options.output / "constraint.partial.jsonl", (options.quick, versions_used), list)
    rows = []
    for optimiser in OPTIMIZERS:
        cases = [(None, ""), *((m, metric) for m in (2.0, 10.0) for metric in ("relative", "euclidean"))]
        for target, metric in cases:
            one = partial(train, optimiser, target, metric, 1 if options.quick else 10)
            rows.append(finished.once((optimiser, target, metric), one))
            print(" ".join(f"{value!s:>12}" for value in rows[-1]), flush=True)
    write_csv(options.output / "constraint.csv", COLUMNS, rows, machine() | versions_used)
    finished.remove()


if __name__ == "__main__":
    with told_in_one_line("constraint"):
        main()
