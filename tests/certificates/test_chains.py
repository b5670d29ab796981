import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip.certificates.chains import chain_of
from lightning_lip.constants.modules import GELU, GELU_TANH, HARDSIGMOID, MISH, SELU, SILU
from lightning_lip.graph.tracing import trace

# Name, activation, slopes (a, b).
ACTIVATIONS = [
    (nn.ReLU(), (0, 1)),
    (nn.ReLU(inplace=True), (0, 1)),
    (nn.ReLU6(), (0, 1)),
    (nn.Hardtanh(-2.0, 3.0), (0, 1)),
    (nn.Tanh(), (0, 1)),
    (nn.LogSigmoid(), (0, 1)),
    (nn.CELU(0.5), (0, 1)),
    (nn.CELU(), (0, 1)),
    (nn.Sigmoid(), (0, 0.25)),
    (nn.Hardsigmoid(), (0, HARDSIGMOID)),
    (nn.SELU(), (0, SELU)),
    (nn.SiLU(), (1 - SILU, SILU)),
    (nn.Hardswish(), (-0.5, 1.5)),
    (nn.Mish(), (-MISH, MISH)),
    (nn.GELU(), (1 - GELU, GELU)),
    (nn.GELU(approximate="tanh"), (1 - GELU_TANH, GELU_TANH)),
    (nn.LeakyReLU(), (0.01, 1)),
    (nn.LeakyReLU(-0.3), (-0.3, 1)),
    (nn.LeakyReLU(2.0), (1, 2)),
    (nn.PReLU(4, 0.5), (0.5, 1)),
    (nn.ELU(2.0), (0, 2)),
    (nn.ELU(0.5), (0, 1)),
    (nn.Softplus(), (0, 1)),
    (nn.Softplus(beta=3.0, threshold=25.0), (0, 1)),
    (nn.Threshold(0.5, 0.5), (0, 1)),
    (nn.Dropout(0.3), (1, 1)),
    (nn.Identity(), (1, 1)),
    (nn.Softmax(dim=-1), (-0.5, 0.5)),
]


def chain(model, *shape):
    return chain_of(trace(model, torch.zeros(1, *shape)))


def between(*activations):
    return nn.Sequential(nn.Linear(3, 4), *activations, nn.Linear(4, 2))


def described(model):
    result = chain(model, 3)
    return None if result is None else result.slopes


@pytest.mark.parametrize(("activation", "slopes"), ACTIVATIONS, ids=lambda x: str(x)[:30])
def test_slopes(activation, slopes):
    model = between(activation)
    result = chain(model, 3)
    assert result.slopes == (pytest.approx(slopes, abs=1e-12),)
    assert result.outer == pytest.approx(1)
    assert [w.shape for w in result.weights] == [(4, 3), (2, 4)]
    assert torch.equal(result.weights[0], model[0].weight)


@pytest.mark.parametrize(("activation", "slopes"), ACTIVATIONS[:-1], ids=lambda x: str(x)[:30])
def test_slopes_bound_every_difference_quotient(activation, slopes):
    # A dense grid, and the finest differences that fp64 still resolves to 1e-7.
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    activation = activation.double().eval()
    with torch.no_grad():
        values = activation(x.expand(4, -1).T.clone())[:, 0]
    quotients = values.diff() / x.diff()
    low, high = described(between(activation.float()))[0]
    assert low - 1e-9 <= quotients.min()
    assert quotients.max() <= high + 1e-9
    if not isinstance(activation, (nn.Mish, nn.CELU)):
        assert quotients.max() == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize(
    "activation",
    [
        nn.Softplus(threshold=1.0),  # it jumps
        nn.Threshold(0.5, 0.0),  # it jumps
        nn.ELU(-1.0),
        nn.CELU(-1.0),
        nn.Softsign(),
        nn.BatchNorm1d(4),
        nn.LayerNorm(4),
        nn.LogSoftmax(dim=-1),
    ],
)
def test_what_else_stands_between_makes_no_chain(activation):
    assert chain(between(activation), 3) is None


def test_slopes_that_are_nan_make_no_chain():
    assert chain(between(nn.PReLU(4, math.nan)), 3) is None


def test_activations_in_a_row_are_composed():
    (slopes,) = described(between(nn.LeakyReLU(-0.5), nn.Sigmoid(), nn.Dropout(), nn.LeakyReLU(2.0)))
    assert slopes == pytest.approx((-0.25, 0.5))
    assert slopes[0] < -0.25  # rounded outwards
    assert slopes[1] > 0.5
    assert described(between(nn.ReLU(), nn.Tanh()))[0] == pytest.approx((0, 1), abs=1e-12)
    assert described(between(nn.ReLU(), nn.Tanh()))[0][0] == 0
    assert described(between()) == ((1.0, 1.0),)


def test_what_stands_outside_is_a_factor():
    result = chain(nn.Sequential(nn.Sigmoid(), *between(nn.ReLU()), nn.SELU(), nn.Softmax(dim=1)), 3)
    assert result.outer == pytest.approx(0.25 * SELU * 0.5)
    assert result.outer >= 0.25 * SELU * 0.5
    assert result.slopes == ((0.0, 1.0),)


def test_reshapes():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 4), nn.Unflatten(1, (2, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    )
    assert chain(model, 2, 3) is not None
    # Each token on its own is a chain, until tokens are joined.
    tokens = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert chain(tokens, 5, 3) is not None
    assert chain(nn.Sequential(*tokens, nn.Flatten(), nn.Linear(10, 2)), 5, 3) is None


class Forward(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def lin(n=3, m=3):
    return nn.Linear(n, m)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.b(m.a(x).relu()),
        lambda m, x: m.b(m.a(x).relu()) + m.a(x),
        lambda m, x: torch.cat([m.b(m.a(x)), x], dim=1),
        lambda m, x: (m.b(m.a(x).relu()), x),
        lambda m, x: m.b(m.a(x).flip(1)),
        # A "bias" that depends on the input: a sum in disguise.
        lambda m, x: F.linear((h := m.a(x)).relu(), m.b.weight, h),
        lambda m, x: m.b(m.a(x) / 255),
        lambda m, x: m.a(x),
        lambda m, x: F.linear(m.a(x), 2 * m.b.weight),
        lambda m, x: [m.b(y := m.a(x)), y],
        lambda m, x: m.b(m.a(x).view(2, 3, -1).mT.reshape(2, 3)),
    ],
)
def test_anything_else_is_no_chain(function):
    assert chain(Forward(function, a=lin(), b=lin()), 3) is None


def test_functional_chains_and_names_do_not_matter():
    model = Forward(lambda m, x: F.linear(torch.relu_(m.a(x)), m.b), a=lin(), b=nn.Parameter(torch.ones(2, 3)))
    result = chain(model, 3)
    assert result.slopes == ((0.0, 1.0),)
    assert torch.equal(result.weights[1], model.b)


def test_two_inputs_are_no_chain():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = lin(), lin()

        def forward(self, x, y):
            return self.b(self.a(x).relu())

    assert chain_of(trace(Two(), (torch.zeros(1, 3), torch.zeros(1, 3)))) is None


def test_dropout_that_stays_on_is_no_chain():
    model = Forward(lambda m, x: m.b(F.dropout(m.a(x), 0.5, training=True)), a=lin(), b=lin())
    assert chain(model, 3) is None
