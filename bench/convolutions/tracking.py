"""How closely the symbol's norm is followed while ResNet-18 trains, at widths 64 to 512.

``python -m lightning_lip.bench.convolutions.tracking [--quick] [--output FOLDER]`` trains ResNet-18 on random labels of
random images (the hardest case: nothing settles) under the product penalty, and compares at every step, for one 3 x 3
convolution of each width, the estimate after the penalty's step with the symbol's norm: all cells of a copy iterated
to convergence, which is compared with a dense grid of frequencies at the end. It writes ``symbol_tracking.csv``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders.models import resnet18
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.kernels.symbol import n_cells, symbol_step
from lightning_lip.kernels.waves import Geometry
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.messages import quiet

WIDTHS = (64, 128, 256, 512)
WAVES = ((4, 1), (8, 1), (12, 1), (8, 2))
"""Waves and iterations a step."""
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
}
COEFFICIENT = 1e-2
"""Ten times the default: what is followed is pressed down hard."""
BATCH, PIXELS, STEPS = 16, 16, 60
CONVERGED = 30
"""Steps of all cells that are taken for the truth."""
GRID = 24
"""Frequencies along a dimension of the dense grid: the norm there lies at most 1 / cos(pi / 24)^2 - 1 = 1.7% below."""


class Result(NamedTuple):
    """One training: relative errors of sigma over its steps, at one width."""

    optimiser: str
    waves: int
    iterations: int
    width: int
    median: float
    mean: float
    p90: float
    over_1_percent: float
    grid_over_truth: float
    hook_ms: float
    product: float


FORMATS = ("<6", "4", "4", "6", "10.1e", "10.1e", "10.1e", "8.1%", "9.5f", "9.2f", "10.3g")


def convolutions_of(network: nn.Module) -> dict[int, str]:
    """Return the name of the last 3 x 3 convolution of stride 1 at each width."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.stride == (1, 1):
            found[module.out_channels] = name
    return {width: found[width] for width in WIDTHS}


@torch.no_grad()
def truth(kernel: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the symbol's norm, and the state in which it was found, from which the next step's is."""
    geometry = Geometry(len(kernel), kernel.shape[1], 1, (3, 3), (1, 1), (1, 1))
    if state is None:
        from lightning_lip.kernels.symbol import started

        state = started(kernel, geometry, torch.Generator().manual_seed(1))
    step = symbol_step(kernel, state, geometry, n_cells(geometry), CONVERGED)
    return step.sigma, step.state


@torch.no_grad()
def on_grid(kernel: Tensor) -> Tensor:
    """Return the largest norm of the symbol on a dense grid."""
    symbols = torch.fft.fft2(kernel, s=(GRID, GRID)).permute(2, 3, 0, 1)[: GRID // 2 + 1].flatten(0, 1)
    return torch.stack([torch.linalg.matrix_norm(symbol, 2) for symbol in symbols]).max()


def train(optimiser: str, waves: int, iterations: int, steps: int) -> list[Result]:
    """Train once and return the errors at each width."""
    torch.manual_seed(0)
    network = resnet18()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8 * BATCH, 3, PIXELS, PIXELS, generator=generator)
    labels = torch.randint(10, (len(images),), generator=generator)
    regularizer = LipschitzRegularizer(
        network, COEFFICIENT, exclude=nn.BatchNorm2d, block_size=waves, n_iterations=iterations
    )
    steps_of = OPTIMISERS[optimiser](network.parameters())
    names = convolutions_of(network)
    kernels = {width: network.get_parameter(f"{name}.weight") for width, name in names.items()}
    states: dict[int, Tensor | None] = dict.fromkeys(names)
    errors: dict[int, list[float]] = {width: [] for width in names}
    times = []
    for index in range(steps):
        rows = torch.arange(BATCH) + BATCH * (index % 8)
        steps_of.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(images[rows]), labels[rows]))
        start = time.perf_counter()
        regularizer.add_grad_()
        times.append(time.perf_counter() - start)
        sigmas = regularizer.spectral_norms()
        for width, kernel in kernels.items():
            exact, states[width] = truth(kernel.detach(), states[width])
            errors[width].append(float(1 - sigmas[names[width]] / exact))
        steps_of.step()
    results = []
    for width, values in errors.items():
        found = np.array(values)
        exact, _ = truth(kernels[width].detach(), states[width])
        ratio = float(on_grid(kernels[width].detach()) / exact)
        results.append(
            Result(
                optimiser,
                waves,
                iterations,
                width,
                median=float(np.median(found)),
                mean=float(found.mean()),
                p90=float(np.quantile(found, 0.9)),
                over_1_percent=float((found > 0.01).mean()),
                grid_over_truth=ratio,
                hook_ms=1e3 * float(np.median(times)),
                product=float(regularizer.bound()),
            )
        )
    return results


def decode(rows: list[list[float]]) -> list[Result]:
    """Return the results that JSON gives."""
    return [Result(*row) for row in rows]  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = study_parser(__doc__, quick="two steps of one setting")
    options = parser.parse_args(arguments)
    steps = 2 if options.quick else STEPS
    about = machine() | versions("numba", "numpy", "torch") | {"steps": steps, "coefficient": COEFFICIENT}
    finished = Finished(options.output / "symbol_tracking.partial.jsonl", about, decode)
    results: list[Result] = []
    print(*Result._fields)
    settings = list(product(OPTIMISERS, WAVES))[: 1 if options.quick else None]
    for optimiser, (waves, iterations) in settings:
        added = finished.once((optimiser, waves, iterations), partial(train, optimiser, waves, iterations, steps))
        for result in added:
            print(*(format(x, how) for x, how in zip(result, FORMATS, strict=True)), sep="", flush=True)
        results += added
    write_csv(options.output / "symbol_tracking.csv", Result._fields, results, about)
    finished.remove()


if __name__ == "__main__":
    with quiet(), told_in_one_line("symbol_tracking"):
        main()
