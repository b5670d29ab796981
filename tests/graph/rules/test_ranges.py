"""Ranges hold the values at every input that is tried, and are no wider than they should be."""

import math

import pytest
import torch
from support.networks import Lambda
from torch import nn
from torch.nn import functional as F

from lightning_lip.graph.builder import Builder
from lightning_lip.graph.rules.ranges import range_of, reciprocal_range
from lightning_lip.graph.tracing import trace
from lightning_lip.graph.walk import walk_graph
from lightning_lip.rigorous.rounding import EVERYTHING, Interval

INF = math.inf


def range_of_output(function, **members):
    traced = trace(Lambda(function, **members), torch.randn(2, 4).double())
    builder = Builder(traced)
    walk_graph(builder, traced)
    (node,) = (n for n in traced.graph.nodes if n.name in traced.outputs)
    return range_of(builder, node)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (lambda m, x: x, -INF, INF),
        (lambda m, x: x.tanh() - 3 * x.sigmoid(), -4, 1),
        (lambda m, x: torch.rsub(x.sin(), 1, alpha=2), -1, 3),
        (lambda m, x: torch.sub(x.sin(), x.cos(), alpha=-2), -3, 3),
        (lambda m, x: torch.add(1, x.cos(), alpha=-2), -1, 3),
        (lambda m, x: F.relu(x) + 2, 2, INF),
        (lambda m, x: -F.relu(x).exp(), -INF, -1),
        (lambda m, x: x.clamp(-2, 3).abs(), 0, 3),
        (lambda m, x: x.clamp(2, 3).abs().neg().abs(), 2, 3),
        (lambda m, x: x.clamp(max=-2).square(), 4, INF),
        (lambda m, x: x.clamp(-2, 1) ** 2, 0, 4),
        (lambda m, x: x.abs().clamp_max(2.0).clamp_min(1.0), 1, 2),
        (lambda m, x: x.clamp(m.fixed.min(), None), -INF, INF),
        (lambda m, x: x.sin() / (x.cos() + 3), -0.5, 0.5),
        (lambda m, x: x.sin() / x.cos(), -INF, INF),
        (lambda m, x: (x.abs() + 4).sqrt(), 2, INF),
        (lambda m, x: F.hardtanh(x, -0.5, 2).exp(), math.exp(-0.5), math.exp(2)),
        (lambda m, x: torch.cat([x.tanh(), 2 + x.cos()], 1), -1, 3),
        (lambda m, x: torch.stack([x.atan(), x.erf()], 1)[:, :, 1:], -math.pi / 2, math.pi / 2),
        (lambda m, x: torch.where(x.detach() * 0 == 0, x.sin(), 5.0), -1, 5),
        (lambda m, x: torch.maximum(x.sigmoid(), x.cos() + 4), 0, 5),
        (lambda m, x: F.pad(x.sigmoid() + 1, (1, 1), value=-3.0), -3, 2),
        (lambda m, x: F.pad(x.sigmoid() + 1, (1, 1)), 0, 2),
        (lambda m, x: (x.sigmoid() + 1)[:, None].tril(), 0, 2),
        (lambda m, x: (x.sigmoid() + 1).sort(1)[0].split(2, 1)[1], 1, 2),
        (lambda m, x: (x.sigmoid() + 1).mean(1, keepdim=True), 1, 2),
        (lambda m, x: (x.sigmoid() + 1).max(1)[0], 1, 2),
        (lambda m, x: F.softplus(x, 2.0), 0, INF),
        (lambda m, x: F.softplus(x, -2.0), -INF, 0),
        (lambda m, x: m.cell(x, (x, x.sin()))[1], -2, 2),
        (lambda m, x: m.cell(x, (x, x.sin()))[0], -1, 1),
        (lambda m, x: m.gru(x, 3 * x.sin()), -3, 3),
        (lambda m, x: x.sin() * torch.tensor([1.0, -3.0, 2.0, 0.0]).double(), -3, 3),
        (lambda m, x: x.sin() * m.fixed, -INF, INF),
        (lambda m, x: F.gelu(x), -INF, INF),
        (lambda m, x: torch.fft.fft(x).abs(), 0, INF),
        (lambda m, x: x.sigmoid() + torch.fft.fft(x.sin()).real, -INF, INF),
    ],
)
def test_ranges(function, low, high):
    members = {"cell": nn.LSTMCell(4, 4).double(), "gru": nn.GRUCell(4, 4).double(), "fixed": torch.ones(4).double()}
    found = range_of_output(function, **members)
    assert found.low == pytest.approx(low, rel=1e-12, abs=1e-12)
    assert found.high == pytest.approx(high, rel=1e-12)
    for scale in (0.1, 3.0, 100.0):
        values = function(Lambda(function, **members), scale * torch.randn(500, 4).double())
        assert found.low <= values.min().item()
        assert values.max().item() <= found.high


def test_reciprocals():
    assert reciprocal_range(Interval(-1.0, 2.0)) == EVERYTHING
    assert reciprocal_range(Interval(0.0, 2.0)) == EVERYTHING
    found = reciprocal_range(Interval(-4.0, -2.0))
    assert found.low <= -0.5 <= -0.25 <= found.high
    assert found.low > -0.51
