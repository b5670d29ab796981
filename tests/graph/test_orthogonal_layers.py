"""Networks of other libraries' 1-Lipschitz layers are certified at their true constant."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_lip import certify


def certified(net, x):
    result = certify(net, x[:1], data=x)
    assert result.certified, result.refused
    return result


def torchlip_mlp(torchlip, coefficient=1.0):
    torch.manual_seed(0)
    layers = [
        nn.Flatten(),
        torchlip.SpectralLinear(16, 12),
        torchlip.GroupSort2(),
        torchlip.SpectralLinear(12, 12),
        torchlip.GroupSort(4),
        torchlip.FrobeniusLinear(12, 1),
    ]
    return torchlip.Sequential(*layers, k_coef_lip=coefficient).eval()


@pytest.mark.parametrize("coefficient", [1.0, 2.5])
@pytest.mark.parametrize("exported", [False, True])
def test_torchlips_mlp_has_its_constant(exported, coefficient):
    torchlip = pytest.importorskip("deel.torchlip")
    net = torchlip_mlp(torchlip, coefficient)
    x = torch.randn(20, 1, 4, 4)
    net(x)
    whole = net.vanilla_export() if exported else net
    with torch.no_grad():
        assert torch.allclose(whole(x), net(x), atol=1e-6)
    result = certified(whole, x)
    # Its gradients have norm 1, or that of the layers that apply the coefficient: the constant is attained on data.
    assert result.lower <= result.upper <= result.lower * (1 + 1e-4)
    assert result.upper == pytest.approx(1.0 if coefficient == 1 else coefficient ** (2 / 5), rel=1e-4)


@pytest.mark.parametrize("exported", [False, True])
def test_torchlips_cnn_is_certified_with_group_sort_at_one(exported):
    torchlip = pytest.importorskip("deel.torchlip")
    torch.manual_seed(0)
    convolution = torchlip.SpectralConv2d(1, 4, 3, padding="same", padding_mode="circular")
    head = [torchlip.ScaledAvgPool2d(2), nn.Flatten(), torchlip.SpectralLinear(16, 3)]
    net = torchlip.Sequential(convolution, torchlip.GroupSort2(), *head).eval()
    x = torch.randn(2, 1, 4, 4)
    net(x)
    whole = net.vanilla_export() if exported else net
    without = nn.Sequential(*(m for m in whole if "GroupSort" not in type(m).__name__))
    # The activation adds nothing to the bound of the layers.
    assert certified(whole, x).upper == pytest.approx(certified(without, x).upper, rel=1e-6)


def test_orthogoniums_network_has_constant_one():
    layers = pytest.importorskip("orthogonium.layers")
    torch.manual_seed(0)
    convolution = layers.AdaptiveOrthoConv2d(1, 4, kernel_size=3, padding=1, padding_mode="circular")
    hidden = [layers.MaxMin(), nn.Flatten(), layers.OrthoLinear(64, 16), layers.MaxMin(), layers.OrthoLinear(16, 3)]
    net = nn.Sequential(convolution, *hidden).eval()
    x = torch.randn(4, 1, 4, 4)
    net(x)
    # Each call iterates and stores the vectors that its weights are divided by: it is another map each time.
    refused = certify(net, x).refused
    assert len(refused) == 1
    assert "remove_parametrizations" in refused[0]
    for module in list(net.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name)
    # Its convolution is orthogonal but for the iteration's error.
    assert certified(net, x).upper == pytest.approx(1.0, rel=1e-2)


class Normalised(nn.Module):
    def forward(self, u):
        return nn.functional.normalize(u, dim=0)

    def right_inverse(self, u):
        return u


class Iterated(nn.Module):
    """Divides a matrix by its spectral norm, by a power iteration that goes on at each call, as orthogonium does."""

    def __init__(self, m):
        super().__init__()
        self.u = nn.Parameter(torch.randn(m, 1), requires_grad=False)
        parametrize.register_parametrization(self, "u", Normalised())

    def forward(self, weight):
        v = nn.functional.normalize(weight.T @ self.u, dim=0)
        self.u = weight @ v
        return weight / (self.u.T @ weight @ v)


def test_a_parametrization_that_goes_on_in_each_call_is_refused_and_its_result_is_certified():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4)).eval()
    parametrize.register_parametrization(net[0], "weight", Iterated(4))
    x = torch.zeros(1, 5)
    for _ in range(50):
        net(x)
    (refused,) = certify(net, x).refused
    assert "change from call to call" in refused
    parametrize.remove_parametrizations(net[0], "weight")
    assert certify(net, x).upper == pytest.approx(1.0, rel=1e-4)
