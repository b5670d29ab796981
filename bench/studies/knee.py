"""What the product penalty does to popular architectures, by its knee and coefficient: what its defaults rest on.

``python -m lightning_lip.bench.studies.knee [--quick] [--output FOLDER]`` trains five networks, initialised as their
authors do, on scikit-learn's digits for 100 steps of 32 images, with SGD (learning rate 0.01, momentum 0.9) and Adam
(1e-3): without a penalty, and with the product up to each knee and linear in S beyond, times each coefficient. The
penalised S is the product of convolutions and linear layers, normalisations left out, and, where the graph has a bound,
that of the traced network, normalisations included. `auto` sets the coefficient at the first step, so that the norm of
the penalty's gradient is that share of the loss's.

It writes ``knee.csv``: `ratio`, the norm of the penalty's gradient over that of the loss's at the first step; `loss`,
the mean of the last ten steps, which does not hold the penalty; `highest_loss` of any step; the accuracy on 397 other
images; and the logs of the product and of the traced bound before and after. Empty: no bound is known, or not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders.models import VisionTransformer, convnext, mlp, resnet18, vgg
from lightning_lip.bench.studies.options import study_parser
from lightning_lip.bench.studies.tracking import batches_of, digits
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.penalty.scale import gradient_norms
from lightning_lip.reporting.documents import machine, versions, write_csv
from lightning_lip.reporting.finished import Finished

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(64, 128, 128, 128, 128, 10),
    "resnet18": lambda: resnet18(width=16),
    "vgg": vgg,
    "convnext": convnext,
    "vit": lambda: VisionTransformer(48, 3, patch=1),
}
OPTIMISERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}
KNEES = (100.0, 10.0, 1000.0)
COEFFICIENTS = (1e-3, 1e-4, 1e-2)
SHARES = (0.1, 0.01, 0.5)
"""Shares of the loss's gradient, for `auto`."""
BATCH = 32


class Result(NamedTuple):
    """One training; the module's text says what is measured."""

    model: str
    optimiser: str
    penalised: str
    knee: float | None
    coefficient: str
    ratio: float | None
    loss: float
    highest_loss: float
    accuracy: float
    log_product_before: float | None
    log_product: float | None
    log_bound_before: float | None
    log_bound: float | None


def settings() -> list[tuple[str, str, str, float | None, str]]:
    """Return what is trained: model, optimiser, what is penalised, knee, coefficient."""
    found: list[tuple[str, str, str, float | None, str]] = []
    for model in MODELS:
        for optimiser in OPTIMISERS:
            found.append((model, optimiser, "", None, ""))
            for penalised in ("product",) if model == "vit" else ("product", "bound"):
                chosen = [(knee, f"{c:g}") for knee in KNEES for c in COEFFICIENTS]
                chosen += [(math.inf, "0.001"), *((KNEES[0], f"auto {share:g}") for share in SHARES)]
                found += [(model, optimiser, penalised, *one) for one in chosen]
    return found


def images(inputs: Tensor) -> Tensor:
    """Return digits (., 64) as images (., 3, 8, 8)."""
    return inputs.view(-1, 1, 8, 8).expand(-1, 3, -1, -1).contiguous()


def network_of(model: str) -> nn.Module:
    """Return a network, initialised as torchvision initialises its kind."""
    torch.manual_seed(0)
    network = MODELS[model]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and model in ("resnet18", "vgg"):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and model == "convnext":
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and model == "vit":
            nn.init.xavier_uniform_(module.weight)
    return network


def regularizer_of(model: nn.Module, example: Tensor | None, knee: float = math.inf) -> LipschitzRegularizer | None:
    """Return the penalty on the traced bound, or without an example on the product; None where no bound is known."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    try:
        return LipschitzRegularizer(
            model, 1.0, layers=layers if example is None else None, example_input=example, knee=knee
        )
    except UnsupportedLayerError:
        return None


def train(
    model: str, optimiser: str, penalised: str, knee: float | None, coefficient: str, steps: int, data: Sequence[Tensor]
) -> Result:
    """Train one network."""
    inputs, targets, *test = data
    if model != "mlp":
        inputs, test[0] = images(inputs), images(test[0])
    network = network_of(model)
    optimizer = OPTIMISERS[optimiser](network.parameters())
    product, bound = regularizer_of(network, None), regularizer_of(network, inputs[:1])
    assert product is not None
    regularizer = None
    if knee is not None:
        regularizer = regularizer_of(network, inputs[:1] if penalised == "bound" else None, knee)
    with torch.enable_grad():
        network(inputs[:BATCH])  # shows convolutions their size
    before = _log_bound(network, product), _log_bound(network, bound)
    ratio, losses = None, []
    epochs = -(-steps * BATCH // len(inputs))
    for x, y in list(batches_of(inputs, targets, BATCH, epochs + 1))[:steps]:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        torch.autograd.backward(loss)
        if regularizer is not None:
            if ratio is None:
                ratio = _start(regularizer, network, coefficient)
            else:
                regularizer.add_grad_()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        accuracy = float((network(test[0]).argmax(1) == test[1]).float().mean())
    after = _log_bound(network, product), _log_bound(network, bound)
    last = losses[-10:]
    return Result(
        model, optimiser, penalised, knee, coefficient, ratio, sum(last) / len(last), max(losses), accuracy,
        before[0], after[0], before[1], after[1],
    )  # fmt: skip


def _start(regularizer: LipschitzRegularizer, network: nn.Module, coefficient: str) -> float:
    """Make the first step's penalty, with the coefficient; return the ratio of the gradients' norms."""
    parameters = list(network.parameters())
    before = [p.grad.clone() if p.grad is not None else None for p in parameters]
    loss, penalty = gradient_norms(parameters, regularizer.add_grad_)
    kind, _, share = coefficient.rpartition(" ")
    regularizer.coefficient = float(share) * loss / penalty if kind == "auto" else float(share)
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    regularizer.add_grad_(advance=False)
    return regularizer.coefficient * penalty / loss


def _log_bound(network: nn.Module, regularizer: LipschitzRegularizer | None) -> float | None:
    """Return S in eval mode, from well-converged vectors; None where it is not known or not finite."""
    if regularizer is None:
        return None
    was_training = network.training
    network.eval()
    for _ in range(20):
        regularizer.iterate()
    found = float(regularizer.log_bound().detach())
    network.train(was_training)
    return found if math.isfinite(found) else None


def shown(value: Any) -> str:
    """Return a field for the table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = study_parser(__doc__, quick="three steps of the MLP with SGD, and six penalties")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = digits()
    steps = 3 if options.quick else options.steps
    about = machine() | versions("numba", "numpy") | {"steps": steps}
    finished = Finished(options.output / "knee.partial.jsonl", about, Result._make)
    rows = []
    print(*Result._fields)
    for setting in settings()[: 7 if options.quick else None]:
        rows.append([shown(value) for value in finished.once(setting, partial(train, *setting, steps, data))])
        print(*rows[-1], sep=",", flush=True)
    write_csv(options.output / "knee.csv", Result._fields, rows, about)
    finished.remove()


if __name__ == "__main__":
    main()
