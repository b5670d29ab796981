import pytest
import torch
from torch import nn

from lightning_lip.bench.scoreboard.networks import NETWORKS, exported, ordinary, orthogonium, torchlip

LAYERS = {"ordinary": ordinary, "torchlip": torchlip, "orthogonium": orthogonium}
PACKAGES = {"torchlip": "deel.torchlip", "orthogonium": "orthogonium.layers"}
SHAPES = {"mlp": (1, 5, 6), "cnn": (1, 8, 8)}


@pytest.fixture(params=LAYERS)
def layers(request):
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return LAYERS[request.param]()


@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_computes_the_same_of_ordinary_layers(layers, name):
    torch.manual_seed(0)
    network = NETWORKS[name](layers, SHAPES[name], 3)
    inputs = torch.rand(4, *SHAPES[name])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for _ in range(100):
        network(inputs)  # the power iterations of the peers' layers, which orthogonium's go on with in eval mode
    plain = exported(network)
    assert {type(layer) for layer in plain if list(layer.parameters())} <= {nn.Linear, nn.Conv2d}
    assert plain(inputs).shape == (4, 3)
    assert torch.allclose(plain(inputs), network.eval()(inputs), atol=1e-5)
    before = [parameter.clone() for parameter in plain.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, plain.parameters()))


def test_ordinary_layers_start_orthogonal_without_bias():
    layer = ordinary().linear(6, 4)
    assert torch.allclose(layer.weight @ layer.weight.mT, torch.eye(4), atol=1e-5)
    assert not layer.bias.any()


def test_torchlip_has_a_head_of_unit_rows_for_its_hkr_loss():
    pytest.importorskip("deel.torchlip")
    head = torchlip(disjoint_head=True).head(8, 3).eval()
    with torch.no_grad():
        head.parametrizations.weight.original *= 5
    assert head.weight.norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
