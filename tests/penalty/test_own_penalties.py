"""A penalty of the user's own that could not train anything is refused by name, at the latest at the first step."""

import math
import re

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn

from lightning_lip import LipschitzPenalty, LipschitzRegularizer

FREE = nn.Parameter(torch.tensor(1.0))


def without_grad(log_sigma, log_bound):
    with torch.no_grad():
        return log_bound.exp()


OFF_THE_GRAPH = {
    "detached": lambda log_sigma, log_bound: log_bound.detach().exp(),
    "no_grad": without_grad,
    "from a float": lambda log_sigma, log_bound: torch.tensor(math.exp(log_bound.item())),
    "NumPy": lambda log_sigma, log_bound: torch.from_numpy(log_bound.detach().numpy()),
    "of another parameter": lambda log_sigma, log_bound: FREE.exp(),
    "constant": lambda log_sigma, log_bound: torch.tensor(3.0),
}
NO_NUMBER = {
    "float": (lambda log_sigma, log_bound: float(log_bound), "got float"),
    "bool": (lambda log_sigma, log_bound: log_bound > 0, "got torch.bool"),
    "int": (lambda log_sigma, log_bound: log_bound.long(), "got torch.int64"),
    "vector": (lambda log_sigma, log_bound: log_sigma, "got shape (2,)"),
    "NaN": (lambda log_sigma, log_bound: log_bound * math.nan, "returned nan"),
    "infinity": (lambda log_sigma, log_bound: log_bound.exp() + math.inf, "returned inf"),
    "NaN in the gradient": (lambda log_sigma, log_bound: (log_bound - log_bound.detach()).sqrt(), "gradient [inf"),
}
SAID = {name: (penalty, "does not depend on log_sigma and log_bound") for name, penalty in OFF_THE_GRAPH.items()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("way", ["value", "add_grad_"])
@pytest.mark.parametrize("case", SAID | NO_NUMBER)
def test_a_penalty_that_trains_nothing_is_refused_at_the_first_step(case, way):
    penalty, said = (SAID | NO_NUMBER)[case]
    regularizer = LipschitzRegularizer(network(), 1.0, penalty)
    with pytest.raises(ValueError, match=r"(?i)penalty.*" + re.escape(said)):
        getattr(regularizer, way)()


def test_in_training_too(make_module, make_trainer, regression_data):
    trainer = make_trainer(lightning, callbacks=[LipschitzPenalty(1.0, without_grad)])
    with pytest.raises(ValueError, match=r"`penalty` .*without_grad.* does not depend on"):
        trainer.fit(make_module(lightning), regression_data)


@pytest.mark.parametrize("way", ["value", "add_grad_"])
def test_a_penalty_that_is_flat_is_taken(way):
    """A hinge below its target has a gradient of zero; later it may be a constant, and NaN weights are not its."""

    def hinge(log_sigma, log_bound):
        return torch.relu(log_bound - 100) if log_bound < 100 else torch.tensor(0.0)

    model = network()
    regularizer = LipschitzRegularizer(model, 1.0, hinge)
    assert float(getattr(regularizer, way)()) == 0
    with torch.no_grad():
        model[0].weight.mul_(1e30).mul_(1e6)
        model[2].weight.mul_(1e30)
    assert float(getattr(regularizer, way)()) == 0
    diverged = network()
    with torch.no_grad():
        diverged[0].weight.fill_(math.nan)
    assert math.isnan(getattr(LipschitzRegularizer(diverged, 1.0, lambda s, b: b.exp()), way)())


class Squares:
    def __call__(self, log_sigma, log_bound):
        return (2 * log_bound).exp()


@pytest.mark.parametrize(
    ("penalty", "said"),
    [
        (Squares, "got the class Squares"),
        (nn.Softplus, "got the class Softplus"),
        (lambda log_sigma: log_sigma.sum(), "too many positional arguments"),
        (lambda log_sigma, log_bound, more: log_bound, "missing a required argument: 'more'"),
    ],
)
def test_classes_and_other_numbers_of_arguments_are_told_at_construction(penalty, said):
    for construct in (lambda: LipschitzPenalty(1.0, penalty), lambda: LipschitzRegularizer(network(), 1.0, penalty)):
        with pytest.raises(TypeError, match=r"`penalty`.*" + re.escape(said)):
            construct()


def test_callables_of_other_kinds_are_taken():
    for penalty in (
        Squares(),
        torch.add,
        lambda *logs: logs[1],
        lambda log_sigma, log_bound, scale=2: scale * log_bound,
    ):
        LipschitzPenalty(1.0, penalty)
