"""What a penalty presses where normalisations follow the layers: products against the bound of the traced network.

``python -m lightning_lip.bench.convolutions.normalisation [--quick] [--output FOLDER]`` trains a ResNet-18 of width 16
on 64 random images with random labels for 100 steps, with SGD and Adam: without a penalty, with the product of the
layers' norms alone (batch normalisations left out), with the product as the callback finds it (each fused with its
layer), and with the bound of the traced network. All penalties have the default coefficient and knee. It writes
``normalisation.csv``: the last loss, and the logarithms of the two products and of the traced bound, in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders.models import resnet18
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.messages import quiet

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
}
PENALISED = ("nothing", "layers alone", "fused product", "traced bound")
SEEDS = 3
STEPS, BATCH, N_IMAGES, PIXELS = 100, 16, 64, 32
COEFFICIENT = 1e-3
READ_ITERATIONS = 30


class Result(NamedTuple):
    """One training."""

    optimiser: str
    penalised: str
    seed: int
    loss: float
    log_layers: float
    log_product: float
    log_bound: float


FORMATS = ("<6", "<16", "3", "10.4f", "9.2f", "9.2f", "9.2f")


def what_is_penalised(penalised: str, example: Tensor) -> dict[str, Any]:
    """Return the arguments of a regulariser that has one of the three meanings."""
    if penalised == "layers alone":
        return {"exclude": nn.BatchNorm2d}
    return {"inputs": example} if penalised == "fused product" else {"example_input": example}


def log_bound_of(network: nn.Module, penalised: str, example: Tensor) -> float:
    """Return the logarithm of a product or bound of a network in eval mode, with norms iterated afresh."""
    network = copy.deepcopy(network).eval()
    regularizer = LipschitzRegularizer(
        network, 0.0, n_iterations=READ_ITERATIONS, **what_is_penalised(penalised, example)
    )
    with torch.no_grad():
        return float(regularizer.log_bound())


def train(optimiser: str, penalised: str, seed: int, steps: int) -> Result:
    """Train once."""
    torch.manual_seed(seed)
    network = resnet18(width=16)
    images, labels = torch.randn(N_IMAGES, 3, PIXELS, PIXELS), torch.randint(10, (N_IMAGES,))
    steps_of = OPTIMISERS[optimiser](network.parameters())
    arguments = what_is_penalised(penalised, images[:2])
    regularizer = None if penalised == "nothing" else LipschitzRegularizer(network, COEFFICIENT, **arguments)
    losses = []
    for index in range(steps):
        rows = torch.arange(BATCH) + BATCH * (index % (N_IMAGES // BATCH))
        steps_of.zero_grad()
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        torch.autograd.backward(loss)
        if regularizer is not None:
            regularizer.add_grad_()
        steps_of.step()
        losses.append(float(loss.detach()))
    last = losses[-N_IMAGES // BATCH :]
    bounds = [log_bound_of(network, meaning, images[:2]) for meaning in PENALISED[1:]]
    return Result(optimiser, penalised, seed, sum(last) / len(last), *bounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = study_parser(__doc__, quick="two steps, one seed")
    options = parser.parse_args(arguments)
    steps, seeds = (2, 1) if options.quick else (STEPS, SEEDS)
    torch.set_num_threads(1)
    about = machine() | versions("numba", "numpy", "torch") | {"steps": steps}
    finished = Finished(options.output / "normalisation.partial.jsonl", about, Result._make)
    results = []
    print(*Result._fields)
    for optimiser, penalised, seed in product(OPTIMISERS, PENALISED, range(seeds)):
        task = partial(train, optimiser, penalised, seed, steps)
        results.append(finished.once((optimiser, penalised, seed), task))
        print(*(format(x, how) for x, how in zip(results[-1], FORMATS, strict=True)), sep="", flush=True)
    write_csv(options.output / "normalisation.csv", Result._fields, results, about)
    finished.remove()


if __name__ == "__main__":
    with quiet(), told_in_one_line("normalisation"):
        main()
