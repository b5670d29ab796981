"""What the check of a whole certificate finds, with rules and traces that are wrong on purpose."""

import random

import numpy as np
import pytest
import torch
from support.networks import Lambda, Residual, linear, mlp, randomised_batch_norm
from torch import nn
from torch.nn import functional as F

from lightning_lip.certificates.contradiction import contradiction
from lightning_lip.certificates.interval import certify
from lightning_lip.constants import modules as constants
from lightning_lip.constants.modules import register_constant
from lightning_lip.graph.bound import NetworkBound

X = torch.randn(2, 4)


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(constants, "_RULES", {})


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (setattr(m, "n", m.n + 1), x * m.n)[1],
        lambda m, x: (setattr(m, "n", m.n + 1), x * 3 if m.n % 2 else x)[1],
        lambda m, x: (m.entries.append(2 * m.entries[-1]), x * m.entries[-1])[1],
        lambda m, x: x * random.uniform(1, 9),
        lambda m, x: x * float(np.random.mtrand._rand.rand()),
        lambda m, x: x * m.python.random(),
        lambda m, x: x * m.numpy.random(),
    ],
)
def test_a_forward_that_reads_a_state_of_python_is_refused(function):
    model = Lambda(function)
    model.n, model.entries, model.python, model.numpy = 0, [1.0], random.Random(0), np.random.default_rng(0)
    result = certify(model, X)
    assert not result.certified
    assert "other values than its traced graph" in result.refused[0]
    assert (model.n, model.entries) == (0, [1.0])


class Stated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: 3 * x, "slope is 3"),
        (lambda x: torch.round(x), "slope is"),
        (lambda x: x.detach() + x.pow(2) * 1e-2, "slope is"),
        (lambda x: 0.5 * x + 0.1 * x.flip(0), "moves with another sample"),
        (lambda x: x / 0, "NaN or an infinity"),
        (lambda x: torch.where(x > 0, 1.0, -1.0), "slope is"),
    ],
)
def test_a_stated_constant_that_is_wrong_is_contradicted(function, reason):
    register_constant(Stated, lambda module: 1.0)
    result = certify(nn.Sequential(Stated(function)), X)
    assert not result.certified
    assert reason in result.refused[0]
    if "slope" in reason:
        assert "between" in result.refused[0]
        assert "apart" in result.refused[0]


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.5, 8.0])
def test_the_rounding_of_half_precision_hides_nothing(dtype, factor):
    """What fp64 finds is final: in bf16 itself a slope of 8 would pass for rounding."""
    register_constant(Stated, lambda module: 1.0)
    result = certify(nn.Sequential(Stated(lambda x: factor * x)).to(dtype), X.to(dtype))
    assert not result.certified


@pytest.mark.parametrize(
    "model",
    [
        mlp(4, 8, 8, 2),
        mlp(4, 8, 2, dtype=torch.float16),
        mlp(4, 8, 2, dtype=torch.bfloat16),
        mlp(4, 8, 2, activation=nn.Softplus, scale=8.0),
        mlp(4, 8, 2, activation=nn.Hardswish),
        mlp(4, 8, 2, scale=1e12),
        Residual(4),
        nn.Sequential(linear(4, 4).float(), nn.RMSNorm(4), nn.LayerNorm(4)),
        Lambda(lambda m, x: m.a(x.half().float()) + 1e6, a=nn.Linear(4, 4)),
        Lambda(lambda m, x: x.to(torch.bfloat16).double()),
        Lambda(lambda m, x: m.a(x) * 0.1 - m.a(0.1 * x), a=nn.Linear(4, 4, bias=False)),
        Lambda(lambda m, x: (m.a(x), x.T), a=nn.Linear(4, 4)),
        Lambda(lambda m, x: x[:, :0]),
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 3), randomised_batch_norm(nn.BatchNorm1d(3))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_true_bound_is_not_contradicted(model):
    result = certify(model, X)
    assert result.certified, result.refused
    network = NetworkBound.trace(model, X)
    assert contradiction(network, X, result.upper) is None


def test_a_bound_below_the_slope_between_two_points_is_found():
    model = nn.Sequential(linear(4, 4), nn.ReLU()).float()
    network = NetworkBound.trace(model, X)
    true = torch.linalg.matrix_norm(model[0].weight, 2).item()
    assert "more than the bound" in contradiction(network, X, true / 4)
    assert contradiction(network, X, true * (1 + 1e-6)) is None


def test_the_graph_is_compared_with_the_model(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4))
    network = NetworkBound.trace(model, X)
    monkeypatch.setattr(model[0], "forward", lambda x: F.linear(x, 2 * model[0].weight, model[0].bias))
    assert "other values than its traced graph" in contradiction(network, X, 1e3)


def test_integers_and_numbers_beside_the_input_stay_as_they_are():
    assert certify(Lambda(lambda m, x, k: x * k), (X, 3)).upper == pytest.approx(3.0)
    places = Lambda(lambda m, x, i: (2 * x, m.table[i])[0], table=torch.randn(2, 3))
    assert certify(places, (X, torch.tensor([0, 1]))).upper == pytest.approx(2.0)


def test_a_layer_that_counts_its_calls_for_itself_is_certified():
    def function(m, x):
        m.calls += 1
        return m.a(x)

    model = Lambda(function, a=nn.Linear(4, 2))
    model.calls = 0
    assert certify(model, X).certified
    assert model.calls == 0


@pytest.mark.parametrize(
    "asks", [lambda x: torch.is_grad_enabled(), lambda x: torch.is_inference_mode_enabled(), lambda x: x.requires_grad]
)
def test_a_forward_that_asks_whether_gradients_are_recorded_is_refused(asks):
    result = certify(Lambda(lambda m, x: 5 * x if asks(x) else x), X)
    assert "whether gradients are recorded" in result.refused[0]


def test_a_forward_that_runs_without_gradients_only_is_certified():
    assert certify(Lambda(lambda m, x: torch.mul(x, 3, out=torch.empty_like(x))), X).upper == pytest.approx(3.0)
