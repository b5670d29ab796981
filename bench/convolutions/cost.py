"""The time of the penalty's hook on convolutional networks, by norm, beside a training step.

``python -m lightning_lip.bench.convolutions.cost [--quick] [--output FOLDER]`` times
``LipschitzRegularizer.add_grad_()`` with the norm of the symbol (4, 8 and 12 waves: 8, 16 and 24 real rows) and the
spatial norm (8 vectors and 1), the compiled kernels on the kernels reshaped to matrices at as many rows, torch's
``spectral_norm`` and one read of the kernels, all in turn with plain training steps at batch 32; then the hook alone at
images of 32, 64 and 128 pixels. It writes ``convolutions.csv`` and ``convolutions.png``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders.models import mobilenet, resnet18, vgg11
from lightning_lip.bench.studies.kernels import floor, kernel, torch_spectral_norm
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.reporting.documents import machine, replacing, versions, write_csv
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished
from lightning_lip.reporting.messages import quiet

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "VGG-11": vgg11,
    "MobileNet": mobilenet,
}
BATCH = 32
PIXELS = (32, 64, 128)
COLUMNS = ("model", "pixels", "contender", "rows", "samples", "p20_ms", "p50_ms", "p80_ms", "percent_of_a_step")
COEFFICIENT = 1e-6
_STEP = ("plain step", 0)

Contender = Callable[[], object]
Row = list[str | int | float]


def network_of(name: str) -> nn.Module:
    """Return a model with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()


def batch_of(pixels: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return random images (size, 3, pixels, pixels) and classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, pixels, pixels, generator=generator), torch.randint(10, (size,), generator=generator)


def hook(name: str, pixels: int, convolutions: str, block_size: int) -> Contender:
    """Return the hook of a network as the callback sees it: with the batch normalisations that an input shows."""
    network = network_of(name)
    inputs, _ = batch_of(pixels, 2)
    options = {"convolutions": convolutions, "block_size": block_size}
    regularizer = LipschitzRegularizer(network, COEFFICIENT, inputs=inputs, **options)  # type: ignore[arg-type]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return regularizer.add_grad_


def plain_step(name: str) -> Contender:
    """Return a step of SGD without a penalty."""
    network = network_of(name)
    inputs, targets = batch_of(32)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def call() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(inputs), targets))
        optimizer.step()

    return call


def contenders(name: str) -> dict[tuple[str, int], Contender]:
    """Return what is timed in turn at 32 pixels, by name and real rows."""
    layers = [m for m in network_of(name).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    matrices = [nn.Parameter(m.weight.detach().flatten(1).clone()) for m in layers]
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    found: dict[tuple[str, int], Contender] = {_STEP: plain_step(name)}
    found |= {("symbol", 2 * waves): hook(name, 32, "symbol", waves) for waves in (4, 8, 12)}
    found |= {("spatial", r): hook(name, 32, "spatial", r) for r in (1, 8)}
    found |= {("reshaped kernels", r): kernel(matrices, r) for r in (1, 8, 16)}
    found["torch spectral_norm, reshaped", 1] = torch_spectral_norm([tuple(m.shape) for m in matrices])  # type: ignore[misc]
    found["read of the kernels and gradients", 0] = floor(matrices)
    return found


def timed(found: dict[tuple[str, int], Contender], seconds: float, least: int) -> dict[tuple[str, int], list[float]]:
    """Return times of single calls, in milliseconds, of all contenders in turn, for about `seconds`."""
    times: dict[tuple[str, int], list[float]] = {key: [] for key in found}
    for call in found.values():
        call()
    begin = time.perf_counter()
    while len(times[next(iter(times))]) < least or time.perf_counter() - begin < seconds:
        for key, call in found.items():
            start = time.perf_counter()
            call()
            times[key].append((time.perf_counter() - start) * 1e3)
    return times


def rows_of(name: str, pixels: int, times: dict[tuple[str, int], list[float]]) -> list[Row]:
    """Return the table's rows of one model and size."""
    step = float(np.median(times[_STEP])) if _STEP in times else None
    table: list[Row] = []
    for (contender, rows), values in times.items():
        p20, p50, p80 = np.percentile(values, [20, 50, 80])
        share = f"{100 * p50 / step:.2f}" if step else ""
        table.append([name, pixels, contender, rows, len(values), f"{p20:.3f}", f"{p50:.3f}", f"{p80:.3f}", share])
    return table


def _at_32(name: str, seconds: float, least: int) -> list[Row]:
    return rows_of(name, 32, timed(contenders(name), seconds, least))


def _by_pixels(pixels: int, seconds: float, least: int) -> list[Row]:
    found = {
        ("symbol", 16): hook("ResNet-18", pixels, "symbol", 8),
        ("spatial", 8): hook("ResNet-18", pixels, "spatial", 8),
    }
    return rows_of("ResNet-18", pixels, timed(found, seconds, least))


def plot(path: Path, table: Sequence[Row], about: dict[str, object]) -> None:
    """Draw the shares of a step, and the hook's time against the size of the image."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(3, 2))
    shown = [row for row in table if row[-1] and row[2] != _STEP[0]]
    kinds = list(dict.fromkeys((row[2], row[3]) for row in shown))
    height = 0.8 / len(MODELS)
    for place, name in enumerate(dict.fromkeys(row[0] for row in shown)):
        shares = {(row[2], row[3]): float(row[-1]) for row in shown if row[0] == name}
        places = [len(kinds) - i - height * place for i in range(len(kinds))]
        left.barh(places, [shares[kind] for kind in kinds], height, label=str(name))
    left.set_yticks([len(kinds) - i - height for i in range(len(kinds))])
    left.set_yticklabels([f"{kind}" + (f", {rows} rows" if rows else "") for kind, rows in kinds], fontsize=8)
    left.set_xscale("log")
    left.set_xlabel("% of a training step, batch 32, 32 x 32 images")
    left.legend(fontsize=8, frameon=False)
    for kind, colour in (("symbol", "tab:blue"), ("spatial", "tab:orange")):
        chosen = [row for row in table if row[2] == kind and not row[-1]]
        right.plot([row[1] for row in chosen], [float(row[6]) for row in chosen], "o-", color=colour, label=kind)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(PIXELS, [str(p) for p in PIXELS])
    right.set_xlabel("pixels of a side")
    right.set_ylabel("ms a step, ResNet-18")
    right.legend(fontsize=8, frameon=False)
    figure.suptitle(f"The penalty of convolutions; {about['cpu']}, {about['threads']} threads", fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = study_parser(__doc__, quick="a few calls of each, without images of 128 pixels")
    options = parser.parse_args(arguments)
    about = machine() | versions("numba", "numpy", "torch")
    seconds, least = (0.0, 3) if options.quick else (60.0, 15)
    finished = Finished(options.output / "convolutions.partial.jsonl", (about, seconds), list[Row])
    table: list[Row] = []
    tasks = [(name, partial(_at_32, name, seconds, least)) for name in MODELS]
    tasks += [(f"{p} pixels", partial(_by_pixels, p, seconds / 4, 3)) for p in PIXELS[: 2 if options.quick else 3]]
    for task, compute in tasks:
        added = finished.once(task, compute)
        for row in added:
            print(f"  {row[0]:10}{row[1]:>4} px  {row[2]:34}{row[3] or '':>3}{row[6]:>12} ms  {row[8]:>7}", flush=True)
        table += added
    write_csv(options.output / "convolutions.csv", COLUMNS, table, about)
    plot(options.output / "convolutions.png", table, about)
    finished.remove()


if __name__ == "__main__":
    with quiet(), told_in_one_line("convolutions"):
        main()
