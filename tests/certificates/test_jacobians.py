import copy
import math

import pytest
import torch
from torch import nn

from lightning_lip.certificates import jacobians
from lightning_lip.certificates.jacobians import largest_jacobian_norm


def network(n=5, m=3, activation=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n, 8), activation(), nn.Linear(8, m))


def data(n_samples=20, n=5):
    return torch.randn(n_samples, n, generator=torch.Generator().manual_seed(0))


def truth(model, inputs):
    """Return each sample's norm, by torch.autograd.functional.jacobian and an SVD in fp64."""
    model = copy.deepcopy(model).double().eval()
    norms = []
    for x in inputs.double():
        jacobian = torch.autograd.functional.jacobian(lambda z: model(z[None])[0].flatten(), x)
        norms.append(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item())
    return norms


@pytest.fixture(params=["formed", "iterated"])
def path(request, monkeypatch):
    if request.param == "iterated":
        monkeypatch.setattr(jacobians, "FEW_OUTPUTS", 0)
    return request.param


def test_both_ways_match_the_svd(path):
    for activation in (nn.Tanh, nn.ReLU, nn.GELU):
        model = network(activation=activation)
        expected = max(truth(model, data()))
        value = largest_jacobian_norm(model, data())
        assert value == pytest.approx(expected, rel=1e-12 if path == "formed" else 1e-3)
        # From below, up to rounding.
        assert value <= expected * (1 + 1e-13)


def test_many_outputs_take_the_iteration(monkeypatch):
    model = network(m=jacobians.FEW_OUTPUTS + 1)
    monkeypatch.setattr(jacobians, "_norms_of_rows", None)
    assert largest_jacobian_norm(model, data(4)) == pytest.approx(max(truth(model, data(4))), rel=1e-3)


def test_images_in_chunks_and_half_precision(path, monkeypatch):
    monkeypatch.setattr(jacobians, "CHUNK", 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(8, 2, 4, 4)
    expected = max(truth(model, images))
    assert largest_jacobian_norm(model.train(), images) == pytest.approx(expected, rel=1e-3)
    # The stored half-precision weights are evaluated in fp64.
    half = copy.deepcopy(model).bfloat16()
    assert largest_jacobian_norm(half, images) == pytest.approx(max(truth(half, images)), rel=1e-3)


def test_forms_of_data():
    model, inputs = network(), data()
    expected = largest_jacobian_norm(model, inputs)
    target = torch.zeros(20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, target), batch_size=6)
    for form in (loader, [inputs], list(inputs.split(7)), [(inputs, target)], iter([[inputs, target]]), [(inputs,)]):
        assert largest_jacobian_norm(model, form) == pytest.approx(expected, rel=1e-13)
    assert largest_jacobian_norm(model, inputs, torch.zeros(1, 5)) == pytest.approx(expected, rel=1e-13)
    assert largest_jacobian_norm(model, inputs, (torch.zeros(1, 5),)) == pytest.approx(expected, rel=1e-13)
    for form in (inputs, loader, [{"input": inputs}]):
        assert largest_jacobian_norm(model, form, {"input": torch.zeros(1, 5)}) == pytest.approx(expected, rel=1e-13)


class Two(nn.Module):
    def forward(self, x, y):
        return 3 * x + 4 * y


@pytest.mark.parametrize("path", ["formed", "iterated"], indirect=True)
def test_networks_of_several_inputs(path):
    x = data()
    # |3 x + 4 y| <= 5 |(x, y)|
    for example, batch in (
        ((x[:1], x[:1]), (x, x)),
        ((x[:1], x[:1]), (x, x, torch.zeros(20))),
        ({"x": x[:1], "y": x[:1]}, {"y": x, "x": x, "target": torch.zeros(20)}),
    ):
        assert largest_jacobian_norm(Two(), [batch], example) == pytest.approx(5, rel=1e-12)


def test_only_the_first_inputs_are_used():
    model, inputs = network(), data()
    expected = max(truth(model, inputs[:7]))
    for form in (inputs, list(inputs.split(4))):
        assert largest_jacobian_norm(model, form, max_inputs=7) == pytest.approx(expected)
    assert max(truth(model, inputs)) > expected


