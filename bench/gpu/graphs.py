"""What the host does during a step: whether it waits for the device, and whether a CUDA graph can take its place."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lip import LipschitzRegularizer
from lightning_lip.bench.contenders.models import MODELS, mlp, resnet18
from lightning_lip.bench.contenders.training import synchronise
from lightning_lip.bench.gpu.measuring import DEVICE, DRY, SIZES, captured, device_times, host_time, record


class Case(NamedTuple):
    """A network, the shape of its inputs, and what the penalty is asked for; on the device once it is measured."""

    network: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    options: Callable[[nn.Module], dict[str, Any]] = lambda network: {}
    scale: Callable[[], float | Tensor] = lambda: 1.0
    tf32: bool = False
    needs_gpu: bool = True


def _small(**changes: Any) -> Case:
    return Case(lambda: mlp(*SIZES), (50, 13), **changes, needs_gpu=False)


CASES = {
    "mlp": _small(),
    "scale as a tensor": _small(scale=lambda: torch.ones((), device=DEVICE)),
    "callable penalty": _small(options=lambda _: {"penalty": lambda log_sigma, log_bound: log_sigma.sum()}),
    "traced": _small(options=lambda _: {"example_input": torch.zeros(2, 13, device=DEVICE)}),
    "100 layers": Case(lambda: mlp(*[64] * 101), (50, 64)),
    "resnet18": Case(resnet18, (32, 3, 32, 32), lambda network: {"layers": MODELS["resnet18"].layers(network)}),
    "convolution with TF32": Case(lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), (2, 3, 8, 8), tf32=True),
}
"""By name; the last sets TF32 by torch's `fp32_precision`, which the older switches must not meet."""


def waits(name: str) -> None:
    """Record whether the penalty's work before an optimiser's step waits for the device, and the host's time in it."""
    case = CASES[name]
    if case.tf32:
        backends: Any = torch.backends
        backends.fp32_precision = "tf32"
    network = case.network().to(DEVICE)
    inputs, scale = torch.randn(*case.input_shape, device=DEVICE), case.scale()
    regularizer = LipschitzRegularizer(network, 1e-3, **case.options(network))

    def penalise() -> Tensor:
        return regularizer.accumulate_(scale, True, None)

    for _ in range(1 if DRY else 2):
        network(inputs).square().mean().backward()
        penalise()
    # The old gradients stay alive, so that the new ones lie elsewhere and their addresses must be sent again.
    old = [p.grad for p in network.parameters()]
    network.zero_grad(set_to_none=True)
    network(inputs).square().mean().backward()
    synchronise(DEVICE)
    where = ""
    set_mode = (lambda mode: None) if DRY else torch.cuda.set_sync_debug_mode
    set_mode("error")  # every wait raises
    try:
        penalise()
    except RuntimeError:
        where = traceback.format_exc(limit=-4)[-900:]
    finally:
        set_mode("default")
    del old
    record(case=name, waits=bool(where), where=where, host_us=host_time(penalise))


def whole_step() -> None:
    """Compare steps from one CUDA graph (forward, backward, penalty, optimiser) with the same steps run eagerly."""
    steps, networks = [], []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(mlp(*SIZES).to(DEVICE))
        steps.append(_step(networks[-1], torch.randn(64, 13, device=DEVICE)))
    eager, graph = steps[0], captured(steps[1])
    # The warm-up before a capture makes three steps; the capture itself makes none.
    for _ in range(0 if DRY else 3):
        eager()
    for _ in range(1 if DRY else 6):
        eager()
        graph()
    synchronise(DEVICE)
    pairs = zip(*(network.parameters() for network in networks), strict=True)
    gap = max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
    record(largest_difference=gap, device_us=device_times({"eager": eager, "graph": graph}, 1.0))


def _step(network: nn.Module, inputs: Tensor) -> Callable[[], None]:
    regularizer = LipschitzRegularizer(network, 1e-2)
    optimizer = torch.optim.Adam(network.parameters(), capturable=not DRY)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        network(inputs).square().mean().backward()
        regularizer.add_grad_()
        optimizer.step()

    return step
