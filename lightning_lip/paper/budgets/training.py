"""The networks of one seed, trained at once, each projected onto its budget and certified.

A budget M bounds the product of the four spectral norms of the paper's network, for standardised inputs and a
standardised target: a certified Lipschitz constant of at most M standard deviations of the target per unit of the
standardised inputs. Every method has the same budget; they differ in how it is shared between the layers.

All networks of a task have the same shape, start, rows and batches. Their parameters are stacked, so that one call of
``torch.vmap`` evaluates them all and one Adam trains them all; Adam works element by element, so that each network is
trained as it would be alone. Only the projections differ, and these are those of `lightning_lip.projection`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lip.certificates import certified_matrix_norm
from lightning_lip.metrics import noisy_mean_absolute_error
from lightning_lip.paper.data import Array, Dataset, Split, batches, split, tensor
from lightning_lip.paper.model import PaperRegressor
from lightning_lip.paper.settings import METRICS, NOISE_LEVELS, rounded
from lightning_lip.projection import joint_caps, log_clip_caps, per_layer_caps, scale_factors
from lightning_lip.reporting.processes import one_thread
from lightning_lip.rigorous.rounding import multiply_up

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}

CASES = ("boston/relu", "boston/tanh", "diabetes/relu", "diabetes/tanh")
"""Data set and activation; methods are compared within one case."""

BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

ALLOCATIONS = {"uniform": 1.0, "first_x0.25": 0.25, "first_x0.5": 0.5, "first_x2": 2.0, "first_x4": 4.0}
"""Per-layer caps: M^(1/4) for each layer, but the first layer's times k and the last layer's divided by k."""

CONSTRAINTS = ("joint", "joint_euclidean", *ALLOCATIONS, "scaling", "log_clip")
"""The methods that project after each step."""

MARGIN = 1e-5
"""The last projection aims this far (relative) below the budget: more than rounding to float32 can add."""


class SeedTask(NamedTuple):
    """The networks of one case and seed, which are trained at once.

    Attributes:
        case: One of `CASES`.
        seed: Of the split, the initialisation, the batches and the noise, so that the methods are paired.
        epochs: The number of epochs.
        constrained: (method, budget) of every network that is projected after each step.
        penalised: (budget, coefficient) of every network that is trained with the product penalty and projected once,
            at the end. The tuning has infinite budgets: nothing is projected.
    """

    case: str
    seed: int
    epochs: int
    constrained: tuple[tuple[str, float], ...]
    penalised: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        """Name the task in messages."""
        return f"{self.case}, seed {self.seed}"


class BudgetRecord(NamedTuple):
    """What one network gave, after its last projection.

    Attributes:
        case: One of `CASES`.
        seed: The seed.
        method: One of `CONSTRAINTS`, or `"penalty"`.
        budget: M.
        coefficient: The product penalty's lambda; 0 for the other methods.
        certified: *Certified upper bound* of the product of the four spectral norms; at most `budget`.
        sigmas: *Certified upper bounds* of the spectral norms, first to last layer.
        errors: The MAE of each of `METRICS`, in the target's units, rounded to 6 significant digits.
        rebalanced: For the joint projection of a ReLU network, rescaled to equal norms: `largest_norm`, the *certified
            upper bound* of the largest of its norms, and `change`, the largest change of an output on the validation
            rows over the largest output, in float64. None otherwise.
    """

    case: str
    seed: int
    method: str
    budget: float
    coefficient: float
    certified: float
    sigmas: tuple[float, ...]
    errors: dict[str, float]
    rebalanced: dict[str, float] | None


def records_from_json(rows: Sequence[Sequence[Any]]) -> list[BudgetRecord]:
    """Return the records of a task that went through JSON, as lists of their fields."""
    records = [BudgetRecord(*row) for row in rows]
    return [record._replace(sigmas=tuple(record.sigmas)) for record in records]


def train_seed(task: SeedTask, datasets: Mapping[str, Dataset]) -> list[BudgetRecord]:
    """Train all networks of a task, project each a last time and certify it.

    A network's record depends on the other networks of the task through the rounding of batched products only.

    Args:
        task: What to train.
        datasets: By name.

    Returns:
        One record for each of `task.constrained` and then of `task.penalised`.

    Raises:
        ArithmeticError: If a certified bound exceeds its budget.
    """
    with one_thread():
        parts = split(datasets[task.case.split("/")[0]], task.seed, "standardised")
        mean, unit = float(parts.train_target.mean()), float(parts.train_target.std())
        targets = {name: (getattr(parts, name) - mean) / unit for name in ("train_target", "validation_target")}
        parts = parts._replace(**targets)
        network, stacked = _train(task, parts)
        # A network that was trained with the penalty is projected only here, as the joint method projects.
        last = [*task.constrained, *(("joint", budget) for budget, _ in task.penalised if math.isfinite(budget))]
        project(_weights(stacked), [(method, budget * (1 - MARGIN)) for method, budget in last])
        rows = [(method, budget, 0.0) for method, budget in task.constrained]
        rows += [("penalty", budget, coefficient) for budget, coefficient in task.penalised]
        records = []
        for index, row in enumerate(rows):
            network.load_state_dict({name: value[index].detach() for name, value in stacked.items()})
            records.append(_record(task, network, row, parts, unit))
        return records


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

    Exact up to rounding: the eigenvectors of W W^T in float64 are the left singular vectors of W, in half the time of
    an SVD. Small singular values lose digits, but only those below 1e-8 of the norm, where nothing is clipped.

    Args:
        weights: The weights of each layer, (N, out, in).
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


def certified_norms(network: nn.Module) -> tuple[float, ...]:
    """Return *certified upper bounds* of the spectral norms of a network's linear layers, first to last."""
    return tuple(certified_matrix_norm(m.weight) for m in network.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def rescale(network: nn.Module) -> None:
    """Give every linear layer of a ReLU network the same spectral norm, in place; its function stays the same.

    Layer l's weight is scaled by c_l with ``prod_l c_l = 1``, and its bias by c_1 ... c_l: a ReLU passes positive
    factors on. No layer may be zero.
    """
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    norms = [float(torch.linalg.matrix_norm(linear.weight, 2)) for linear in linears]
    common = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    cumulated = 1.0
    for linear, norm in zip(linears, norms, strict=True):
        cumulated *= common / norm
        linear.weight.mul_(common / norm)
        linear.bias.mul_(cumulated)


def _train(task: SeedTask, parts: Split) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Train the networks; return one of their kind, and their stacked parameters, (N, ...) each."""
    inputs, target = tensor(parts.train_inputs), tensor(parts.train_target)
    start = PaperRegressor(in_features=inputs.shape[1], seed=task.seed)
    activation = ACTIVATIONS[task.case.split("/")[1]]
    network = nn.Sequential(*(activation() if isinstance(m, nn.ReLU) else m for m in start.net))
    n_constrained, n_networks = len(task.constrained), len(task.constrained) + len(task.penalised)
    stacked = {
        name: torch.stack([value.detach()] * n_networks).requires_grad_() for name, value in network.named_parameters()
    }

    def predict(parameters: dict[str, Tensor], rows: Tensor) -> Any:
        return functional_call(network, parameters, (rows,))[:, 0]

    settings = start.configure_optimizers().defaults
    optimizer = torch.optim.Adam(stacked.values(), lr=settings["lr"], eps=settings["eps"])
    coefficients = torch.tensor([coefficient for _, coefficient in task.penalised])
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(task.epochs):
        for rows in batches(len(inputs), generator):
            errors = torch.vmap(predict, (0, None))(stacked, inputs[rows]) - target[rows]
            # A sum over the networks: the gradient of each is that of its own loss.
            loss = errors.square().mean(dim=1).sum()
            if task.penalised:
                norms = [torch.linalg.matrix_norm(weight[n_constrained:], 2) for weight in _weights(stacked)]
                loss = loss + coefficients @ torch.stack(norms).prod(dim=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            project(_weights(stacked), task.constrained)
    return network, stacked


def _weights(stacked: dict[str, Tensor]) -> list[Tensor]:
    return [value for name, value in stacked.items() if name.endswith("weight")]


@torch.no_grad()
def _record(
    task: SeedTask, network: nn.Sequential, row: tuple[str, float, float], parts: Split, unit: float
) -> BudgetRecord:
    method, budget, coefficient = row
    sigmas = certified_norms(network)
    certified = multiply_up(*sigmas)
    if not certified <= budget:
        raise ArithmeticError(f"The certified bound {certified!r} of method '{method}' exceeds its budget {budget:g}.")
    inputs, target = tensor(parts.validation_inputs), tensor(parts.validation_target)[:, None]
    limits = tensor(parts.feature_min), tensor(parts.feature_max)
    noise = torch.Generator().manual_seed(task.seed)
    validation = noisy_mean_absolute_error(network, inputs, target, NOISE_LEVELS, *limits, generator=noise)
    training = (network(tensor(parts.train_inputs))[:, 0] - tensor(parts.train_target)).abs().mean()
    values = [float(training), *validation.tolist()]
    errors = {metric: rounded(unit * value) for metric, value in zip(METRICS, values, strict=True)}
    rebalanced = None
    if method == "joint" and task.case.endswith("relu"):
        before = deepcopy(network).double()
        after = deepcopy(before)
        rescale(after)
        outputs = before(inputs.double())
        change = float((after(inputs.double()) - outputs).abs().max() / outputs.abs().max())
        rebalanced = {"largest_norm": max(certified_norms(after)), "change": change}
    return BudgetRecord(task.case, task.seed, method, budget, coefficient, certified, sigmas, errors, rebalanced)
