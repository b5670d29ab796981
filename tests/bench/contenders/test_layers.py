import copy

import pytest
import torch
from support.contenders import CPU, SMALL_CONVOLUTIONS, dense_norm, small_convolutions
from torch import nn

from lightning_lip.bench.contenders import peers
from lightning_lip.bench.contenders.layers import adjoint, apply, exact_norm, input_shapes
from lightning_lip.bench.contenders.models import TransformerBlock


def test_exact_norms_are_those_of_the_dense_operators():
    task, _ = peers.task_of(SMALL_CONVOLUTIONS, CPU)
    network = task.network()
    for name in task.names:
        layer, shape = network.get_submodule(name), task.input_shapes[name]
        assert exact_norm(layer, shape) == pytest.approx(dense_norm(layer, shape), rel=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_exact_norm_of_a_matrix_of_convolution(stride):
    layer = nn.Conv2d(3, 5, 1, stride=stride)
    assert exact_norm(layer, (3, 4, 4)) == pytest.approx(dense_norm(layer, (3, 4, 4)), rel=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(2, 3, 3, stride=2, padding=1)])
def test_adjoint_is_the_adjoint(layer):
    shape = (4,) if isinstance(layer, nn.Linear) else (2, 5, 5)
    layer = copy.deepcopy(layer).double()
    inputs = torch.randn(1, *shape, dtype=torch.float64)
    images = apply(layer, layer.weight, inputs)
    outputs = torch.randn_like(images)
    back = adjoint(layer, layer.weight, outputs, shape)
    products = (images * outputs).sum().item(), (inputs * back).sum().item()
    assert products[0] == pytest.approx(products[1], abs=1e-13 * float(images.norm() * outputs.norm()))


def test_recording_the_input_shapes_leaves_the_network_alone():
    network = small_convolutions().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert input_shapes(network, ["0", "5"], torch.randn(4, 2, 6, 6)) == {"0": (2, 6, 6), "5": (16,)}
    assert network.training
    assert not network[0]._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_linear_layer_maps_one_token():
    block = TransformerBlock(8, 2, causal=True)
    assert input_shapes(block, ["mlp.0", "mlp.2"], torch.randn(1, 5, 8)) == {"mlp.0": (8,), "mlp.2": (32,)}
