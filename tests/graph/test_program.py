import math

import mpmath
import pytest
import torch
from torch import nn

from lightning_lip import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound, bound_of
from lightning_lip.graph.program import ProductBound, repeated
from lightning_lip.operators.selection import cover


def shared():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), layer)


def test_a_norm_is_a_factor_as_often_as_its_layer_counts():
    bound = ProductBound(cover(shared()).operators)
    assert (bound.kind, bound.multiplicities) == ("product", [2, 1])
    log_sigma = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    value = bound.log_bound(log_sigma)
    value.backward()
    assert value.item() == -1.0
    assert log_sigma.grad.tolist() == [2.0, 1.0]
    assert repeated(log_sigma, [2, 1]).tolist() == [0.5, 0.5, -2.0]
    assert repeated(log_sigma, [1, 1]) is log_sigma
    assert bound.log_bound(torch.tensor([0.0, -math.inf])).item() == -math.inf


def test_the_logarithm_of_the_product_is_rounded_up():
    bound = ProductBound(cover(shared()).operators)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        norms = (20 * torch.randn(2, generator=generator, dtype=torch.float64)).exp().tolist()
        with mpmath.workdps(50):
            exact = 2 * mpmath.log(norms[0]) + mpmath.log(norms[1])
            assert exact <= bound.log_bound_up(norms) <= exact + 1e-13
    assert bound.log_bound_up([0.0, math.inf]) == -math.inf
    assert bound.log_bound_up([1.0, math.inf]) == math.inf


def test_every_parameter_of_a_product_is_selected():
    model = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    bound = ProductBound(cover(model).operators)
    assert [bound.selected(op) for op in bound.operators] == [list(op.parameters) for op in bound.operators]
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert bound.selected(bound.operators[0])[0] is model[0].weight


class Squared(nn.Module):
    """Two layers, the second behind an operation without a finite constant."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.example_input_array = torch.zeros(1, 3)

    def forward(self, x):
        return self.second(self.first(x).square())


def test_an_input_decides_which_bound_it_is():
    model = shared()
    assert isinstance(bound_of(model, None)[0], ProductBound)
    network, _ = bound_of(model, torch.zeros(1, 3), layers="2")
    assert isinstance(network, NetworkBound)
    assert [network.selected(op) for op in network.operators] == [[], [model[2].weight]]
    model.example_input_array = torch.zeros(1, 3)
    assert bound_of(model, None)[0].kind == "bound"


def test_a_modules_own_input_without_a_bound_leaves_the_product():
    with pytest.warns(UserWarning, match=r"(?s)the product of the layers does instead.*square"):
        assert bound_of(Squared(), None)[0].kind == "product"
    with pytest.raises(UnsupportedLayerError, match="square"):
        bound_of(Squared(), torch.zeros(1, 3))
