"""The networks that are compared with the plain one: with the package's penalty, and with its alternatives.

A peer that changes the network or adds a term to the loss is built here as its users build it. Every term is the same
function of the norms as the package's penalty, softplus_log with the same coefficient: it stays small for any network.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from lightning_lip.bench.contenders.layers import Layer, adjoint, apply, input_shapes
from lightning_lip.bench.contenders.models import BenchModel
from lightning_lip.bench.contenders.training import Batch, TimedPenalty, Training
from lightning_lip.penalty.penalties import PenaltyName, get_penalty

COEFFICIENT = 1e-3
PENALTY: PenaltyName = "softplus_log"
TARGET = 1.0
N_START_ITERATIONS = 15
"""Power iterations before the first step; torch's spectral_norm has as many."""

Norms = Callable[[], list[float]]


@dataclass
class Contender:
    """One network in training.

    Attributes:
        training: The module that is trained.
        callbacks: The callbacks of its Trainer.
        norms: Returns what is known of the spectral norm of each penalised layer's present weight, without a further
            iteration; None for a peer that knows none.
    """

    training: Training
    callbacks: list[Callback] = field(default_factory=list)
    norms: Norms | None = None


@dataclass(frozen=True)
class Task:
    """What every contender of a model gets.

    Attributes:
        network: Makes the network, the same at every call, on the device of the run.
        names: The penalised layers.
        input_shapes: Shape of one input of each of them.
        classes: Whether the targets are classes.
        example_input: A small batch of inputs.
    """

    network: Callable[[], nn.Module]
    names: Sequence[str]
    input_shapes: dict[str, tuple[int, ...]]
    classes: bool
    example_input: Tensor


def task_of(model: BenchModel, device: torch.device) -> tuple[Task, Batch]:
    """Return what every contender of a model gets, and the batch of every step, on `device`."""
    network = model.network()
    names = model.layers(network)
    inputs, targets = model.batch(network)
    task = Task(
        network=lambda: model.network().to(device),
        names=names,
        input_shapes=input_shapes(network, names, inputs[:2]),
        classes=model.n_classes is not None,
        example_input=inputs[:2].to(device),
    )
    return task, (inputs.to(device), targets.to(device))


@dataclass(frozen=True)
class Peer:
    """One way to train.

    Attributes:
        name: Its key in the files.
        title: What the tables call it.
        prepare: Builds a contender.
        guarantee: What is known of the norms that it works with.
        operator: `"true"`, a convolution at the size of its input; `"symbol"`, on the infinite grid; `"reshaped"` for
            one that takes its kernel as a matrix (c_out, -1), which is not its operator; `"none"` without norms.
        vectors: r, the vectors a layer that its norms come from; None for one without such vectors.
        for_convolutions: Whether it differs from another peer for convolutions only.
        has_budget: Whether it is held to a share of the step and to an amount of memory.
        needs: A module to install that this package does not depend on.
    """

    name: str
    title: str
    prepare: Callable[[Task], Contender]
    guarantee: str
    operator: str = "true"
    vectors: int | None = None
    for_convolutions: bool = False
    has_budget: bool = False
    needs: str | None = None

    def missing(self) -> str | None:
        """Return the module that must be installed first, None if nothing is missing."""
        if self.needs is not None:
            try:
                importlib.import_module(self.needs)
            except ModuleNotFoundError:
                return self.needs
        return None


def plain(task: Task) -> Contender:
    """Train the network as it is."""
    return Contender(Training(task.network(), task.classes))


def penalty(block_size: int, every_n_steps: int = 1, whole_graph: bool = False) -> Callable[[Task], Contender]:
    """Return the builder of a training with :class:`~lightning_lip.LipschitzPenalty`."""

    def prepare(task: Task) -> Contender:
        training = Training(task.network(), task.classes)
        callback = TimedPenalty(
            COEFFICIENT,
            PENALTY,
            layers=[f"network.{name}" for name in task.names] if not whole_graph else None,
            target=TARGET,
            block_size=block_size,
            every_n_steps=every_n_steps,
            example_input=task.example_input if whole_graph else None,
        )
        norms: Norms = lambda: callback.regularizer.sigma().tolist()  # noqa: E731
        # Over the whole graph the operators hold the batch normalisation's scale: other maps than the layers'.
        return Contender(training, [callback], None if whole_graph else norms)

    return prepare


