"""The training of one seed's networks at once, each projected onto its budget, and the certificate of each.

All networks of a task have the same shape, start, rows and batches. They are stacked: a layer's weights have shape
(N, out, in), a forward pass is one batched product for each layer, and one Adam trains them all, which is exact because
Adam works element by element. Only the projections differ, and these are `lightning_lip.projection`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lip.certificates.interval import certified_matrix_norm
from lightning_lip.metrics import noisy_mean_absolute_error
from lightning_lip.paper.budgets.settings import ALLOCATIONS, MARGIN, BudgetRecord, Rebalanced, SeedTask
from lightning_lip.paper.data import Array, Dataset, Split, split
from lightning_lip.paper.model import PaperRegressor
from lightning_lip.paper.regimes.settings import BATCH_SIZE, METRICS, NOISE_LEVELS
from lightning_lip.projection.caps import joint_caps, log_clip_caps, per_layer_caps, scale_factors
from lightning_lip.rigorous.rounding import multiply_up

ACTIVATION_MODULES = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Networks(NamedTuple):
    """N networks of one shape: weights (N, out, in) and biases (N, 1, out) of each layer, and their activation."""

    weights: list[Tensor]
    biases: list[Tensor]
    activation: str

    def __call__(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, features), the same for every network, to predictions (N, B)."""
        activation = ACTIVATION_MODULES[self.activation]()
        hidden = inputs.expand(len(self.weights[0]), -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, activation(hidden) if layer else hidden, weight.mT)
        return hidden[..., 0]

    def single(self, index: int) -> nn.Sequential:
        """A copy of one network as a module that maps (B, features) to (B, 1)."""
        layers: list[nn.Module] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            linear = nn.Linear(weight.shape[2], weight.shape[1], device="meta").to_empty(device="cpu")
            linear.load_state_dict({"weight": weight[index].detach(), "bias": bias[index, 0].detach()})
            layers += [linear, ACTIVATION_MODULES[self.activation]()]
        return nn.Sequential(*layers[:-1])


def train_seed(task: SeedTask, datasets: dict[str, Dataset]) -> list[BudgetRecord]:
    """Train all networks of a task, project each a last time and certify it.

    The records depend on the arguments only, and a network's record on the other networks of the task only through
    the rounding of batched products.

    Args:
        task: What to train.
        datasets: By name.

    Returns:
        One record for each of `task.constrained` and then of `task.penalised`.

    Raises:
        ArithmeticError: If a certified bound exceeds its budget.
    """
    with _one_thread():
        parts, unit = _standardised(datasets[task.case.dataset], task.seed)
        networks, coefficients = _train(task, parts)
        return _records(task, _finished(task, networks, coefficients), parts, unit)


def train_penalties(task: SeedTask, datasets: dict[str, Dataset]) -> list[float]:
    """Train the penalised networks of a tuning task and return the product of spectral norms of each, in their order.

    Args:
        task: What to train; no two of its coefficients are the same.
        datasets: By name.
    """
    with _one_thread():
        networks, _ = _train(task, _standardised(datasets[task.case.dataset], task.seed)[0])
        products: list[float] = _products(networks.weights).tolist()
        return products


def projected(method: str, spectra: Sequence[Array], log_budget: float) -> list[Array]:
    """Apply a method's projection to the singular values of one network.

    Args:
        method: One of `CONSTRAINTS`.
        spectra: The singular values of each layer, in any order, (r_l,), float64.
        log_budget: log M.

    Returns:
        The new singular values, none larger than before; the product of the layers' largest is at most M.
    """
    if method == "scaling":
        return [factor * s for factor, s in zip(scale_factors(spectra, log_budget), spectra, strict=True)]
    if method == "joint":
        caps = joint_caps(spectra, log_budget, metric="relative")
    elif method == "joint_euclidean":
        caps = joint_caps(spectra, log_budget, metric="euclidean")
    elif method == "log_clip":
        caps = log_clip_caps(spectra, log_budget)
    else:
        share, k = math.exp(log_budget / len(spectra)), ALLOCATIONS[method]
        caps = per_layer_caps(spectra, [share * k, *[share] * (len(spectra) - 2), share / k])
    return [np.minimum(s, cap) for s, cap in zip(spectra, caps.caps, strict=True)]