def test_the_model_is_left_as_it_was(path):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    inputs = data()
    value = largest_jacobian_norm(model, inputs)
    assert value == largest_jacobian_norm(model, inputs)  # dropout is off
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[key], v) for key, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not inputs.requires_grad
    autocast = torch.autocast("cpu", torch.bfloat16)
    for context in (torch.no_grad(), torch.inference_mode(), autocast, torch.device("meta")):
        with context:
            assert largest_jacobian_norm(model, inputs) == value
    with torch.inference_mode():
        assert largest_jacobian_norm(copy.deepcopy(model), inputs * 1) == value


class Constant(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function", [lambda x: torch.ones(len(x), 2), lambda x: (x * 0).double(), lambda x: x.detach() + torch.ones(1, 5)]
)
def test_constant_networks(path, function):
    assert largest_jacobian_norm(Constant(function), data()) == 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_magnitudes(path, scale):
    model = Constant(lambda x: x * scale)
    assert largest_jacobian_norm(model, data()) == pytest.approx(scale, rel=1e-12)


def test_a_chosen_dtype():
    seen = []
    model = Constant(lambda x: seen.append(x.dtype) or x)
    largest_jacobian_norm(model, data(), dtype=torch.float32)
    largest_jacobian_norm(model, data())
    assert seen == [torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("function", "inputs", "error", "message"),
    [
        (lambda x: x, torch.zeros(3, 2, dtype=torch.long), TypeError, r"inputs in `data`, got torch\.int64"),
        (lambda x: (x, x), torch.zeros(3, 2), TypeError, "one tensor, got tuple"),
        (lambda x: x.sum(), torch.zeros(3, 2), TypeError, r"shape \(B, \*outputs\) for a batch of 3, got \(\)"),
        (lambda x: x[:1], torch.zeros(3, 2), TypeError, r"batch of 3, got \(1, 2\)"),
        (lambda x: x.sqrt(), torch.zeros(3, 2), ValueError, "not finite"),
        (lambda x: x, torch.zeros(0, 2), ValueError, "at least one input"),
        (lambda x: x, torch.tensor(1.0), ValueError, "at least one input"),
        (lambda x: x, [], ValueError, "at least one input"),
        (lambda x: x, [{"x": torch.zeros(3, 2)}], TypeError, "got a dict"),
        (lambda x: x, [3], TypeError, "got a int"),
    ],
)
def test_errors(path, function, inputs, error, message):
    with pytest.raises(error, match=message):
        largest_jacobian_norm(Constant(function), inputs)


@pytest.mark.parametrize(
    ("example", "batch"),
    [
        ((torch.zeros(1, 2), torch.zeros(1, 2)), (torch.zeros(3, 2),)),
        ((torch.zeros(1, 2), torch.zeros(1, 2)), (torch.zeros(3, 2), 1)),
        ({"x": torch.zeros(1, 2), "y": torch.zeros(1, 2)}, {"x": torch.zeros(3, 2)}),
        ({"x": torch.zeros(1, 2), "y": torch.zeros(1, 2)}, torch.zeros(3, 2)),
    ],
)
def test_batches_that_do_not_fit_the_example(example, batch):
    with pytest.raises(TypeError, match=r"structure of `example_input` \("):
        largest_jacobian_norm(Two(), [batch], example)


def test_nan_weights():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        largest_jacobian_norm(model, data())


def test_a_compiled_network(path):
    # Compiled code has no second derivative, which the iteration needs: the network runs uncompiled.
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(data())
    assert largest_jacobian_norm(compiled, data()) == largest_jacobian_norm(model, data())


@pytest.mark.parametrize("error", [AssertionError, ValueError, KeyError, TypeError, ZeroDivisionError])
def test_a_forward_that_does_not_take_fp64_is_named_with_its_error(error):
    class Fp32(nn.Module):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise error("fp32 only")
            return 2 * x

    with pytest.raises(
        ValueError, match=rf"cannot be measured on the data in torch.float64.*{error.__name__}: .*fp32 only"
    ):
        largest_jacobian_norm(Fp32(), torch.randn(2, 3))
    assert largest_jacobian_norm(Fp32(), torch.randn(2, 3), dtype=torch.float32) == pytest.approx(2.0)
