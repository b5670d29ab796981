import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lip.bench.scoreboard.data import Part
from lightning_lip.bench.scoreboard.evaluation import attacked, by_numpy, certified, independent_norm, norms_of
from lightning_lip.bench.scoreboard.networks import cnn, exported, mlp, ordinary
from lightning_lip.errors import UnsupportedLayerError

SHAPE = (1, 8, 8)


def made(build, seed=0):
    torch.manual_seed(seed)
    network = build(ordinary(), SHAPE, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return exported(network)


def part_of(network, n=60):
    """Inputs, most of them with the class that the network gives them."""
    inputs = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    targets = network(inputs).argmax(1)
    targets[::5] = (targets[::5] + 1) % 3
    return Part(inputs, targets)


def dense(layer, shape):
    n = math.prod(shape)
    return layer(torch.eye(n).view(n, *shape)).flatten(1) - layer(torch.zeros(1, *shape)).flatten(1)


@pytest.mark.parametrize(("build", "tolerance"), [(mlp, 1e-8), (cnn, 2e-3)])
def test_the_certified_norm_lies_just_above_the_independent_one(build, tolerance):
    network = made(build)
    example = torch.zeros(1, *SHAPE)
    independent, truth, inputs = independent_norm(network, example), 1.0, example
    for layer in list(network)[:-1]:
        if list(layer.parameters()):
            truth *= float(np.linalg.norm(dense(layer, inputs.shape[1:]).double().numpy(), 2))
        inputs = layer(inputs)
    assert independent == pytest.approx(truth, rel=1e-3)
    assert truth * (1 - 1e-5) <= norms_of(network, example).features <= independent * (1 + 50 * tolerance)


def test_both_ways_certify_the_same_samples():
    network = made(mlp)
    part, radii = part_of(network), [0.0, 0.02, 0.05, 0.1, 0.3]
    norms = norms_of(network, part.inputs[:1])
    shares = certified(network, norms, part, radii)
    assert shares == pytest.approx(by_numpy(network, independent_norm(network, part.inputs[:1]), part, radii))
    assert shares[0] == pytest.approx(0.8)
    assert shares[0] > shares[2] > shares[4]
    assert certified(network, norms, Part(part.inputs[:0], part.targets[:0]), radii) == [0.0] * 5


@pytest.mark.parametrize("build", [mlp, cnn])
def test_an_attack_spares_what_is_certified_and_breaks_others(build):
    network = made(build)
    part = part_of(network)
    norms = norms_of(network, part.inputs[:1])
    shares = []
    for radius in (0.0, 0.02, 0.1, 2.0):
        kept = attacked(network, part, radius)
        assert certified(network, norms, Part(part.inputs[~kept], part.targets[~kept]), [radius]) == [0.0]
        shares.append(float(kept.float().mean()))
    assert shares[0] == pytest.approx(0.8)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.1


def test_an_attack_of_a_linear_classifier_is_exact():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    part = part_of(network)
    part = Part(part.inputs, part.targets % 2)
    weight, bias = (p.detach() for p in network[1].parameters())
    normal = weight[0] - weight[1]
    distance = (part.inputs.flatten(1) @ normal + bias[0] - bias[1]) / normal.norm()
    margins = torch.where(part.targets == 0, distance, -distance)
    for radius in (0.1, 0.5, 1.0):
        assert torch.equal(attacked(network, part, radius), margins > radius)


def test_a_network_without_a_certificate_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1), nn.ReLU())
    with pytest.raises(UnsupportedLayerError, match="does not end in a linear layer"):
        norms_of(network, torch.zeros(1, *SHAPE))