def torch_spectral_norm(task: Task) -> Contender:
    """Divide each weight by its norm with torch's parametrization: the norms are to be 1."""
    network = task.network()
    for layer in _layers(network, task.names):
        parametrizations.spectral_norm(layer)
    return Contender(Training(network, task.classes), norms=lambda: [1.0] * len(task.names))


def torchlip(task: Task) -> Contender:
    """Put deel-torchlip's spectral layers (norm and Björck's iteration) in the layers' places."""
    package: Any = importlib.import_module("deel.torchlip")
    network = task.network()
    for name in task.names:
        layer = network.get_submodule(name)
        new = _torchlip_layer(package, cast(Layer, layer)).to(task.example_input.device)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, new)
    return Contender(Training(network, task.classes), norms=lambda: [1.0] * len(task.names))


def _torchlip_layer(package: Any, layer: Layer) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return package.SpectralLinear(layer.in_features, layer.out_features, bias=bias)  # type: ignore[no-any-return]
    return package.SpectralConv2d(  # type: ignore[no-any-return]
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=bias
    )


class Pair(NamedTuple):
    """Unit vectors u (1, *output_shape) and v (1, *input_shape) with u^T A v near the norm, and the next block.

    The block has shape (r, *input_shape).
    """

    left: Tensor
    right: Tensor
    block: Tensor


def power_iteration(layer: Layer, block: Tensor) -> Pair:
    """Make one step with a block of one vector."""
    left = _normalised(apply(layer, layer.weight, block))
    right = _normalised(adjoint(layer, layer.weight, left, block.shape[1:]))
    return Pair(left, right, right)


def block_iteration(layer: Layer, block: Tensor) -> Pair:
    """Make one step with a block of orthonormal vectors: both maps, the pair by Rayleigh-Ritz, the next block by QR."""
    images = apply(layer, layer.weight, block)
    back = adjoint(layer, layer.weight, images, block.shape[1:])
    gram = images.flatten(1) @ images.flatten(1).mT
    leading = torch.linalg.eigh(gram).eigenvectors[:, -1]
    left, right = (_normalised(torch.tensordot(leading, rows, 1)[None]) for rows in (images, back))
    return Pair(left, right, torch.linalg.qr(back.flatten(1).mT).Q.mT.reshape(-1, *block.shape[1:]))


def autograd_loop(block_size: int) -> Callable[[Task], Contender]:
    """Return the builder of a training with the penalty in its loss, by a loop over the layers.

    Each step iterates every layer's block once, without a graph, and leaves the rest to autograd through u^T W v.
    """
    iteration = power_iteration if block_size == 1 else block_iteration

    def prepare(task: Task) -> Contender:
        network = task.network()
        layers = _layers(network, task.names)
        generator = torch.Generator().manual_seed(0)
        blocks = []
        for shape in (task.input_shapes[name] for name in task.names):
            start = torch.randn(math.prod(shape), block_size, generator=generator)
            blocks.append(torch.linalg.qr(start).Q.mT.reshape(-1, *shape).to(task.example_input.device))

        @torch.no_grad()
        def iterate() -> list[Pair]:
            pairs = [iteration(layer, block) for layer, block in zip(layers, blocks, strict=True)]
            blocks[:] = [pair.block for pair in pairs]
            return pairs

        @torch.no_grad()
        def norms() -> list[float]:
            images = [apply(layer, layer.weight, block) for layer, block in zip(layers, blocks, strict=True)]
            return [float(torch.linalg.matrix_norm(rows.flatten(1), 2)) for rows in images]

        def term(*_: object) -> Tensor:
            pairs = zip(layers, iterate(), strict=True)
            sigma = [(pair.left * apply(layer, layer.weight, pair.right)).sum() for layer, pair in pairs]
            return _penalty_of(torch.stack(sigma))

        for _ in range(N_START_ITERATIONS):
            iterate()
        return Contender(Training(network, task.classes, term), norms=norms)

    return prepare


