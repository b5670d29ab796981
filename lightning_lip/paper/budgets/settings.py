"""What the same-budget experiment is made of: data sets, activations, budgets, methods, tasks and records.

A budget M bounds the product of the four spectral norms of the paper's network, for standardised inputs and a
standardised target: a certified Lipschitz constant of at most M standard deviations of the target per unit of the
standardised inputs. Every method spends the same budget; they differ in how it is shared between the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lip.paper.regimes.settings import EPOCHS, METRICS

BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
ACTIVATIONS = ("relu", "tanh")
DATASETS = ("boston", "diabetes")

UNITS = {"boston": "thousand dollars", "diabetes": "progression points"}
"""The units of the targets, and so of every MAE."""

DIGITS = {"boston": 2, "diabetes": 1}
"""The decimals that the tables print of an MAE."""

ALLOCATIONS = {"uniform": 1.0, "first_x0.25": 0.25, "first_x0.5": 0.5, "first_x2": 2.0, "first_x4": 4.0}
"""Per-layer caps: M^(1/4) each, but the first layer's times k and the last layer's divided by k."""

CONSTRAINTS = ("joint", "joint_euclidean", *ALLOCATIONS, "scaling", "log_clip")
"""The methods that project after each step."""

METHODS = (*CONSTRAINTS, "penalty")

LABELS = {
    "joint": "joint projection",
    "joint_euclidean": "joint, Euclidean metric",
    "uniform": "per-layer caps M^(1/4)",
    "first_x0.25": "caps, first / 4, last x 4",
    "first_x0.5": "caps, first / 2, last x 2",
    "first_x2": "caps, first x 2, last / 2",
    "first_x4": "caps, first x 4, last / 4",
    "scaling": "scaling of every layer",
    "log_clip": "equal log-clip",
    "penalty": "product penalty, tuned",
}

PENALTY_GRID = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-16, 1))
"""The coefficients tried for the product penalty, in units of the standardised target's MSE: 1e-4 to 1."""

MARGIN = 1e-5
"""The last projection aims this far (relative) below the budget: rounding to float32 takes less."""


class Case(NamedTuple):
    """A data set and an activation; comparisons are made within one."""

    dataset: str
    activation: str

    @property
    def name(self) -> str:
        """The key of this case in the results, for instance `"boston/relu"`."""
        return f"{self.dataset}/{self.activation}"


CASES = tuple(Case(dataset, activation) for dataset in DATASETS for activation in ACTIVATIONS)


@dataclass(frozen=True)
class BudgetPlan:
    """What one call of `reproduce --budget` does.

    Attributes:
        seeds: The seeds reported.
        tuning_seeds: The seeds that the penalty's coefficients are chosen on; none of them is reported.
        epochs: The epochs of each run.
        budgets: The budgets M.
        grid: The coefficients of the product penalty.
        cases: Data sets and activations.
    """

    seeds: range
    tuning_seeds: range
    epochs: int = EPOCHS
    budgets: tuple[float, ...] = BUDGETS
    grid: tuple[float, ...] = PENALTY_GRID
    cases: tuple[Case, ...] = CASES


@dataclass(frozen=True)
class SeedTask:
    """The networks of one case that are trained at once: those of one seed.

    Attributes:
        case: Data set and activation.
        seed: Of the split, the initialisation, the batches and the noise, so that the methods are paired.
        epochs: The number of epochs.
        constrained: (method, budget) of every network that is projected after each step.
        penalised: (budget, coefficient) of every network that is trained with the product penalty and projected
            once, at the end. Networks that differ in the budget only are trained once. In a tuning the budget is
            infinite and nothing is projected.
    """

    case: Case
    seed: int
    epochs: int
    constrained: tuple[tuple[str, float], ...]
    penalised: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        """Name the task in messages."""
        return f"{self.case.name}, seed {self.seed}"


class Rebalanced(NamedTuple):
    """A ReLU network rescaled to equal spectral norms, beside the network as it was trained.

    Attributes:
        largest_norm: *Certified upper bound* of the largest of the four norms after rescaling.
        change: The largest change of an output on the validation rows, over the largest output; in float64.
    """

    largest_norm: float
    change: float


@dataclass(frozen=True)
class BudgetRecord:
    """What one network gave, after its last projection.

    Attributes:
        case: Data set and activation.
        seed: The seed.
        method: One of `METHODS`.
        budget: M.
        coefficient: The product penalty's lambda; 0 for the other methods.
        certified: *Certified upper bound* of the product of the four spectral norms; at most `budget`.
        sigmas: *Certified upper bounds* of the spectral norms, first to last layer.
        errors: The MAE of each of `METRICS`, in the target's units.
        rebalanced: For the joint projection of a ReLU network, what rescaling it to equal norms did; else None.
    """

    case: Case
    seed: int
    method: str
    budget: float
    coefficient: float
    certified: float
    sigmas: tuple[float, ...]
    errors: dict[str, float]
    rebalanced: Rebalanced | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as plain numbers; errors rounded to 6 significant digits, bounds as they are."""
        return {
            "case": self.case.name,
            "seed": self.seed,
            "method": self.method,
            "budget": self.budget,
            "coefficient": self.coefficient,
            "certified": self.certified,
            "sigmas": list(self.sigmas),
            "errors": {metric: float(f"{self.errors[metric]:.6g}") for metric in METRICS},
            "rebalanced": None if self.rebalanced is None else self.rebalanced._asdict(),
        }


BudgetTable = dict[tuple[Case, str, float], list[BudgetRecord]]
"""The records by case, method and budget, in the order of the seeds."""
