"""MaxMin: what it computes, and its constant in a traced graph."""

import pytest
import torch
from torch import nn

from lightning_lip import MaxMin, certify
from lightning_lip.graph.bound import NetworkBound


@pytest.mark.parametrize(("dim", "shape"), [(1, (4, 6)), (-1, (4, 3, 8)), (1, (2, 4, 5, 5))])
def test_it_sorts_each_pair_of_channels(dim, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = MaxMin(dim)(x)
    pairs = torch.stack(x.chunk(2, dim), -1).sort(-1, descending=True).values
    assert torch.equal(y, torch.cat(pairs.unbind(-1), dim))


def test_an_odd_number_of_channels_and_a_dim_that_is_none_are_refused():
    with pytest.raises(ValueError, match="even number"):
        MaxMin()(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="dim"):
        MaxMin("channels")


@pytest.mark.parametrize("shape", [(1, 6), (1, 4, 5, 5)])
def test_its_constant_is_one(shape):
    x = torch.zeros(shape)
    assert NetworkBound.trace(MaxMin(), x).log_bound(torch.zeros(0, dtype=torch.float64)).exp().item() == 1


def test_a_net_with_it_is_certified_at_the_product_of_its_norms():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), MaxMin(), nn.Linear(6, 4), MaxMin(), nn.Linear(4, 3)).double()
    product = 1.0
    for layer in net[::2]:
        product *= torch.linalg.svdvals(layer.weight)[0].item()
    assert certify(net, torch.zeros(1, 5).double()).upper == pytest.approx(product, rel=1e-9)
