"""Time of one power step with its gradient, against what is used today and against the floor of memory traffic.

``python -m lightning_lip.bench.studies.kernels [--quick] [--threads N] [--output FOLDER]`` writes ``kernels.csv`` and
``kernels.png``. All contenders of a model run in turn, so that whatever else the machine does falls on all of them;
medians with p20 and p80 of one call, in microseconds. This measures the CPU;
:mod:`lightning_lip.bench.gpu` measures a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer, kernels
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.kernels.gpu.tables import predicted_traffic
from lightning_lip.penalty.penalties import KNEE
from lightning_lip.reporting.documents import machine, replacing, versions, write_csv
from lightning_lip.reporting.extras import install_command
from lightning_lip.reporting.failures import told_in_one_line
from lightning_lip.reporting.finished import Finished

Shapes = list[tuple[int, int]]
Contender = Callable[[], object]

MODELS: dict[str, Shapes] = {
    "MLP 13-20-20-20-1": [(20, 13), (20, 20), (20, 20), (1, 20)],
    "32 x 64^2": [(64, 64)] * 32,
    "784-1024^3-10": [(1024, 784), (1024, 1024), (1024, 1024), (10, 1024)],
    "4 x 4096^2": [(4096, 4096)] * 4,
    "GPT-2 small": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
}
BLOCK_SIZES = (1, 8)
COEFFICIENT = 1e-6
# An SVD costs some p^2 q: beyond this it takes minutes a call.
MAX_SVD_WORK = 5e9
COLUMNS = ("model", "contender", "r", "samples", "p20_us", "p50_us", "p80_us", "over_loop", "over_floor")


def parameters(shapes: Shapes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return random weights with spectral norms near one, with gradients of zeros."""
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for m, n in shapes:
        weight = torch.randn(m, n, generator=generator, device=device) / (m**0.5 + n**0.5)
        weights.append(nn.Parameter(weight.to(dtype)))
        weights[-1].grad = torch.zeros_like(weight, dtype=dtype)
    return weights


def grad_of(weight: Tensor) -> Tensor:
    """Return the gradient of a weight that has one."""
    assert weight.grad is not None
    return weight.grad


def start_blocks(weights: Sequence[Tensor], r: int) -> list[Tensor]:
    """Return orthonormal starting blocks, each of shape (r, min(m, n))."""
    drawn = [torch.randn(min(w.shape), min(r, *w.shape)).to(w.device) for w in weights]
    return [torch.linalg.qr(columns).Q.T.contiguous() for columns in drawn]


def python_loop(weights: Sequence[nn.Parameter]) -> Contender:
    """(a) One vector a layer, in a loop of mv, normalise and addr_, with the product's derivative."""
    vectors = [F.normalize(torch.randn(w.shape[1], device=w.device), dim=0).to(w.dtype) for w in weights]

    @torch.no_grad()
    def call() -> Tensor:
        left, norms = [], []
        for index, weight in enumerate(weights):
            left.append(F.normalize(torch.mv(weight, vectors[index]), dim=0))
            product = torch.mv(weight.T, left[-1])
            norms.append(torch.linalg.vector_norm(product))
            vectors[index] = product / norms[-1]
        sigma = torch.stack(norms)
        value = COEFFICIENT * sigma.prod()
        coefficients = value / sigma
        for weight, u, c, v in zip(weights, left, coefficients, vectors, strict=True):
            grad_of(weight).addr_(u * c, v)
        return value

    return call


def autograd_loop(weights: Sequence[nn.Parameter]) -> Contender:
    """(b) The same iteration, and autograd through u^T W v and the product."""
    vectors = [F.normalize(torch.randn(w.shape[1]), dim=0) for w in weights]

    def call() -> None:
        norms = []
        for index, weight in enumerate(weights):
            with torch.no_grad():
                left = F.normalize(torch.mv(weight, vectors[index]), dim=0)
                vectors[index] = F.normalize(torch.mv(weight.T, left), dim=0)
            norms.append(left @ torch.mv(weight, vectors[index]))
        torch.autograd.backward(COEFFICIENT * torch.stack(norms).prod())

    return call


