"""What is certified after training to the same loss with the symbol's norm, the spatial norm and no penalty.

``python -m lightning_lip.bench.convolutions.training [--quick] [--output FOLDER]`` trains a VGG-like network with batch
normalisation on scikit-learn's digits, enlarged to 16 x 16 pixels, until the mean loss of an epoch is at most .05, with
three seeds and two coefficients of the coupled penalty over all convolutions and the head. It writes
``symbol_training.csv``: the certified bound of the traced network, test accuracy, epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer, certify
from lightning_lip.bench.contenders.models import vgg
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.bench.studies.tracking import accuracy_of, batches_of, digits
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.messages import quiet

SEEDS = 3
LOSS, MOST_EPOCHS = 0.05, 40
SETTINGS = (("none", 0.0), ("symbol", 0.03), ("spatial", 0.03), ("symbol", 0.1), ("spatial", 0.1))
"""The norm, and the coefficient of log(1 + P)."""
BATCH, PIXELS = 64, 16


class Result(NamedTuple):
    """One training."""

    norm: str
    coefficient: float
    seed: int
    epochs: int
    loss: float
    accuracy: float
    log_certified: float


FORMATS = ("<9", "6.2f", "4", "5", "9.4f", "8.3f", "9.3f")


def train(norm: str, coefficient: float, seed: int, most_epochs: int) -> Result:
    """Train one network to the loss and certify it."""
    torch.manual_seed(seed)
    network = vgg()
    inputs, targets, test, classes = digits()
    images = [F.interpolate(x.view(-1, 1, 8, 8), PIXELS).expand(-1, 3, -1, -1).contiguous() for x in (inputs, test)]
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    regularizer = None
    if norm != "none":
        regularizer = LipschitzRegularizer(
            network,
            coefficient,
            "softplus_log",
            inputs=images[0][:2],
            convolutions=norm,  # type: ignore[arg-type]
        )
    epochs, loss = 0, math.inf
    while loss > LOSS and epochs < most_epochs:
        epochs += 1
        losses = []
        for x, y in batches_of(images[0], targets, BATCH, 1):
            optimiser.zero_grad()
            value = F.cross_entropy(network(x), y)
            torch.autograd.backward(value)
            if regularizer is not None:
                regularizer.add_grad_()
            optimiser.step()
            losses.append(float(value.detach()))
        loss = float(np.mean(losses))
    network.eval()
    result = certify(network, torch.zeros(1, 3, PIXELS, PIXELS))
    assert result.certified, result
    return Result(
        norm, coefficient, seed, epochs, loss, accuracy_of(network, images[1], classes), math.log(result.upper)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = study_parser(__doc__, quick="one seed, one epoch")
    options = parser.parse_args(arguments)
    seeds, most = (1, 1) if options.quick else (SEEDS, MOST_EPOCHS)
    about = machine() | versions("numba", "numpy", "torch") | {"loss": LOSS}
    finished = Finished(options.output / "symbol_training.partial.jsonl", (about, most), Result._make)
    results = []
    print(*Result._fields)
    for setting in SETTINGS:
        for seed in range(seeds):
            results.append(finished.once((*setting, seed), partial(train, *setting, seed, most)))
            print(*(format(x, how) for x, how in zip(results[-1], FORMATS, strict=True)), sep="", flush=True)
    write_csv(options.output / "symbol_training.csv", Result._fields, results, about)
    finished.remove()


if __name__ == "__main__":
    with quiet(), told_in_one_line("symbol_training"):
        main()
