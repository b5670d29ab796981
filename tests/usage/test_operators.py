"""Operators of observed weights against dense matrices, and registered ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_lip import Uncertified, UnsupportedLayerError, certify
from lightning_lip.norms.spectral_norms import SpectralNorms
from lightning_lip.operators.composed import LoraOperator
from lightning_lip.operators.known import operator_of
from lightning_lip.usage.observation import Observation
from lightning_lip.usage.observer import Observer
from lightning_lip.usage.operators import BlocksOperator, register_operator


class Calls(nn.Module):
    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x):
        return self.function(self, x)


def operators(model, *inputs, **kwargs):
    with Observer(model) as observer:
        model(*inputs)
    return Observation(model, observer).operators_of(model, "", **kwargs)


def jacobian_norm(model, x):
    """The largest singular value of a linear map, from its Jacobian at one input."""
    matrix = torch.autograd.functional.jacobian(lambda one: model(one[None])[0], x)
    return torch.linalg.matrix_norm(matrix.reshape(-1, x.numel()), 2)


@pytest.mark.parametrize(
    ("function", "shape", "inputs"),
    [
        (lambda m, x: x @ m.w, (4, 6), (4,)),
        (lambda m, x: F.linear(x, m.w * 3), (6, 4), (4,)),
        (lambda m, x: torch.einsum("bi,ihk->bhk", x, m.w), (4, 2, 3), (4,)),
        (lambda m, x: torch.einsum("bhi,hio->bho", x, m.w), (2, 4, 3), (2, 4)),
        (lambda m, x: torch.einsum("hoi,bhi->bho", m.w, x), (2, 3, 4), (2, 4)),
        (lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), (2, 4, 3), (2, 4)),
        (lambda m, x: F.conv1d(x, m.w, padding=1, stride=2), (5, 3, 3), (3, 8)),
        (lambda m, x: F.conv2d(x, m.w - m.w.mean((1, 2, 3), keepdim=True), groups=2), (4, 2, 3, 3), (4, 5, 5)),
        (lambda m, x: F.conv_transpose2d(x, m.w, None, 2), (3, 4, 2, 2), (3, 4, 4)),
    ],
)
def test_norm_and_gradient_are_those_of_the_map(function, shape, inputs):
    model = Calls(function, w=shape)
    (operator,) = operators(model, torch.randn(2, *inputs), convolutions="spatial")
    assert operator.name == "w"
    assert operator.module is model
    norms = SpectralNorms([operator], block_size=8, n_iterations=60)
    step = norms.step()
    x = torch.randn(inputs)
    expected = jacobian_norm(model, x)
    assert torch.allclose(step.sigma[0], expected, rtol=1e-4)
    (gradient,) = operator.norm_gradients(step.left[0], step.right[0], [model.w])
    # The norm is homogeneous in w, where the map is linear in it.
    assert torch.allclose((gradient * model.w).sum(), expected, rtol=1e-4)
    direction = torch.randn(shape)
    with torch.no_grad():
        model.w.add_(direction, alpha=1e-3)
        above = jacobian_norm(model, x)
        model.w.sub_(direction, alpha=2e-3)
        below = jacobian_norm(model, x)
    assert torch.allclose((above - below) / 2e-3, (gradient * direction).sum(), rtol=2e-2, atol=2e-2)


def test_stacked_gates_and_projections_are_one_matrix_each():
    lstm = nn.LSTM(4, 5, 2)
    found = {op.name: op for op in operators(lstm, torch.randn(3, 2, 4))}
    assert set(found) == {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}
    assert found["weight_hh_l0"].direct_parameter is lstm.weight_hh_l0
    assert found["weight_hh_l0"].codomain_shape == (20,)
    attention = nn.MultiheadAttention(8, 2)
    (stacked,) = operators(attention, *[torch.randn(3, 2, 8)] * 3)
    assert stacked.name == "in_proj_weight"
    assert stacked.direct_parameter is attention.in_proj_weight


def test_what_multiplied_nothing_is_not_known():
    with pytest.raises(UnsupportedLayerError, match="multiplied nothing"):
        operators(Calls(lambda m, x: x * m.w, w=(4,)), torch.randn(2, 4))


def test_blocks_have_an_exact_adjoint():
    weight = nn.Parameter(torch.randn(3, 4, 5))
    blocks = BlocksOperator("b", nn.Module(), lambda: weight, (weight,))
    v, u = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    assert torch.allclose((blocks.apply(v) * u).sum(), (v * blocks.adjoint(u)).sum(), rtol=1e-5)


class Adapted(nn.Module):
    """As peft's LoRA layer holds its parts."""

    def __init__(self, fan_in_fan_out=False, **settings):
        super().__init__()
        self.base_layer = nn.Linear(4, 6) if not fan_in_fan_out else nn.Linear(6, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False), "idle": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False), "idle": nn.Linear(2, 6, bias=False)})
        self.scaling, self.active_adapters = {"default": 0.5, "idle": 7.0}, ["default"]
        self.merged = self.disable_adapters = False
        self.fan_in_fan_out = fan_in_fan_out
        vars(self).update(settings)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_lora_is_one_matrix_with_its_adapters_merged(fan_in_fan_out):
    layer = Adapted(fan_in_fan_out)
    operator = operator_of(layer, "q")
    assert isinstance(operator, LoraOperator)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    change = 0.5 * b @ a
    assert torch.allclose(operator.weight(), layer.base_layer.weight + (change.T if fan_in_fan_out else change))
    operator.weight().sum().backward()
    assert a.grad is not None
    assert layer.lora_A["idle"].weight.grad is None
    layer.disable_adapters = True
    assert torch.equal(operator.weight(), layer.base_layer.weight)


@pytest.mark.parametrize(
    "settings", [{"scaling": None}, {"use_dora": {"default": True}}, {"lora_variant": {"default": object()}}]
)
def test_other_adapters_are_refused(settings):
    with pytest.raises(UnsupportedLayerError):
        operator_of(Adapted(**settings), "q")


class Mirror(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x - 2 * (x @ self.v)[:, None] * self.v


class StatedMirror(Mirror):
    pass


class Logarithm(Mirror):
    def forward(self, x):
        return torch.lgamma(self.v * x)


def test_a_registered_matrix_counts_and_no_certificate_rests_on_it():
    def matrix(module):
        return torch.eye(3) - 2 * torch.outer(module.v, module.v)

    register_operator(Logarithm, matrix)
    operator = operator_of(Logarithm(), "m")
    assert torch.allclose(SpectralNorms([operator], n_iterations=5).step().sigma, torch.tensor([5.0]))
    operator.weight().sum().backward()
    assert operator.module.v.grad is not None
    result = certify(Logarithm(), torch.randn(1, 3))
    assert isinstance(result, Uncertified)
    assert "lgamma" in str(result.refused)
    register_operator(StatedMirror, matrix, norm=lambda module: 5.0)
    assert certify(StatedMirror(), torch.randn(1, 3)).upper >= 5.0


@pytest.mark.parametrize(
    ("arguments", "error"), [((int, len), "module_type"), ((Mirror, 3), "function"), ((Mirror, len, 3), "norm")]
)
def test_wrong_arguments_are_refused(arguments, error):
    with pytest.raises(TypeError, match=error):
        register_operator(*arguments)


def test_a_registered_function_must_return_a_matrix():
    class Own(Mirror):
        pass

    register_operator(Own, lambda module: module.v)
    with pytest.raises(ValueError, match="matrix"):
        operator_of(Own(), "m")
