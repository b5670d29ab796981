import copy
import itertools
import math

import pytest
import torch
from support.networks import Lambda
from support.truth import check_bound, norm, operator_norms, value_of
from torch import nn

from lightning_lip.certificates.interval import Certificate, certify
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound

LAYERS = [
    (kind, settings)
    for kind in (nn.RNN, nn.LSTM, nn.GRU)
    for settings in (
        {},
        {"bias": False},
        {"num_layers": 2},
        {"bidirectional": True, "num_layers": 2},
    )
] + [(nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {"proj_size": 2}), (nn.LSTM, {"proj_size": 2, "bias": False})]


def wild(layer, scale):
    """Return the layer with weights of a scale, at which slopes are steep."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = scale * torch.randn_like(parameter, dtype=torch.float64)
    return layer


@pytest.mark.parametrize(("kind", "settings"), LAYERS)
def test_recurrent_layers(kind, settings):
    for scale, batch_first in itertools.product((0.3, 1.5), (True, False)):
        layer = wild(kind(3, 4, batch_first=batch_first, **settings), scale)

        def forward(m, x):
            outputs, states = m.layer(x if m.layer.batch_first else x.transpose(0, 1))
            outputs = outputs if m.layer.batch_first else outputs.transpose(0, 1)
            states = states if isinstance(states, tuple) else (states,)
            return outputs, *(state.transpose(0, 1) for state in states)

        model = Lambda(forward, layer=layer)
        for x_scale in (0.1, 2.0):
            check_bound(model, 4, 3, n=3, scale=x_scale)
        last = Lambda(lambda m, x: forward(m, x)[0][:, -1], layer=layer)
        check_bound(last, 4, 3, n=2)


def test_a_linear_recurrence_is_bounded_by_its_geometric_sum():
    layer = wild(nn.RNN(1, 1, bias=False, nonlinearity="relu", batch_first=True), 1.0)
    layer.weight_ih_l0.data.fill_(2.0)
    layer.weight_hh_l0.data.fill_(0.5)
    model = Lambda(lambda m, x: m.layer(x)[0], layer=layer)
    value, worst = check_bound(model, 5, 1, expected=2 * sum(0.5**k for k in range(5)), n=20)
    assert worst > 0.8 * value
    bound = NetworkBound.trace(model, torch.randn(2, 5, 1).double())
    assert [op.name for op in bound.operators] == ["layer.weight_ih_l0", "layer.weight_hh_l0"]
    log_sigma = torch.tensor([2.0, 0.5]).log().requires_grad_()
    (slope,) = torch.autograd.grad(bound.log_bound(log_sigma), log_sigma)
    assert slope[0].item() == pytest.approx(1.0)
    assert 0 < slope[1].item() < 1


def test_the_cell_state_of_an_lstm_grows_by_one_a_step():
    layer = wild(nn.LSTM(1, 1, bias=False, batch_first=True), 1e-9)
    model = Lambda(lambda m, x: m.layer(x, (m.h, m.c))[0], layer=layer, h=torch.zeros(1, 2, 1), c=torch.zeros(1, 2, 1))
    w = norm(layer.weight_ih_l0)
    for c, length in ((0.0, 1), (8.0, 1), (8.0, 5)):
        model.c = torch.full((1, 2, 1), -c).double()
        model.h = model.h.double()
        k = math.sqrt(1 + (c + length - 1) ** 2 / 16)
        # Of the last state alone: the sum of the kernel, k' + (T - 1) k without a recurrent weight.
        expected = w * (math.hypot(k, 0.25) + (length - 1) * k)
        assert value_of(model, torch.randn(2, length, 1).double()) == pytest.approx(expected, rel=1e-6)
    bound = NetworkBound.trace(model, torch.randn(2, 5, 1).double())
    before = bound.log_bound(operator_norms(bound.operators).log()).item()
    model.c.mul_(100)
    assert bound.log_bound(operator_norms(bound.operators).log()).item() > before + math.log(50)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_in_a_loop(kind, bias):
    def forward(m, x):
        state = None
        for i in range(4):
            state = m.cell(x[:, i], state)
        return state

    for scale in (0.3, 1.5):
        model = Lambda(forward, cell=wild(kind(3, 4, bias=bias), scale))
        check_bound(model, 4, 3, n=4)
        bound = NetworkBound.trace(model, torch.randn(2, 4, 3).double())
        assert [op.multiplicity for op in bound.operators] == [4, 4]


def test_a_cell_takes_constant_inputs_and_states_that_depend_on_the_input():
    cell = wild(nn.RNNCell(3, 3), 1.0)
    check_bound(Lambda(lambda m, x: m.c(m.x.expand(len(x), 3), x), c=cell, x=torch.randn(1, 3)), 3)
    gru = wild(nn.GRUCell(3, 3), 1.0)
    check_bound(Lambda(lambda m, x: m.c(m.x.expand(len(x), 3), 5 * x.tanh()), c=gru, x=torch.randn(1, 3)), 3, n=10)
    lstm = wild(nn.LSTMCell(3, 3), 1.0)
    check_bound(Lambda(lambda m, x: m.c(x, (x, 7 * x.sin())), c=lstm), 3, n=10)


def written(m, x):
    """An LSTM as people write it."""
    h = c = x.new_zeros(x.shape[0], 3)
    for t in range(3):
        i, f, g, o = m.gates(torch.cat([x[:, t], h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def test_an_lstm_that_is_written_out():
    check_bound(Lambda(written, gates=wild(nn.Linear(5, 12), 1.0)), 3, 2, n=6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.lstm(x, (x[:1], x[:1])), "initial state depends|mixes"),
        (lambda m, x: m.gru(x.transpose(0, 1), x[:, :1].transpose(0, 1).contiguous())[0], "initial state depends"),
        (lambda m, x: m.gru(x)[0], "mixes the samples"),
        (lambda m, x: m.cell(x[:, 0], (x[:, 0], x[:, 1])), "cell state is not known to be bounded"),
        (lambda m, x: m.grucell(x[:, 0], x[:, 1]), "state is not known to be bounded"),
        (lambda m, x: m.gru(x[0])[0], "mixes the samples"),
    ],
)
def test_what_has_no_bound_is_refused(function, reason):
    model = Lambda(function, gru=nn.GRU(3, 3), lstm=nn.LSTM(3, 3), cell=nn.LSTMCell(3, 3), grucell=nn.GRUCell(3, 3))
    with pytest.raises(UnsupportedLayerError, match=reason):
        NetworkBound.trace(model, torch.randn(2, 5, 3))


def test_a_long_sequence_is_refused_and_dropout_is_random():
    layer = nn.RNN(1, 1, 2, batch_first=True, dropout=0.5)
    with pytest.raises(UnsupportedLayerError, match="1024 steps"):
        NetworkBound.trace(layer, torch.randn(2, 1100, 1))
    assert NetworkBound.trace(layer, torch.randn(2, 3, 1)).operators

    def on(m, x):
        m.layer.train()
        return m.layer(x)[0]

    with pytest.raises(UnsupportedLayerError, match="dropout stays on"):
        NetworkBound.trace(Lambda(on, layer=layer), torch.randn(2, 3, 1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_certificates(kind):
    layer = kind(3, 4, batch_first=True)
    model = Lambda(lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=layer, head=nn.Linear(4, 2))
    certificate = certify(model, torch.randn(2, 20, 3), data=torch.randn(8, 20, 3))
    assert isinstance(certificate, Certificate)
    bound = NetworkBound.trace(copy.deepcopy(model).double(), torch.randn(2, 20, 3).double())
    with torch.no_grad():
        value = bound.log_bound(operator_norms(bound.operators).log()).exp().item()
    assert value <= certificate.upper <= value * (1 + 1e-5)
    assert certificate.lower <= certificate.upper