def exact_svd(task: Task) -> Contender:
    """Add the penalty to the loss, with autograd through a full SVD of each weight (convolutions reshaped)."""
    network = task.network()
    layers = _layers(network, task.names)

    def norms() -> Tensor:
        return torch.stack([torch.linalg.matrix_norm(layer.weight.flatten(1), 2) for layer in layers])

    def term(*_: object) -> Tensor:
        return _penalty_of(norms())

    with_norms = torch.no_grad()(lambda: norms().tolist())
    return Contender(Training(network, task.classes, term), norms=with_norms)


def gradient_penalty(task: Task) -> Contender:
    """Add the mean squared norm of the outputs' gradient in the inputs to the loss: a double backward pass."""

    def term(_: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        return COEFFICIENT * gradient.flatten(1).square().sum(1).mean()

    network = task.network()
    # The fused attention has no second derivative.
    forward = network.forward
    network.forward = lambda inputs: _with_plain_attention(forward, inputs)
    return Contender(Training(network, task.classes, term, inputs_need_grad=True))


def _with_plain_attention(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return forward(inputs)


def _layers(network: nn.Module, names: Sequence[str]) -> list[Layer]:
    return [cast(Layer, network.get_submodule(name)) for name in names]


def _normalised(vector: Tensor) -> Tensor:
    return F.normalize(vector.flatten(), dim=0).view_as(vector)


def _penalty_of(sigma: Tensor) -> Tensor:
    log_sigma = sigma.log()
    penalty: Tensor = COEFFICIENT * get_penalty(PENALTY, TARGET)(log_sigma, log_sigma.sum())
    return penalty


EVERY = 4
"""Steps between those on which the sparing penalty acts."""

BELOW = "estimate from below"

PLAIN_PEER = Peer("plain", "plain training", plain, "-", "none")

PEERS = (
    Peer(
        "penalty_r8", "LipschitzPenalty (r = 8, the default)", penalty(8), BELOW, "symbol", vectors=8, has_budget=True
    ),
    Peer("penalty_r1", "LipschitzPenalty, r = 1", penalty(1), BELOW, "symbol", vectors=1, has_budget=True),
    Peer(
        "penalty_sparing",
        f"LipschitzPenalty, every_n_steps={EVERY}",
        penalty(8, every_n_steps=EVERY),
        BELOW,
        "symbol",
        vectors=8,
        for_convolutions=True,
    ),
    Peer(
        "penalty_graph",
        "LipschitzPenalty, example_input (whole network)",
        penalty(8, whole_graph=True),
        "bound of the whole network at estimated norms",
        "symbol",
        vectors=8,
        for_convolutions=True,
    ),
    Peer(
        "autograd_block_loop", "autograd through a loop of block iterations (r = 8)", autograd_loop(8), BELOW, vectors=8
    ),
    Peer("autograd_loop", "autograd through a loop of power iterations (r = 1)", autograd_loop(1), BELOW, vectors=1),
    Peer(
        "gradient_penalty",
        "gradient penalty on the inputs",
        gradient_penalty,
        "slope at the batch's inputs only",
        "none",
    ),
    Peer(
        "torch_spectral_norm",
        "torch parametrizations.spectral_norm (r = 1)",
        torch_spectral_norm,
        "norm of the matrix near 1",
        "reshaped",
        vectors=1,
    ),
    Peer("exact_svd", "autograd through torch.linalg.matrix_norm(W, 2)", exact_svd, "exact for the matrix", "reshaped"),
    Peer(
        "torchlip",
        "deel-torchlip SpectralLinear, SpectralConv2d",
        torchlip,
        "all singular values of the matrix near 1",
        "reshaped",
        needs="deel.torchlip",
    ),
)
"""All but the plain training, in the order of the tables; for matrices the reshaped kernel is the operator."""
