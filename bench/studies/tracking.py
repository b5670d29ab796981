"""How closely sigma follows the weights while they train, by block size and iterations, with the cost beside it.

``python -m lightning_lip.bench.studies.tracking [--quick] [--output FOLDER]`` trains an MLP 64-128-128-128-10 on
scikit-learn's digits with each optimiser, penalty, block size r and number of iterations k, and compares, at every step
and layer, the sigma of the gradient that ``add_grad_`` adds (``u^T W v`` of its direction ``u v^T``) with a float64
SVD. It writes ``tracking.csv`` and prints the table that the default block size rests on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders.models import mlp
from lightning_lip.bench.studies.kernels import grad_of
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.penalty.penalties import PenaltyName
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.extras import extra
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished

BLOCK_SIZES = (1, 2, 4, 8, 16)
ITERATIONS = (1, 2, 3)
# (name, coefficient, target): strong enough to halve the bound, so that singular values are pressed together and cross.
PENALTIES: tuple[tuple[PenaltyName, float, float], ...] = (("product", 1e-3, 1.0), ("softplus_log", 0.1, 1.0))
LEARNING_RATES = {"SGD": 0.5, "Adam": 1e-3}
BATCH = 128
DEFAULT_BLOCK_SIZE = 8


FORMATS = ("<10", "<14", "3", "3", "10.1e", "10.1e", "8.1%", "8.0f", "7.3f", "7.2f")
"""How the fields of a :class:`Result` are printed."""


class Result(NamedTuple):
    """One run: relative errors of sigma over all steps and layers, and what the penalty cost and did."""

    optimiser: str
    penalty: str
    r: int
    k: int
    median: float
    p99: float
    share_over_1_percent: float
    cost_us: float
    accuracy: float
    log_bound: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's digits, shuffled: 1400 to train and 397 to test, inputs (., 64) centred."""
    images, labels = extra("sklearn.datasets", "paper").load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs = torch.from_numpy((images[order] / 16).astype(np.float32))
    inputs -= inputs[:1400].mean(0)
    targets = torch.from_numpy(labels[order])
    return inputs[:1400], targets[:1400], inputs[1400:], targets[1400:]


def batches_of(inputs: Tensor, targets: Tensor, size: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of so many epochs, shuffled in the same way at every call."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(inputs), generator=generator), size):
            yield inputs[rows], targets[rows]


@torch.no_grad()
def accuracy_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of inputs whose class the model finds."""
    return float((model(inputs).argmax(1) == targets).float().mean())


def train(
    optimiser: str, penalty: tuple[PenaltyName, float, float], r: int, k: int, epochs: int, data: list[Tensor]
) -> Result:
    """Train one network and compare sigma with the SVD at every step."""
    torch.manual_seed(0)
    name, coefficient, target = penalty
    model = mlp(64, 128, 128, 128, 10)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    options: dict[str, Any] = {"target": target, "block_size": r, "n_iterations": k}
    regularizer = LipschitzRegularizer(model, coefficient, name, **options)
    kind = torch.optim.SGD if optimiser == "SGD" else torch.optim.Adam
    steps = kind(model.parameters(), lr=LEARNING_RATES[optimiser])
    inputs, targets, *test = data
    errors, times = [], []
    for x, y in batches_of(inputs, targets, BATCH, epochs):
        steps.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        # Zeros in the place of the loss's gradients, so that the penalty's own can be seen.
        of_loss = [grad_of(w).clone() for w in weights]
        for weight in weights:
            grad_of(weight).zero_()
        start = time.perf_counter()
        regularizer.add_grad_()
        times.append(time.perf_counter() - start)
        errors += [_error(w) for w in weights]
        for weight, grad in zip(weights, of_loss, strict=True):
            grad_of(weight).add_(grad)
        steps.step()
    with torch.no_grad():
        log_bound = float(sum(torch.linalg.matrix_norm(w.double(), 2).log() for w in weights))
    finite = np.array([e for e in errors if e == e])
    median, p99 = np.quantile(finite, [0.5, 0.99]).tolist()
    cost_us = float(np.median(times)) * 1e6
    return Result(
        optimiser, name, r, k, median, p99, float((finite > 0.01).mean()), cost_us, accuracy_of(model, *test), log_bound
    )


@torch.no_grad()
def _error(weight: Tensor) -> float:
    """Return by how much ``u^T W v`` of the penalty's gradient falls short of the spectral norm, relative to it."""
    direction = grad_of(weight).double()
    exact = torch.linalg.svdvals(weight.double())[0]
    # NaN where the penalty asked for nothing.
    return float(1 - (direction * weight.double()).sum() / direction.norm() / exact)


def choice(results: Sequence[Result]) -> str:
    """Say in words what the table says about the block size."""

    def worst(r: int, k: int) -> tuple[float, float, float, float]:
        runs = [(x.median, x.p99, x.share_over_1_percent, x.cost_us) for x in results if (x.r, x.k) == (r, k)]
        medians, p99s, shares, costs = zip(*runs, strict=True)
        return max(medians), max(p99s), max(shares), float(np.median(costs))

    lines = ["The worst of the optimisers and penalties:"]
    for r in BLOCK_SIZES:
        for k in (1, ITERATIONS[-1]):
            median, p99, share, cost = worst(r, k)
            lines.append(
                f"  r = {r:2}, k = {k}: median {median:.1e}, p99 {p99:.1e}, over 1% {share:6.1%}, {cost:.0f} us"
            )
    chosen, iterated, wider = worst(DEFAULT_BLOCK_SIZE, 1), worst(1, ITERATIONS[-1]), worst(2 * DEFAULT_BLOCK_SIZE, 1)
    lines.append(
        f"The default is r = {DEFAULT_BLOCK_SIZE}, k = 1. Iterations do not replace vectors: r = 1 with "
        f"{ITERATIONS[-1]} of them costs {iterated[3] / chosen[3]:.2f} of it here, with {iterated[0] / chosen[0]:.0f} "
        "times its median error, and on weights that do not fit the cache every iteration is one more read of them, "
        f"which further vectors are not. r = {2 * DEFAULT_BLOCK_SIZE} costs {wider[3] / chosen[3]:.2f} times as much "
        f"and divides the p99 by {chosen[1] / wider[1]:.1f}."
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = study_parser(__doc__, quick="two epochs a run")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args(arguments)
    # Matrices of 128 x 128: threads would only wait for each other.
    torch.set_num_threads(1)
    data = list(digits())
    epochs = 2 if options.quick else options.epochs
    about = machine() | versions("numba", "numpy") | {"epochs": epochs}
    finished = Finished(options.output / "tracking.partial.jsonl", about, Result._make)
    results = []
    print(*Result._fields)
    for setting in product(LEARNING_RATES, PENALTIES, BLOCK_SIZES, ITERATIONS):
        results.append(finished.once(setting, partial(train, *setting, epochs, data)))
        print(*(format(x, how) for x, how in zip(results[-1], FORMATS, strict=True)), sep="", flush=True)
    print(choice(results))
    write_csv(options.output / "tracking.csv", Result._fields, results, about)
    finished.remove()


if __name__ == "__main__":
    with told_in_one_line("tracking"):
        main()