@torch.no_grad()
def project(weights: Sequence[Tensor], constraints: Sequence[tuple[str, float]]) -> None:
    """Project the first networks of a stack in place, each by its own method onto its own budget.

    Exact up to rounding: the eigenvectors of W W^T in float64 are W's left singular vectors, for half the time of an
    SVD; what they lose lies 1e-8 below the norm, where nothing is clipped.

    Args:
        weights: Each layer's, (N, out, in).
        constraints: (method, budget) of the first networks, at most N.
    """
    if not constraints:
        return
    constrained = slice(len(constraints))
    stacks = [weight[constrained].double() for weight in weights]
    decompositions = [torch.linalg.eigh(stack @ stack.mT) for stack in stacks]
    spectra = [squares.clamp(min=0.0).sqrt().numpy() for squares, _ in decompositions]
    ratios = [np.ones_like(spectrum) for spectrum in spectra]
    for index, (method, budget) in enumerate(constraints):
        before = [spectrum[index] for spectrum in spectra]
        after = projected(method, before, math.log(budget))
        for ratio, new, old in zip(ratios, after, before, strict=True):
            np.divide(new, old, out=ratio[index], where=old > 0)
    for weight, stack, (_, vectors), ratio in zip(weights, stacks, decompositions, ratios, strict=True):
        excess = torch.from_numpy(1 - ratio)[:, None, :]
        # Subtracted, so that a layer within its budget stays as it is, bit for bit.
        weight[constrained] -= (vectors * excess) @ (vectors.mT @ stack)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _standardised(data: Dataset, seed: int) -> tuple[Split, float]:
    """Split and standardise inputs and target by the training rows; also return the target's standard deviation."""
    parts = split(data, seed, "standardised")
    mean, unit = float(parts.train_target.mean()), float(parts.train_target.std())
    targets = {name: (getattr(parts, name) - mean) / unit for name in ("train_target", "validation_target")}
    return parts._replace(**targets), unit


def _train(task: SeedTask, parts: Split) -> tuple[Networks, list[float]]:
    """Train the constrained networks and, behind them, one for each penalty's coefficient, which are returned too."""
    coefficients = list(dict.fromkeys(coefficient for _, coefficient in task.penalised))
    n_networks, n_constrained = len(task.constrained) + len(coefficients), len(task.constrained)
    inputs, target = _tensor(parts.train_inputs), _tensor(parts.train_target)
    start = PaperRegressor(in_features=inputs.shape[1], seed=task.seed)
    linears = [module for module in start.net if isinstance(module, nn.Linear)]
    weights = [linear.weight.detach().repeat(n_networks, 1, 1).requires_grad_() for linear in linears]
    biases = [linear.bias.detach().repeat(n_networks, 1, 1).requires_grad_() for linear in linears]
    networks = Networks(weights, biases, task.case.activation)
    settings = start.configure_optimizers().defaults
    optimizer = torch.optim.Adam([*weights, *biases], lr=settings["lr"], eps=settings["eps"])
    penalty_weights = torch.tensor(coefficients)
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(task.epochs):
        for rows in torch.split(torch.randperm(len(inputs), generator=generator), BATCH_SIZE):
            # A sum over the networks: the gradient of each is that of its own loss.
            loss = (networks(inputs[rows]) - target[rows]).square().mean(dim=1).sum()
            if coefficients:
                loss = loss + penalty_weights @ _products([weight[n_constrained:] for weight in weights])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            project(weights, task.constrained)
    return networks, coefficients


def _products(weights: Sequence[Tensor]) -> Tensor:
    """The product of the spectral norms of each of N networks, (N,), exact up to rounding (SVD)."""
    return torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights]).prod(dim=0)