def torch_spectral_norm(shapes: Shapes, device: str = "cpu") -> Contender:
    """(c) torch's parametrization: its power iteration, the weight divided by sigma, and the way back."""
    layers = [nn.Linear(n, m, bias=False, device=device) for m, n in shapes]
    for layer in layers:
        nn.utils.parametrizations.spectral_norm(layer)
    upstream = [torch.full(shape, 1e-3, device=device) for shape in shapes]

    def call() -> None:
        torch.autograd.backward([layer.weight for layer in layers], upstream)

    return call


def floor(weights: Sequence[nn.Parameter]) -> Contender:
    """(e) One read of the weights, and one read and one write of the gradients."""

    @torch.no_grad()
    def call() -> None:
        for weight in weights:
            weight.sum()
        for weight in weights:
            grad_of(weight).add_(1e-9)

    return call


def kernel(weights: Sequence[nn.Parameter], r: int) -> Contender:
    """One call of the compiled kernel of the weights' device, with the collection of the pointers."""
    ((_, iteration),) = kernels.iterations_for(weights, start_blocks(weights, r))
    multiplicities = [1] * len(weights)

    def call() -> Tensor:
        grads = [w.grad for w in weights]
        return iteration.penalise_(
            weights, grads, 1, kernels.PENALTY_CODES["product"], KNEE, COEFFICIENT, multiplicities
        )

    return call


def add_grad(weights: Sequence[nn.Parameter], r: int) -> Contender:
    """Return all that a training step pays: ``LipschitzRegularizer.add_grad_()``."""
    layers = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in weights])
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
    return LipschitzRegularizer(layers, COEFFICIENT, block_size=r).add_grad_


def contenders(shapes: Shapes) -> dict[tuple[str, int], Contender]:
    """Return what is timed for one model, by name and block size (0 where there is none)."""
    weights = parameters(shapes)
    found: dict[tuple[str, int], Contender] = {
        ("(e) floor", 0): floor(weights),
        ("(a) Python loop", 1): python_loop(weights),
        ("(b) autograd through the loop", 1): autograd_loop(parameters(shapes)),
        ("(c) torch spectral_norm", 1): torch_spectral_norm(shapes),
    }
    if sum(min(s) ** 2 * max(s) for s in shapes) < MAX_SVD_WORK:
        found["(d) matrix_norm(W, 2)", 0] = lambda: [torch.linalg.matrix_norm(w.detach(), 2) for w in weights]
    for r in BLOCK_SIZES:
        found["kernel", r] = kernel(weights, r)
        found["add_grad_()", r] = add_grad(weights, r)
    return found


def interleaved(found: dict[tuple[str, int], Contender], seconds: float) -> dict[tuple[str, int], list[float]]:
    """Return the times of single calls, in microseconds, of all contenders in turn, for about `seconds`."""
    repeats = {}
    for key, call in found.items():
        call()
        start = time.perf_counter()
        call()
        # A sample of at least 200 us drowns the clock; 50 calls are enough for the smallest.
        repeats[key] = max(1, min(50, int(2e-4 / (time.perf_counter() - start))))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in found}
    begin = time.perf_counter()
    for rounds in range(2000):
        spent = time.perf_counter() - begin
        # Three rounds make a median, but a machine that others use may not have the time for three.
        if spent > seconds and (rounds >= 3 or spent > 2 * seconds):
            break
        for key, call in found.items():
            if key[0].startswith("(d)") and (rounds >= 5 or (rounds and sum(times[key]) > 2e6)):
                continue  # hundreds of times slower than the others: they need the time
            # The caches hold the previous contender's data: where that matters, an untimed call comes first.
            if times[key] and times[key][-1] < 5000:
                call()
            start = time.perf_counter()
            for _ in range(repeats[key]):
                call()
            times[key].append((time.perf_counter() - start) / repeats[key] * 1e6)
    return times


