import pytest
import torch
from support.networks import Lambda, linear
from support.truth import norm, value_of
from torch import nn

from lightning_lip.certificates.interval import certify
from lightning_lip.errors import UnsupportedLayerError
from lightning_lip.graph.bound import NetworkBound


def test_a_region_with_its_own_autocast_is_refused():
    def function(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)

    with pytest.raises(UnsupportedLayerError, match="autocast"):
        NetworkBound.trace(Lambda(function, a=nn.Linear(3, 3)), torch.randn(2, 3))


def test_a_region_without_gradients_is_traced():
    def function(m, x):
        with torch.no_grad():
            return m.a(x)

    layer = linear(3, 3)
    assert value_of(Lambda(function, a=layer), torch.randn(2, 3).double()) == pytest.approx(norm(layer))


def test_buffers_that_the_forward_changes_are_no_outputs():
    def function(m, x):
        m.mean.mul_(0.9).add_(x.detach().mean())
        return 2 * x

    model = Lambda(function)
    model.register_buffer("mean", torch.zeros(()))
    assert value_of(model, torch.randn(2, 3)) == pytest.approx(2.0)
    assert model.mean == 0


def test_data_dependent_control_flow_is_refused():
    model = Lambda(lambda m, x: x if x.sum() > 0 else 2 * x)
    with pytest.raises(UnsupportedLayerError, match="cannot be traced"):
        NetworkBound.trace(model, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (3.0, "at least one tensor"),
        (torch.tensor(1.0), "first dimension"),
        ((torch.randn(2, 3), torch.randn(3, 3)), "first dimension"),
        (torch.randn(0, 3), "first dimension"),
    ],
)
def test_examples_without_a_batch_are_refused(example, reason):
    with pytest.raises(ValueError, match=reason):
        NetworkBound.trace(nn.Identity(), example)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("example", "got", "reason"),
    [
        ((X, X), r"\(Tensor of shape \(2, 4\), Tensor of shape \(2, 4\)\)", "TypeError"),
        ({"y": X}, r"\(y=Tensor of shape \(2, 4\)\)", "TypeError"),
        ([X], r"\(list\)", "TypeError"),
        ({"x": X, "input": X}, r"\(x=Tensor.*, input=Tensor.*\)", "TypeError"),
        (torch.zeros(3, 5), r"\(Tensor of shape \(2, 5\)\)", "RuntimeError"),
    ],
)
def test_an_example_that_the_forward_does_not_take_is_told_from_one_that_cannot_be_traced(example, got, reason):
    model = nn.Linear(4, 2)
    expected = (
        rf"(?s)`example_input`.*Linear, whose forward takes \(input.*taken as {got} with a batch of 2: {reason}: "
    )
    with pytest.raises(ValueError, match=expected) as caught:
        NetworkBound.trace(model, example)
    assert not isinstance(caught.value, UnsupportedLayerError)
    with pytest.raises(ValueError, match="whose forward takes"):
        certify(model, example)


@pytest.mark.parametrize("error", [TypeError, ValueError, AttributeError])
def test_errors_of_the_export_are_refusals(error):
    def function(m, x):
        if type(x) is not torch.Tensor:  # the export's stand-in
            raise error("no fake tensors here")
        return x

    with pytest.raises(UnsupportedLayerError, match=r"cannot be traced(?s:.*)no fake tensors here"):
        NetworkBound.trace(Lambda(function), X)
    assert not certify(Lambda(function), X).certified


def test_arguments_that_are_no_tensors_are_kept():
    assert value_of(Lambda(lambda m, x, k: k * x), (torch.randn(2, 3), 3)) == pytest.approx(3.0)


def test_batches_of_one_and_of_many_are_traced_as_two():
    layer = linear(2, 3)
    for batch in (1, 2, 7):
        assert value_of(layer, torch.randn(batch, 3).double()) == pytest.approx(norm(layer), rel=1e-9)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Softsign(), nn.Dropout(0.5))
    model[3].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    NetworkBound.trace(model, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch.export of 2.6 refuses compiled submodules")
def test_compiled_and_wrapped_models():
    model = Lambda(lambda m, x: m.inner(x), inner=torch.compile(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    bound = NetworkBound.trace(torch.compile(model), torch.randn(2, 3))
    assert [op.name for op in bound.operators] == ["inner.0"]
    assert [node.path for node in bound.explain()] == ["inner.0", "inner.1"]


def test_lightning_modules_that_log_in_forward(pl, make_trainer, regression_data, make_module):
    module = make_module(pl)
    original = type(module).forward

    def forward(self, x):
        self.log("mean", x.mean(), on_step=True)
        return original(self, x)

    type(module).forward = forward
    trainer = make_trainer(pl, max_steps=1)
    trainer.fit(module, regression_data)
    bound = NetworkBound.trace(module, torch.randn(2, 4))
    assert [op.name for op in bound.operators] == ["net.0", "net.2", "net.4"]
    assert module.trainer is trainer
