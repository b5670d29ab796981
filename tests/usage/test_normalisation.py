"""Normalisations in a product of norms: what is fused, what is left out, what counts by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip import LipschitzRegularizer


def net_of(*layers):
    torch.manual_seed(0)
    net = nn.Sequential(*layers)
    for module in net:
        if hasattr(module, "running_var") and module.running_var is not None:
            module.running_var.uniform_(0.5, 2.0)
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 1.0, 0.3)
    return net


def regularizer_of(net, inputs, **settings):
    return LipschitzRegularizer(net, 1.0, inputs=inputs, block_size=16, n_iterations=30, **settings)


def counts(regularizer):
    return regularizer.coverage.normalisations


def test_a_batch_norm_behind_a_layer_is_one_operator_as_in_a_traced_bound():
    x = torch.randn(4, 3, 6, 6)
    net = net_of(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 2),
    )
    product = regularizer_of(net, x)
    traced = LipschitzRegularizer(net, 1.0, example_input=x, block_size=16, n_iterations=30)
    assert list(product.spectral_norms()) == list(traced.spectral_norms()) == ["0+1", "4+5", "6"]
    assert counts(product) == "2 fused with the batch normalisation behind them"
    assert torch.allclose(product.bound(), traced.bound(), rtol=1e-5)
    product.add_grad_()
    mine = [p.grad.clone() if p.grad is not None else None for p in net.parameters()]
    net.zero_grad()
    traced.add_grad_()
    for own, parameter in zip(mine, net.parameters(), strict=True):
        assert (own is None) == (parameter.grad is None)
        assert own is None or torch.allclose(own, parameter.grad, rtol=1e-4, atol=1e-6)
    assert net[1].weight.grad.abs().sum() > 0


def test_the_fused_norm_follows_the_running_statistics():
    net = net_of(nn.Linear(3, 4), nn.BatchNorm1d(4))
    regularizer = regularizer_of(net, torch.randn(5, 3))
    net[1].running_var.mul_(4.0)
    net[1].weight.data.mul_(3.0)
    matrix = (net[1].weight / (net[1].running_var + net[1].eps).sqrt())[:, None] * net[0].weight
    assert torch.allclose(regularizer.bound().float(), torch.linalg.matrix_norm(matrix, 2), rtol=1e-4)


@pytest.mark.parametrize(
    ("norm", "invariant"),
    [
        (nn.LayerNorm(6), True),
        (nn.RMSNorm(6), True),
        (nn.GroupNorm(2, 6), True),
        (nn.BatchNorm1d(6, track_running_stats=False), True),
        (nn.BatchNorm1d(6), False),
    ],
)
def test_a_layer_is_left_out_exactly_where_its_scale_is_undone(norm, invariant):
    norm.eps = 1e-12
    net = net_of(nn.Linear(4, 6, bias=False), norm, nn.Linear(6, 3))
    x = torch.randn(8, 4)
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[0].weight.mul_(5.0)
    net.train(invariant), scaled.train(invariant)
    assert torch.allclose(net(x), scaled(x), atol=1e-4) == invariant
    regularizer = regularizer_of(net.train(), x)
    if invariant:
        norms = regularizer.spectral_norms()
        assert list(norms) == ["1", "2"]
        assert torch.allclose(norms["1"], norm.weight.abs().max())
        assert counts(regularizer).startswith("1 left out, since")
        regularizer.add_grad_()
        assert net[0].weight.grad is None
        assert (norm.weight.grad != 0).sum() == 1
    else:
        assert list(regularizer.spectral_norms()) == ["0+1", "2"]


def test_without_gains_a_normalisation_is_no_factor():
    net = net_of(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3))
    assert list(regularizer_of(net, torch.randn(2, 4)).spectral_norms()) == ["2"]


def test_a_batch_norm_behind_no_layer_counts_by_its_own_scale():
    net = net_of(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
    norms = regularizer_of(net, torch.randn(2, 3, 4, 4)).spectral_norms()
    assert list(norms) == ["0", "1", "3"]
    scale = net[0].weight / (net[0].running_var + net[0].eps).sqrt()
    assert torch.allclose(norms["0"].float(), scale.abs().max())


def test_a_shared_layer_before_two_batch_norms_keeps_its_own_norm():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norms = nn.Linear(4, 4), nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])

        def forward(self, x):
            return sum(norm(self.layer(x)) for norm in self.norms)

    assert list(regularizer_of(Heads(), torch.randn(3, 4)).spectral_norms()) == ["layer", "norms.0", "norms.1"]


class Residual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), norm

    def forward(self, x):
        h = self.layer(x)
        return self.norm(h) + F.gelu(h)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(4)])
def test_what_has_another_use_is_neither_fused_nor_left_out(norm):
    assert list(regularizer_of(Residual(norm), torch.randn(3, 4)).spectral_norms()) == ["layer", "norm"]


def test_selections_hold():
    x = torch.randn(5, 4)
    net = net_of(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))

    def names(**selection):
        return list(regularizer_of(net, x, **selection).spectral_norms())

    assert names() == ["0+1", "3", "4"]
    assert names(exclude=nn.BatchNorm1d) == ["0", "3", "4"]
    assert names(exclude=[nn.BatchNorm1d, nn.LayerNorm]) == ["0", "4"]
    assert names(exclude="0") == ["1", "3", "4"]
    assert names(layers=nn.Linear) == ["0", "2", "4"]
    assert names(layers=["0", "1"]) == ["0+1"]
    assert names(layers="2") == ["2"]


def test_where_nothing_else_is_there_the_layers_stay():
    net = net_of(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False))
    assert list(regularizer_of(net, torch.randn(2, 4)).spectral_norms()) == ["0"]


def test_the_penalty_of_a_fused_layer_falls_by_gamma_too():
    net = net_of(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    regularizer = LipschitzRegularizer(net, 1.0, inputs=torch.randn(5, 4))
    optimizer = torch.optim.SGD([net[1].weight], lr=0.1)
    start = float(regularizer.bound())
    for _ in range(50):
        optimizer.zero_grad()
        regularizer.add_grad_()
        optimizer.step()
    assert float(regularizer.bound()) < 0.9 * start