def rows(model: str, times: dict[tuple[str, int], list[float]]) -> list[dict[str, object]]:
    """Return the table's rows: percentiles, and medians over those of the loop (a) and of the floor (e)."""
    medians = {key: float(np.median(values)) for key, values in times.items()}
    result: list[dict[str, object]] = []
    for (name, r), values in times.items():
        us = np.percentile(values, [20, 50, 80])
        over = [f"{us[1] / medians[of]:.3f}" for of in (("(a) Python loop", 1), ("(e) floor", 0))]
        cells = [model, name, r or "", len(values), *(f"{x:.1f}" for x in us), *over]
        result.append(dict(zip(COLUMNS, cells, strict=True)))
    return result


def traffic_report(shapes: Shapes, r: int) -> str:
    """Return the bytes that the GPU kernels would move; ``bench/gpu`` times them."""
    weights = [torch.empty(s, device="meta") for s in shapes]
    return ", ".join(f"{name} {value / 1e6:.3f} MB" for name, value in predicted_traffic(weights, r)._asdict().items())


def plot(path: Path, table: list[dict[str, object]], about: dict[str, object]) -> None:
    """Draw the medians with p20 and p80, one panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(str(row["model"]) for row in table))
    figure, axes = plt.subplots(len(models), 1, figsize=(8, 2.3 * len(models)), squeeze=False, layout="constrained")
    for axis, model in zip(axes[:, 0], models, strict=True):
        chosen = [row for row in table if row["model"] == model][::-1]
        p20, p50, p80 = (np.array([float(str(row[c])) for row in chosen]) for c in ("p20_us", "p50_us", "p80_us"))
        colours = ["tab:blue" if row["contender"] in ("kernel", "add_grad_()") else "lightgrey" for row in chosen]
        labels = [f"{row['contender']}" + (f", r = {row['r']}" if row["r"] else "") for row in chosen]
        axis.barh(labels, p50, color=colours, xerr=(p50 - p20, p80 - p50))
        axis.set_xscale("log")
        axis.set_title(model, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("microseconds a step: median, p20 to p80")
    figure.suptitle(f"Power step and gradient; {about['cpu']}, {about['threads']} threads", fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurement from the command line."""
    parser = study_parser(__doc__, quick="a few seconds, without the two large models")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=25.0, help="time for each model")
    parser.add_argument("--only", default="", help="measure only the models whose name contains this")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    about = machine() | versions("numba", "numpy")
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    settings = (options.seconds, options.quick, about)
    finished = Finished(options.output / "kernels.partial.jsonl", settings, list[dict[str, object]])
    table: list[dict[str, object]] = []
    for model, shapes in MODELS.items():
        if options.only not in model or (options.quick and sum(m * n for m, n in shapes) > 1e7):
            continue
        seconds = 2.0 if options.quick else options.seconds
        if repr(model) not in finished.results:
            finished.add(model, rows(model, interleaved(contenders(shapes), seconds)))
        added = finished.results[repr(model)]
        print(f"\n{model}")
        line = "  {contender:32}r {r!s:3}{p20_us:>12}{p50_us:>12}{p80_us:>12} us"
        line += "  x loop {over_loop:>9}  x floor {over_floor:>9}"
        print(*(line.format(**row) for row in added), sep="\n")
        for r in BLOCK_SIZES:
            print(f"  predicted traffic of the GPU kernels at r = {r}: {traffic_report(shapes, r)}")
        table += added
    write_csv(options.output / "kernels.csv", COLUMNS, [[row[c] for c in COLUMNS] for row in table], about)
    finished.remove()
    try:
        plot(options.output / "kernels.png", table, about)
    except ImportError:
        print(f"No figure: matplotlib is not installed ({install_command('paper')}).")


if __name__ == "__main__":
    with told_in_one_line("kernels"):
        main()
