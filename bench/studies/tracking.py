"""How closely sigma follows the weights while they train, by block size and iterations, with the cost beside it.

``python -m lightning_lip.bench.studies.tracking [--quick] [--output FOLDER]`` trains an MLP 64-128-128-128-10 on
scikit-learn's digits with each optimiser, penalty, block size r and number of iterations k, and compares, at every step
and layer, the sigma of the gradient that ``add_grad_`` adds (``u^T W v`` of its direction ``u v^T``) with a float64
SVD. It writes ``tracking.csv`` and prints the table that the default block size rests on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.extras import extra
from lightning_lip.reporting.finished import Finished

BLOCK_SIZES = (1, 2, 4, 8, 16)
ITERATIONS = (1, 2, 3)
# (name, coefficient, target): strong enough to halve the bound, so that singular values are pressed together and cross.
PENALTIES = (("product", 1e-3, 1.0), ("softplus_log", 0.1, 1.0))
LEARNING_RATES = {"SGD": 0.5, "Adam": 1e-3}
BATCH = 128
DEFAULT_BLOCK_SIZE = 8


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


def train(optimiser: str, penalty: tuple[str, float, float], r: int, k: int, epochs: int, data: list[Tensor]) -> Result:
    """Train one network and compare sigma with the SVD at every step."""
    torch.manual_seed(0)
    name, coefficient, target = penalty
    sizes = (64, 128, 128, 128, 10)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    regularizer = LipschitzRegularizer(
        model,
        coefficient,
        name,  # type: ignore[arg-type]
        target=target,
        block_size=r,
        n_iterations=k,
    )
    kind = torch.optim.SGD if optimiser == "SGD" else torch.optim.Adam
    steps = kind(model.parameters(), lr=LEARNING_RATES[optimiser])
    generator = torch.Generator().manual_seed(0)
    inputs, targets, test_inputs, test_targets = data
    errors: list[float] = []
    times: list[float] = []
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(inputs), generator=generator), BATCH):
            steps.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(inputs[batch]), targets[batch]))
            of_loss = [_taken(w) for w in weights]
            start = time.perf_counter()
            regularizer.add_grad_()
            times.append(time.perf_counter() - start)
            errors += [_error(w) for w in weights]
            for weight, grad in zip(weights, of_loss, strict=True):
                assert weight.grad is not None
                weight.grad += grad
            steps.step()
    with torch.no_grad():
        accuracy = float((model(test_inputs).argmax(1) == test_targets).float().mean())
        log_bound = float(sum(torch.linalg.matrix_norm(w.double(), 2).log() for w in weights))
    finite = np.array([e for e in errors if e == e])
    return Result(
        optimiser,
        name,
        r,
        k,
        float(np.median(finite)),
        float(np.quantile(finite, 0.99)),
        float((finite > 0.01).mean()),
        float(np.median(times)) * 1e6,
        accuracy,
        log_bound,
    )


def _taken(weight: Tensor) -> Tensor:
    """Return the gradient and leave zeros in its place, so that the penalty's own gradient can be seen."""
    assert weight.grad is not None
    gradient = weight.grad.clone()
    weight.grad.zero_()
    return gradient


@torch.no_grad()
def _error(weight: Tensor) -> float:
    """Return by how much ``u^T W v`` of the penalty's gradient falls short of the spectral norm, relative to it."""
    assert weight.grad is not None
    direction = weight.grad.double()
    exact = torch.linalg.svdvals(weight.double())[0]
    # NaN where the penalty asked for nothing.
    return float(1 - (direction * weight.double()).sum() / direction.norm() / exact)


def choice(results: Sequence[Result]) -> str:
    """Say in words what the table says about the block size."""

    def worst(r: int, k: int) -> tuple[float, float, float, float]:
        runs = [x for x in results if (x.r, x.k) == (r, k)]
        return (
            max(x.median for x in runs),
            max(x.p99 for x in runs),
            max(x.share_over_1_percent for x in runs),
            float(np.median([x.cost_us for x in runs])),
        )

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
    print(
        f"{'optimiser':10}{'penalty':14}{'r':>3}{'k':>3}{'median':>10}{'p99':>10}{'>1%':>8}{'us':>8}{'acc':>7}{'S':>7}"
    )
    for optimiser in LEARNING_RATES:
        for penalty in PENALTIES:
            for r in BLOCK_SIZES:
                for k in ITERATIONS:
                    one = partial(train, optimiser, penalty, r, k, epochs, data)
                    x = finished.once((optimiser, penalty, r, k), one)
                    results.append(x)
                    print(
                        f"{x.optimiser:10}{x.penalty:14}{x.r:3}{x.k:3}{x.median:10.1e}{x.p99:10.1e}"
                        f"{x.share_over_1_percent:8.1%}{x.cost_us:8.0f}{x.accuracy:7.3f}{x.log_bound:7.2f}",
                        flush=True,
                    )
    print(choice(results))
    write_csv(options.output / "tracking.csv", Result._fields, results, about)
    finished.remove()


if __name__ == "__main__":
    main()