@torch.no_grad()
def _finished(task: SeedTask, networks: Networks, coefficients: list[float]) -> Networks:
    """Copy the networks in the order of the records and project each onto its budget, less the margin."""
    n_constrained = len(task.constrained)
    order = [*range(n_constrained), *(n_constrained + coefficients.index(c) for _, c in task.penalised)]
    weights = [weight[order] for weight in networks.weights]
    # One projection of a network that was trained without a constraint: the same as the joint method's.
    constraints = (*task.constrained, *(("joint", budget) for budget, _ in task.penalised))
    project(weights, [(method, budget * (1 - MARGIN)) for method, budget in constraints])
    return Networks(weights, [bias[order] for bias in networks.biases], networks.activation)


def _records(task: SeedTask, networks: Networks, parts: Split, unit: float) -> list[BudgetRecord]:
    chosen = [(method, budget, 0.0) for method, budget in task.constrained]
    chosen += [("penalty", budget, coefficient) for budget, coefficient in task.penalised]
    records = []
    for index, (method, budget, coefficient) in enumerate(chosen):
        network = networks.single(index)
        sigmas = certified_norms(network)
        certified = multiply_up(*sigmas)
        if not certified <= budget:
            raise ArithmeticError(
                f"The certified bound {certified!r} of method '{method}' exceeds its budget {budget:g}."
            )
        errors = _errors(network, parts, task.seed, unit)
        rebalanced = _rebalanced(network, parts) if (task.case.activation, method) == ("relu", "joint") else None
        records.append(
            BudgetRecord(task.case, task.seed, method, budget, coefficient, certified, sigmas, errors, rebalanced)
        )
    return records


def certified_norms(network: nn.Sequential) -> tuple[float, ...]:
    """*Certified upper bounds* of the spectral norms of a network's linear layers, first to last."""
    return tuple(certified_matrix_norm(module.weight) for module in network if isinstance(module, nn.Linear))


@torch.no_grad()
def _errors(network: nn.Sequential, parts: Split, seed: int, unit: float) -> dict[str, float]:
    train_error = network(_tensor(parts.train_inputs))[:, 0] - _tensor(parts.train_target)
    validation = noisy_mean_absolute_error(
        network,
        _tensor(parts.validation_inputs),
        _tensor(parts.validation_target)[:, None],
        NOISE_LEVELS,
        _tensor(parts.feature_min),
        _tensor(parts.feature_max),
        generator=torch.Generator().manual_seed(seed),
    )
    values = [float(train_error.abs().mean()), *validation.tolist()]
    return {metric: unit * value for metric, value in zip(METRICS, values, strict=True)}


@torch.no_grad()
def _rebalanced(network: nn.Sequential, parts: Split) -> Rebalanced:
    """Rescale a ReLU network to equal norms: its function is unchanged, and each norm is at most M^(1/4)."""
    inputs = torch.as_tensor(parts.validation_inputs)
    before = deepcopy(network).double()
    after = deepcopy(before)
    rescale(after)
    outputs = before(inputs)
    change = float((after(inputs) - outputs).abs().max() / outputs.abs().max())
    return Rebalanced(max(certified_norms(after)), change)


@torch.no_grad()
def rescale(network: nn.Sequential) -> None:
    """Give every linear layer of a ReLU network the same spectral norm, in place; its function stays the same.

    Layer l's weight is scaled by c_l with ``prod_l c_l = 1``, and its bias by c_1 ... c_l: a ReLU passes positive
    factors on. No layer may be zero.
    """
    linears = [module for module in network if isinstance(module, nn.Linear)]
    norms = [float(torch.linalg.matrix_norm(linear.weight, 2)) for linear in linears]
    common = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    cumulated = 1.0
    for linear, norm in zip(linears, norms, strict=True):
        cumulated *= common / norm
        linear.weight.mul_(common / norm)
        linear.bias.mul_(cumulated)


def _tensor(array: Array) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32)
